"""Checkpoints of running trainings: a folder per step, written beside and renamed, readable by any number of processes.

The tensors are copied to the memory of the host, and a thread writes the copies while the run goes on.
``checkpoints/step-00001500/`` holds the tensors (torch.distributed.checkpoint), their ``index.json`` and
``progress.json``, written last. Nothing in it is a pickle; earlier versions wrote one (``.metadata``), which can run
code when it is read, so their checkpoints are read only where the user trusts them.
"""

from __future__ import annotations

import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sa3_mlx.common.files.atomic import WriteError, new_folder, remove_partials, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.schema import Config, ConfigError, listed, quoted, reason, require

from . import parallel
from .checkpoint_index import INDEX_FILE, PICKLED, IndexReader, IndexWriter

KEPT = 3  # newest ones; milestones stay
PROGRESS_FILE = "progress.json"
_NAME = re.compile(r"step-\d{8,18}", re.ASCII)
Tensors = dict[str, dict[str, Tensor]]  # table -> name -> the live tensor
Value = TypeVar("Value")
# Of a single process; not around each call, as these filters belong to all threads together.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


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


@dataclass(frozen=True)
class HostCopy:
    """Hold what this process writes of a tensor, in the memory of the host, and which tensor that is."""

    own: Tensor
    source: Tensor

    def tensor(self, mesh: DeviceMesh | None) -> Tensor:
        """Return it as the library writes it: as a share where the tensor is spread over the processes, of ``mesh``."""
        source = self.source
        if not isinstance(source, DTensor):
            return self.own
        shape, stride = source.shape, source.stride()
        return DTensor.from_local(self.own, mesh, source.placements, run_check=False, shape=shape, stride=stride)


class Checkpoints:
    """Keep those of one run folder. Every method is called by all processes, in the same order."""

    def __init__(self, folder: Path, milestone_every: int, *, trusted: bool = False) -> None:
        self.folder, self.milestone_every, self.trusted = folder / "checkpoints", milestone_every, trusted
        self._group = parallel.second_group()
        self._mesh = None if self._group is None else DeviceMesh.from_group(self._group, "cpu")
        self._writing: Future[None] | None = None

    def steps(self) -> list[int]:
        """List the steps of the complete checkpoints, oldest first."""
        names = (path.parent.name for path in self.folder.glob(f"step-*/{PROGRESS_FILE}"))
        steps = (int(name.removeprefix("step-")) for name in names if _NAME.fullmatch(name))
        return sorted(steps)

    def check(self, step: int) -> None:
        """Raise ValueError where there is none of this step, saying which there are."""
        if step not in (steps := self.steps()):
            there = f"there are {listed(steps)}" if steps else "there is none of any"
            raise ValueError(f"{self.folder}: no checkpoint of step {step}; {there}")

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, tensors: Tensors, progress: RunProgress, *, own: frozenset[str] = frozenset()) -> None:
        """Copy tensors and progress and write them while the caller goes on, once the checkpoint before is written.

        ``own``: tables of which each process has tensors that no other has; all have the others. It replaces one of the
        same step; the oldest of more than three go, but for milestones. The checksums in ``progress`` are those of the
        files that are written. Raises WriteError when the one before could not be.
        """
        self.wait()
        copies, progress = copied(tensors, own), deepcopy(progress)
        copying = None
        if torch.cuda.is_available():  # the device goes on with what changes the tensors once it has copied them
            copying = torch.cuda.Event()
            copying.record()
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing = thread.submit(self._write, copies, copying, progress)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the last one is there. Raises WriteError when it could not be written; then nothing is left."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait where another error ends the run, and it matters no more whether the last one could be written."""
        with suppress(Exception):
            self.wait()

    @property
    def failed(self) -> bool:
        """Tell whether it is known, without waiting, that the last one could not be written; ``wait`` says why."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def _write(
        self, copies: dict[str, dict[str, HostCopy]], copying: torch.cuda.Event | None, progress: RunProgress
    ) -> None:
        path, first = self.path(progress.step), parallel.is_first()
        with ExitStack() as stack:

            def begin() -> Path | None:
                if not first:
                    return None
                remove_partials(self.folder)
                return stack.enter_context(new_folder(path))

            def write() -> None:
                if copying is not None:
                    copying.synchronize()
                tensors = {
                    table: {key: copy.tensor(self._mesh) for key, copy in part.items()}
                    for table, part in copies.items()
                }
                writer = IndexWriter(folder)
                dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)

            def end() -> None:
                if first:
                    write_json(folder / PROGRESS_FILE, replace(progress, checksums=_merged(sums)).to_dict())
                    stack.close()
                    self._remove_old()

            folder = cast(Path, self._together(path, begin)[0])
            self._together(path, write)
            sums = self._together(path, lambda: _own_checksums(folder))
            self._together(path, end)

    def _together(self, path: Path, part: Callable[[], Value]) -> list[Value]:
        """Return what a part of the writing gives on all processes. Where it fails on one, all raise WriteError."""
        given: Value | None = None
        problem: tuple[str, int | None] | None = None
        try:
            given = part()
        except (dcp.api.CheckpointException, RuntimeError, OSError) as error:
            problem = _problem(error)
        found = parallel.all_values((given, problem), self._group)
        for _, failed in found:
            if failed is not None:
                raise WriteError(path, *failed)
        return [value for value, _ in found]  # type: ignore[misc]  # nothing failed

    def _remove_old(self) -> None:
        for old in self.steps()[:-KEPT]:
            if not self.milestone_every or old % self.milestone_every:
                shutil.rmtree(self.path(old))

    def load(self, tensors: Tensors, at: int | None = None) -> tuple[RunProgress | None, list[str]]:
        """Read the newest one that can be read, or that of step ``at``, into ``tensors``, in place.

        Returns its progress, None where there is no checkpoint, and a line for each that is damaged. Raises ValueError
        when all are, and for one of an earlier version that is not trusted.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()) if at is None else [at]:
            progress, problem = self._try(step, tensors)
            if progress is not None:
                return progress, damaged
            damaged.append(f"{self.path(step)}: damaged ({problem}), left out")
        if damaged:
            remedy = f"to start again, remove {self.folder}" if at is None else "choose another step"
            raise ValueError(f"{'; '.join(damaged)}; {remedy}")
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


