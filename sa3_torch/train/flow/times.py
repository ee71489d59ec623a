"""Times at which a diffusion model is trained [T4.2] to [T4.4]: their distribution, shifted by the length of each item.

Shapes: B batch. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sa3_mlx.common.generation.schedule import LOGSNR_FRAMES
from sa3_mlx.common.model.config import ModelConfig, ShiftConfig
from sa3_mlx.common.model.lengths import effective_frames
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.run.settings import check

TRUNCATION = 0.075  # lower bound of sigmoid(n) in the truncated logit-normal
LENGTH_SHIFT = ShiftConfig(type="full", start=0.5, end=1.15, rate=0.0)

TimeSampler = Callable[[int, torch.Generator], Tensor]


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def truncated_logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times in [0, 1]: 1 - (sigmoid(n) - 0.075) / 0.925, n standard normal with sigmoid(n) >= 0.075 (4.3)."""
    low = _normal_cdf(math.log(TRUNCATION / (1 - TRUNCATION)))
    u = low + (1 - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    y = torch.sigmoid(torch.special.ndtri(u.clamp(max=1 - 1e-12)))
    return (1 - (y - TRUNCATION) / (1 - TRUNCATION)).clamp(0, 1).float()


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times in [0, 1): a Sobol sequence, scrambled anew by every call, so that each batch is spread evenly."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    return torch.quasirandom.SobolEngine(1, scramble=True, seed=seed).draw(count)[:, 0]


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times: sigmoid(n), n standard normal."""
    return torch.sigmoid(torch.randn(count, generator=generator))


def log_snr_normal(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times with ln((1 - t) / t) normal of mean -1.2 and standard deviation 2."""
    return torch.sigmoid(1.2 - 2 * torch.randn(count, generator=generator))


def log_snr_uniform(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times with ln((1 - t) / t) uniform in -6..5."""
    return torch.sigmoid(6 - 11 * torch.rand(count, generator=generator))


TIME_SAMPLERS: dict[str, TimeSampler] = {
    "truncated_logit_normal": truncated_logit_normal,
    "uniform": uniform,
    "logit_normal": logit_normal,
    "log_snr_normal": log_snr_normal,
    "log_snr_uniform": log_snr_uniform,
}


def shift_times(
    t: Tensor, lengths: Tensor, min_length: int, max_length: int, shift: ShiftConfig = LENGTH_SHIFT
) -> Tensor:
    """Times (B,) warped towards noise by the length (B,) of each item in frames (4.4).

    The formulas are those of the sampling schedule, with lengths of one's own. "full" is e^mu t / (1 - t + e^mu t), mu
    going from ``start`` at ``min_length`` to ``end`` at ``max_length``. "flux" has the odds themselves there, geometric
    in the length (start = end: one shift for all). "logsnr" turns t into the log-SNR end - t (end - start), start
    falling by ``rate`` per octave over 2000 frames, and leaves 0 and 1 where they are.
    """
    if shift.type == "none":
        return t
    if shift.type == "logsnr":
        start = shift.start - shift.rate * torch.log2(lengths.clamp_min(1) / LOGSNR_FRAMES)
        warped = torch.sigmoid(t * (shift.end - start) - shift.end)
        return torch.where(t <= 0, 0.0, torch.where(t >= 1, 1.0, warped))
    lengths = lengths.clamp(min_length, max_length)
    if shift.type == "full":
        share = (lengths - min_length) / (max_length - min_length)
        odds = torch.exp(shift.start + (shift.end - shift.start) * share)
    else:
        share = torch.log(lengths / min_length) / math.log(max_length / min_length)
        odds = shift.start * (shift.end / shift.start) ** share
    return odds * t / (1 - t + odds * t)


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
