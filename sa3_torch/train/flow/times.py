"""Times at which a diffusion model is trained [T4.2] to [T4.4]: their distribution, shifted by the length of each item.

Shapes: B batch. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import effective_frames
from sa3_mlx.common.schema import Config
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.run.settings import check

TRUNCATION = 0.075  # lower bound of sigmoid(n) in the truncated logit-normal
SHIFT_START, SHIFT_END = 0.5, 1.15  # logarithm of the odds at the shortest and at the longest


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def truncated_logit_normal(u: Tensor) -> Tensor:
    """Map uniform numbers to times in [0, 1]: (B,) -> (B,) float32 [T4.3].

    They are 1 - (sigmoid(n) - 0.075) / 0.925, n normal with sigmoid(n) >= 0.075.
    """
    low = _normal_cdf(math.log(TRUNCATION / (1 - TRUNCATION)))
    y = torch.sigmoid(torch.special.ndtri((low + (1 - low) * u.double()).clamp(max=1 - 1e-12)))
    return (1 - (y - TRUNCATION) / (1 - TRUNCATION)).clamp(0, 1).float()


def shift_times(t: Tensor, lengths: Tensor, min_length: int, max_length: int) -> Tensor:
    """Warp times (B,) towards noise by the length (B,) of each item in frames: e^mu t / (1 - t + e^mu t), mu going from
    0.5 at ``min_length`` to 1.15 at ``max_length`` [T4.4]. The formula is that of the sampling schedule [B24]."""
    share = (lengths.clamp(min_length, max_length) - min_length) / (max_length - min_length)
    odds = torch.exp(SHIFT_START + (SHIFT_END - SHIFT_START) * share)
    return odds * t / (1 - t + odds * t)


@dataclass(frozen=True, kw_only=True)
class TimesConfig(Config):
    """Say by which length of an item its time is shifted."""

    length: Literal["duration", "valid"]  # full duration, or frames of the item
    shift_min_frames: int
    shift_max_frames: int

    def __post_init__(self) -> None:
        check(self, 1, math.inf, "shift_min_frames")
        check(self, self.shift_min_frames + 1, math.inf, "shift_max_frames")

    def draw(self, batch: LatentBatch, model: ModelConfig, u: Tensor) -> Tensor:
        """Return the times (B,) of items, before silence is added to them, for uniform numbers u (B,)."""
        t = truncated_logit_normal(u)
        if self.length == "duration":
            lengths = torch.tensor([float(effective_frames(seconds, model)) for seconds in batch.seconds.tolist()])
        else:
            lengths = batch.valid.sum(1).float()
        return shift_times(t, lengths, self.shift_min_frames, self.shift_max_frames)