def _own_checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of the files of tensors by name that fall to this process."""
    own, sums = parallel.own_slice(), {}
    files = sorted(path for path in folder.iterdir() if path.name != PROGRESS_FILE and path.is_file())
    for path in files[own.rank :: own.world]:
        checksum = 0
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                checksum = zlib.crc32(block, checksum)
        sums[path.name] = checksum
    return sums


def _merged(sums: list[dict[str, int]]) -> dict[str, int]:
    return {name: checksum for found in sums for name, checksum in found.items()}


def _checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of the files of tensors by name; each process reads some of them."""
    return _merged(parallel.all_values(_own_checksums(folder)))


def _all_fine(problem: str) -> bool:
    flag = torch.tensor(float(bool(problem)), device=parallel.own_device())
    return not float(parallel.total(flag))


def _problem(error: BaseException) -> tuple[str, int | None]:
    """Return in one line why the disk refuses, of what the library raises then, and the number of the error."""
    if isinstance(error, WriteError):
        return error.reason, error.errno
    problem = error.failures if isinstance(error, dcp.api.CheckpointException) else {0: (error, None)}
    cause = next(iter(problem.values()))[0]
    return (
        getattr(cause, "strerror", None) or next(iter(str(cause).splitlines()), type(cause).__name__),
        getattr(cause, "errno", None),
    )


def copied(tensors: Tensors, own: frozenset[str] = frozenset()) -> dict[str, dict[str, HostCopy]]:
    """Copy what this process writes: its parts of what is sharded, its tables ``own``, and of what all processes have
    about as many bytes as the others. A GPU copies to pinned memory while the caller goes on."""
    shared = {(table, name): tensor for table in tensors.keys() - own for name, tensor in tensors[table].items()}
    owners = parallel.owners(dict(sorted(shared.items(), key=lambda entry: entry[0])))
    return {
        table: {name: _copy(tensor) for name, tensor in part.items() if parallel.is_own(owners.get((table, name)))}
        for table, part in tensors.items()
    }


def _copy(tensor: Tensor) -> HostCopy:
    part = parallel.own_share(tensor).detach()
    host = torch.empty_like(part, device="cpu", pin_memory=part.is_cuda)
    return HostCopy(host.copy_(part, non_blocking=True), tensor)


def _quiet() -> warnings.catch_warnings[None]:
    """Leave out the library's remarks about single processes and its own old formats."""
    return warnings.catch_warnings(action="ignore")
