"""Checkpoints of running trainings: a folder per step, written beside and renamed, readable by any number of processes.

``checkpoints/step-00001500/`` holds the tensors (torch.distributed.checkpoint) and ``progress.json``, written last.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from sa3_mlx.spec.config import ConfigError

from . import parallel

KEPT = 3  # newest ones; milestones stay
# These change where and how fast a run computes, not what; a run may go on with others.
FREE = ("train.parallel", "train.accumulate")
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
        if parallel.is_first():
            sizes = {path.name: path.stat().st_size for path in part.iterdir()}
            (part / "progress.json").write_text(json.dumps({**progress, "step": step, "sizes": sizes}) + "\n")
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
        damaged = []
        for step in reversed(self.steps()):
            progress, problem = self._try(step, tensors)
            if progress is not None:
                return progress, damaged
            damaged.append(f"{self.path(step)}: damaged ({problem}), left out")
        if damaged:
            raise ValueError(f"{self.folder}: all checkpoints are damaged; remove the folder to begin anew")
        return None, damaged

    def _try(self, step: int, tensors: Tensors) -> tuple[Progress | None, str]:
        path, problem, progress = self.path(step), "", None
        try:
            progress = json.loads((path / "progress.json").read_text())
            wrong = [n for n, size in progress.pop("sizes").items() if (path / n).stat().st_size != size]
            problem = f"wrong size of {', '.join(wrong)}" if wrong else ""
        except (OSError, ValueError, KeyError, AttributeError) as error:
            problem = str(error).splitlines()[0]
        if not _all_fine(problem):
            return None, problem or "seen by another process"
        try:
            with _quiet():
                dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
        except Exception as error:  # what torch raises depends on where the damage is
            problem = (str(error).splitlines() or [type(error).__name__])[-1][:200]
        return (progress, "") if _all_fine(problem) else (None, problem or "seen by another process")


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
