"""Checkpoints of running trainings: a folder per step, written beside and renamed, readable by any number of processes.

``checkpoints/step-00001500/`` holds the tensors (torch.distributed.checkpoint), their ``index.json`` and
``progress.json``, written last. Nothing in it is a pickle; earlier versions wrote one (``.metadata``), which can run
code when it is read, so their checkpoints are read only where the user trusts them.
"""

from __future__ import annotations

import re
import shutil
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from sa3_mlx.common.files.atomic import WriteError, new_folder, remove_partials, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.schema import Config, ConfigError, listed, quoted, reason, require

from . import parallel
from .checkpoint_index import INDEX_FILE, PICKLED, IndexReader, IndexWriter

KEPT = 3  # newest ones; milestones stay
PROGRESS_FILE = "progress.json"
_NAME = re.compile(r"step-\d{8,18}", re.ASCII)
Tensors = dict[str, dict[str, Tensor]]  # table -> name -> the live tensor


@dataclass(frozen=True, kw_only=True)
class RunProgress(Config):
    """Say how far a run is, beside its tensors. ``updates`` and ``bad_steps`` are counts by group of parameters."""

    step: int
    updates: dict[str, int]
    bad_steps: dict[str, int]
    precision: str
    revision: str | None  # of the source that ran
    checksums: dict[str, int]  # CRC-32 of the other files of the checkpoint

    def __post_init__(self) -> None:
        for name in ("updates", "bad_steps", "checksums"):
            for key, count in getattr(self, name).items():
                whole = isinstance(count, int) and not isinstance(count, bool) and count >= 0
                require(whole, f"{name}.{listed([key])} is {quoted(count)}; expected a whole number")
        require(self.precision in ("fp32", "bf16"), f"precision is {quoted(self.precision)}: allowed are fp32 and bf16")
        if self.updates.keys() != self.bad_steps.keys():
            raise ConfigError(f"updates are of {listed(self.updates)}, bad_steps of {listed(self.bad_steps)}")


class Checkpoints:
    """Keep those of one run folder. Every method is called by all processes."""

    def __init__(self, folder: Path, milestone_every: int, *, trusted: bool = False) -> None:
        self.folder, self.milestone_every, self.trusted = folder / "checkpoints", milestone_every, trusted

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints, oldest first."""
        names = (path.parent.name for path in self.folder.glob(f"step-*/{PROGRESS_FILE}"))
        steps = (int(name.removeprefix("step-")) for name in names if _NAME.fullmatch(name))
        return sorted(steps)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, tensors: Tensors, progress: RunProgress) -> None:
        """Write one, in place of one of the same step; the oldest of more than three go, but for milestones.

        The checksums in ``progress`` are those of the files that are written.
        """
        path = self.path(progress.step)
        with ExitStack() as stack:
            if parallel.is_first():
                remove_partials(self.folder)
                folder = stack.enter_context(new_folder(path))
            folder = parallel.of_first(folder if parallel.is_first() else None)
            with _quiet(), _refusing(path):
                dcp.save(tensors, storage_writer=IndexWriter(folder), no_dist=not dist.is_initialized())
            parallel.wait()
            sums = _checksums(folder)
            if parallel.is_first():
                write_json(folder / PROGRESS_FILE, replace(progress, checksums=sums).to_dict())
        if parallel.is_first():
            for old in self.steps()[:-KEPT]:
                if not self.milestone_every or old % self.milestone_every:
                    shutil.rmtree(self.path(old))
        parallel.wait()

    def load(self, tensors: Tensors) -> tuple[RunProgress | None, list[str]]:
        """Read the newest one that can be read into ``tensors``, in place.

        Returns its progress, None where there is no checkpoint, and a line for each that is damaged. Raises ValueError
        when all are, and for one of an earlier version that is not trusted.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            progress, problem = self._try(step, tensors)
            if progress is not None:
                return progress, damaged
            damaged.append(f"{self.path(step)}: damaged ({problem}), left out")
        if damaged:
            raise ValueError("; ".join(damaged) + f"; to start again, remove {self.folder}")
        return None, damaged

    def _reader(self, path: Path) -> dcp.FileSystemReader:
        return IndexReader(path) if (path / INDEX_FILE).is_file() else dcp.FileSystemReader(path)

    def _check_trust(self, path: Path) -> None:
        if (path / PICKLED).is_file() and not (path / INDEX_FILE).is_file() and not self.trusted:
            raise ValueError(
                f"{path}: an earlier version wrote its index as a pickle, which can run code when it is read; add "
                "--trust-run if this run is your own"
            )

    def _try(self, step: int, tensors: Tensors) -> tuple[RunProgress | None, str]:
        """Return its progress, or None and what is wrong with it; all processes come to the same result."""
        path, progress = self.path(step), None
        self._check_trust(path)
        sums = _checksums(path)
        try:
            progress = RunProgress.from_dict(read_object(path / PROGRESS_FILE), where=PROGRESS_FILE)
            problem = _mismatch(progress, step, sums, {name for name in tensors if name.startswith("weights/")})
            if not problem and (path / INDEX_FILE).is_file():
                IndexReader(path).read_metadata()  # which says what is wrong; the library would not
        except (OSError, ValueError) as error:
            problem = reason(error)
        if not _all_fine(problem):
            return None, problem or "as another process sees it"
        try:
            with _quiet():
                dcp.load(tensors, storage_reader=self._reader(path), no_dist=not dist.is_initialized())
        except (Exception, dcp.api.CheckpointException):  # what torch raises depends on what it is
            problem = "its tensors are not those of this run"
        return (progress, "") if _all_fine(problem) else (None, problem or "as another process sees it")


def _mismatch(progress: RunProgress, step: int, sums: dict[str, int], weights: set[str]) -> str:
    """Return what in a checkpoint does not belong to its progress, or to the networks of this run; "" is good."""
    if progress.step != step:
        return f"{PROGRESS_FILE} is of step {progress.step}"
    if weights and weights != {f"weights/{name}" for name in progress.updates}:
        return f"{PROGRESS_FILE} is of a run that trains {listed(progress.updates)}"
    needed = {name for name in sums if name == INDEX_FILE or name.endswith(".distcp")}
    expected = progress.checksums
    changed = sorted(name for name in needed | expected.keys() if sums.get(name) != expected.get(name))
    return f"{listed(changed)} changed" if changed else ""


def _checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of the files of tensors by name; each process reads some of them."""
    own, sums = parallel.own_slice(), {}
    files = sorted(path for path in folder.iterdir() if path.name != PROGRESS_FILE and path.is_file())
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


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Turn what the library raises where the disk refuses into one line that names the checkpoint."""
    try:
        yield
    except (dcp.api.CheckpointException, RuntimeError, OSError) as error:
        problem = error.failures if isinstance(error, dcp.api.CheckpointException) else {0: (error, None)}
        cause = next(iter(problem.values()))[0]
        number = getattr(cause, "errno", None)
        reason = getattr(cause, "strerror", None) or next(iter(str(cause).splitlines()), type(cause).__name__)
        raise WriteError(path, reason, number) from error


def _quiet() -> warnings.catch_warnings[None]:
    """Leave out the library's remarks about single processes and its own old formats."""
    return warnings.catch_warnings(action="ignore")
