"""At which times a diffusion model is trained: the settings of [T4.2] step 1, 4.3 and 4.4.

Shapes: B batch. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sa3_mlx.common.model.config import ModelConfig, ShiftConfig
from sa3_mlx.common.model.lengths import effective_frames
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.run.settings import check

from .choices import TIME_SAMPLERS, shift_times


@dataclass(frozen=True, kw_only=True)
class TimesConfig(Config):
    """The distribution of t, shifted by the length of each item."""

    sampler: str  # of TIME_SAMPLERS
    one_shot: float  # share of items at t = 1, as a model of one step would see them
    length: Literal["duration", "valid", "batch"]  # full duration, frames of the item, frames of the padded batch
    shift_min_frames: int
    shift_max_frames: int
    shift: ShiftConfig

    def __post_init__(self) -> None:
        check(self, 0, 1, "one_shot")
        check(self, 1, math.inf, "shift_min_frames")
        check(self, self.shift_min_frames + 1, math.inf, "shift_max_frames")
        if self.sampler not in TIME_SAMPLERS:
            raise ConfigError(f"times.sampler is {self.sampler!r}: allowed are {', '.join(TIME_SAMPLERS)}")
        if self.shift.type in ("full", "flux") and self.shift.rate:
            raise ConfigError(f"times.shift.rate is {self.shift.rate:g}: {self.shift.type!r} needs 0 in training")

    def draw(self, batch: LatentBatch, model: ModelConfig, random: torch.Generator) -> Tensor:
        """Times (B,) of a global batch, before silence is added behind its items."""
        t = TIME_SAMPLERS[self.sampler](len(batch.items), random)
        if self.length == "duration":
            lengths = torch.tensor([float(effective_frames(seconds, model)) for seconds in batch.seconds.tolist()])
        elif self.length == "valid":
            lengths = batch.valid.sum(1).float()
        else:
            lengths = torch.full_like(t, batch.valid.shape[1])
        t = shift_times(t, lengths, self.shift_min_frames, self.shift_max_frames, self.shift)
        if self.one_shot:
            t = torch.where(torch.rand(len(t), generator=random) < self.one_shot, 1.0, t)
        return t
