"""Checkpoints of running trainings: a folder per step, written beside and renamed, readable by any number of processes.

``checkpoints/step-00001500/`` holds the tensors (torch.distributed.checkpoint) and ``progress.json``, written last.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from sa3_mlx.common.schema import ConfigError

from . import parallel

KEPT = 3  # newest ones; milestones stay
# These change where and how fast a run computes, not what; a run may go on with others.
FREE = ("train.parallel", "train.accumulate", "train.checkpoint_blocks")
Tensors = dict[str, dict[str, Tensor]]  # table -> name -> the live tensor
Progress = dict[str, Any]  # JSON values


class Checkpoints:
    """Those of one run folder. Every method is called by all processes."""

    def __init__(self, folder: Path, milestone_every: int) -> None:
        self.folder, self.milestone_every = folder / "checkpoints", milestone_every

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return sorted(int(path.parent.name.removeprefix("step-")) for path in self.folder.glob("step-*/progress.json"))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, tensors: Tensors, progress: Progress) -> None:
        """Write one; the oldest of more than three go, but for milestones."""
        part = self.folder / "part"
        if parallel.is_first():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        parallel.wait()
        with _quiet():
            dcp.save(tensors, checkpoint_id=part, no_dist=not dist.is_initialized())
        parallel.wait()
        sums = _checksums(part)
        if parallel.is_first():
            (part / "progress.json").write_text(json.dumps({**progress, "step": step, "checksums": sums}) + "\n")
            if self.path(step).exists():  # damaged, or the same
                shutil.rmtree(self.path(step))
            part.rename(self.path(step))
            for old in self.steps()[:-KEPT]:
                if not self.milestone_every or old % self.milestone_every:
                    shutil.rmtree(self.path(old))
        parallel.wait()

    def load(self, tensors: Tensors) -> tuple[Progress | None, list[str]]:
        """Read the newest one that can be read into ``tensors``, in place.

        Returns its progress, None where there is no checkpoint, and a line for each that is damaged. Raises ValueError
        when all are.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            progress, problem = self._try(step, tensors)
            if progress is not None:
                return progress, damaged
            damaged.append(f"{self.path(step)}: damaged ({problem}), left out")
        if damaged:
            raise ValueError("; ".join(damaged) + f"; to begin anew, remove {self.folder}")
        return None, damaged

    def _try(self, step: int, tensors: Tensors) -> tuple[Progress | None, str]:
        """Its progress, or None and what is wrong with it; all processes come to the same result."""
        path, progress = self.path(step), None
        sums, problem = _checksums(path), ""
        try:
            progress = json.loads((path / "progress.json").read_text())
            wrong = [name for name, expected in progress.pop("checksums").items() if sums.get(name) != expected]
            problem = f"{', '.join(wrong)} changed" if wrong else ""
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            problem = "progress.json cannot be read"
        if not _all_fine(problem):
            return None, problem or "as another process sees it"
        try:
            with _quiet():
                dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
        except (Exception, dcp.api.CheckpointException):  # what torch raises depends on what it is
            problem = "its tensors are not those of this run"
        return (progress, "") if _all_fine(problem) else (None, problem or "as another process sees it")


def _checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of the files of tensors by name; each process reads some of them."""
    own, sums = parallel.own_slice(), {}
    files = sorted(path for path in folder.iterdir() if path.suffix != ".json")
    for path in files[own.rank :: own.world]:
        checksum = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                checksum = zlib.crc32(block, checksum)
        sums[path.name] = checksum
    everyones: list[dict[str, int]] = [sums] * own.world
    if dist.is_initialized():
        dist.all_gather_object(everyones, sums)
    return {name: checksum for found in everyones for name, checksum in found.items()}


def _all_fine(problem: str) -> bool:
    flag = torch.tensor(float(bool(problem)), device=parallel.own_device())
    return not float(parallel.total(flag))


def _quiet() -> warnings.catch_warnings[None]:
    """Without the library's remarks about single processes and its own old formats."""
    return warnings.catch_warnings(action="ignore")


def keep_settings(folder: Path, settings_json: str, *, resumed: bool) -> None:
    """Write the settings of a new run to ``settings.json``; raise ConfigError when a run goes on with others."""
    path = folder / "settings.json"
    if not parallel.is_first():
        return
    if not resumed or not path.is_file():
        path.write_text(settings_json + "\n", encoding="utf-8")
        return
    try:
        old = _flat(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); the run cannot go on") from error
    new = _flat(json.loads(settings_json))
    other = [key for key in sorted(old | new) if key not in FREE and old.get(key) != new.get(key)]
    if other:
        key = other[0]
        more = f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        raise ConfigError(
            f"{folder} holds a run with {key} = {old.get(key)!r}, now it is {new.get(key)!r}{more}; choose another "
            "folder or give the same settings"
        )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """{"train": {"seed": 0}} -> {"train.seed": 0}"""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
