"""Define a training stage: the settings that all have, and what the loop asks of each.

A stage is a function of (weights, step): its batches and its noise come from counter-based generators keyed by the
step, so a run that was stopped and resumed equals one that was not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sa3_mlx.common.schema import Config, ConfigError

from . import parallel
from .feed import BatchFeed
from .optimizers import Group
from .parallel import BatchSlice
from .settings import check

BATCH_MAX = 2**14  # far beyond every recipe: a batch is in memory before anything can be said of it


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """Hold what every stage needs. ``every`` and ``after`` count steps of all groups."""

    seed: int
    steps: int
    batch: int  # items of a step, of all processes and micro-batches together
    accumulate: int  # micro-batches of a process in a step
    precision: Literal["bf16", "fp32", "auto"]  # of matrix products; auto times both
    compile: bool  # torch.compile of transformer blocks; needs a C++ compiler on a CPU; see blocks.py
    checkpoint_blocks: bool = False  # less memory, more time; see blocks.py
    parallel: Literal["ddp", "fsdp"]  # where torchrun starts several processes
    ema_decay: float
    ema_after: int
    ema_every: int
    save_every: int
    milestone_every: int  # checkpoints that are kept for good; 0 for none
    validate_every: int

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "seed", "ema_after", "milestone_every")
        check(self, 1, math.inf, "steps", "batch", "accumulate", "ema_every", "save_every", "validate_every")
        check(self, 1, BATCH_MAX, "batch", "accumulate")
        check(self, 0, 1 - 1e-12, "ema_decay")
        if self.precision == "auto" and self.parallel == "fsdp":
            raise ConfigError("precision is 'auto' with parallel 'fsdp': choose 'bf16' or 'fp32', or parallel 'ddp'")
        if self.milestone_every % self.save_every:
            raise ConfigError(
                f"milestone_every is {self.milestone_every}: allowed are multiples of save_every ({self.save_every})"
            )


@dataclass(frozen=True, kw_only=True)
class MachineConfig(Config):
    """Say what a preset was planned for; its dry run plans for that where it is told nothing else."""

    device: str  # a chip with memory of its own, as of ``--device``
    processes: int  # one a device

    def __post_init__(self) -> None:
        check(self, 1, BATCH_MAX, "processes")


@dataclass(frozen=True, kw_only=True)
class StageConfig(Config):
    """Hold the settings of a stage, as a preset has them."""

    train: TrainConfig
    machine: MachineConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Split:
    """Describe data that a stage reads, for its plan."""

    name: str
    items: int
    seconds: float | None  # None where it is not known before they are read


class Stage(ABC):
    """Say what is trained, on which losses. The loop sets ``precision``, ``batch_slice`` and ``slices``."""

    name: str
    model: nn.Module  # its state is averaged and exported
    groups: dict[str, Group]  # what is trained; their networks share no parameter
    feed: BatchFeed[Any] | None = None  # reads batches ahead of the steps

    def __init__(self) -> None:
        self.device = parallel.own_device()  # for networks and batches
        self.precision = "fp32"
        self.batch_slice = BatchSlice()  # the slice of the global batch that ``losses`` reads
        self.slices = [BatchSlice()]  # the micro-batches of this process
        # Logged beside the terms, not minimised: () means over the slice, averaged over slices, or (2,) sum and count
        # of some of its items, added over slices before they are divided; what has no item is left out.
        self.notes: dict[str, Tensor] = {}

    def turn(self, step: int) -> str:  # noqa: ARG002 (stages with several groups override it)
        """Name of the group that is trained in a step; the parameters of the others are frozen meanwhile."""
        return next(iter(self.groups))

    def begin(self, step: int) -> None:  # noqa: B027 (most stages keep nothing of their weights)
        """Keep what a step needs of the weights that it begins with; in ``losses`` some are not the sharded ones."""

    @abstractmethod
    def losses(self, step: int) -> dict[str, Tensor]:
        """Return weighted terms of a step on ``batch_slice``, means over its items, whose sum is minimised.

        Every parameter of the turn's group has a part in it, with a gradient of zero if need be, and which networks run
        depends on the step, not on the items: several processes wait for each other at both.
        """

    def prepare(self, step: int, slices: list[BatchSlice]) -> None:  # noqa: B027 (most stages have nothing to prepare)
        """Compute what the losses need of all of several micro-batches, before them and without gradients."""

    def period(self) -> int:
        """Return for how many steps serves what the first of them computes beside its losses; 0: nothing does."""
        return 0

    def data(self) -> tuple[Split, ...]:
        """Return what is read in the run, for its plan; empty where a stage does not say."""
        return ()

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Measure on held-out data, with the weights now in ``model``.

        All processes come here together, each measures its share (``shares``), and what the first returns is logged.
        """

    @abstractmethod
    def demo(self, folder: Path, step: int) -> None:
        """Write sounds or pictures of the weights now in ``model``: all processes come here, the first one writes."""

    @abstractmethod
    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write ``weights``, the averaged state of ``model`` on the CPU, as a checkpoint folder. ``model`` holds them
        too."""

    def remarks(self) -> list[str]:
        """Return notes on what the run is given that a user should read before it begins."""
        return []

    def alarms(self, values: dict[str, float]) -> list[str]:  # noqa: ARG002 (most stages have none)
        """Return plain sentences about a row of the log that a user should read now."""
        return []

    def shares(self, count: int, batch: int) -> list[slice]:
        """Return the rows of ``count`` held-out items that this process measures, in pieces no larger than its
        micro-batches of a training batch of ``batch``."""
        most, rows = max(1, batch // self.slices[0].world), parallel.own_rows(count)
        return [slice(at, min(at + most, rows.stop)) for at in range(rows.start, rows.stop, most)]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def weighted(self, name: str, weight: float, value: Tensor) -> Tensor:
        """Return a weighted term; its raw value is logged as "name/raw"."""
        self.notes[f"{name}/raw"] = value.detach()
        return weight * value
