"""Distributions of noise levels of adversarial post-training [T7.2]: those of flow matching and more.

t = 0 is data, t = 1 noise. Each function draws (count,) float32 times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.presets import LOGSNR
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.flow.times import TIME_SAMPLERS, TimeSampler, shift_times
from sa3_torch.train.run.settings import check

LOW, HIGH = -6.0, 2.0  # log-SNR ln((1 - t) / t)
GRIDS = (1, 2, 4, 8, 16)  # steps


def sampling_log_snr(count: int, generator: torch.Generator) -> Tensor:
    """Log-SNR uniform from -6 to 2: nearly the sampling schedule of few-step models."""
    return torch.sigmoid(-(LOW + (HIGH - LOW) * torch.rand(count, generator=generator)))


def one_shot(count: int, generator: torch.Generator) -> Tensor:  # noqa: ARG001 (as all)
    """Pure noise: what a single step starts from."""
    return torch.ones(count)


def denoised(count: int, generator: torch.Generator) -> Tensor:  # noqa: ARG001 (as all)
    """No noise: a discriminator sees the generator's output as it is."""
    return torch.zeros(count)


def congruent(count: int, generator: torch.Generator) -> Tensor:
    """A step of the sampling schedule with 1, 2, 4, 8 or 16 steps, whose grids are nested; all equally often."""
    steps = torch.tensor(GRIDS)[torch.randint(len(GRIDS), (count,), generator=generator)]
    place = (torch.rand(count, generator=generator) * steps).long() * (GRIDS[-1] // steps)  # on the finest grid
    return torch.from_numpy(sigmas(LOGSNR, GRIDS[-1], 1.0, [1])[0])[place]


NOISE_LEVELS: dict[str, TimeSampler] = {
    **TIME_SAMPLERS,
    "sampling_log_snr": sampling_log_snr,
    "one_shot": one_shot,
    "denoised": denoised,
    "congruent": congruent,
}


@dataclass(frozen=True, kw_only=True)
class NoiseLevelConfig(Config):
    """How noisy the inputs of a network are in training."""

    family: str
    shifted: bool  # by the length of each item (4.4)
    one_shot: float  # share of items at t = 1 whatever the family draws

    def __post_init__(self) -> None:
        check(self, 0, 1, "one_shot")
        if self.family not in NOISE_LEVELS:
            raise ConfigError(f"family is {self.family!r}: allowed are {', '.join(NOISE_LEVELS)}")


def draw_levels(
    config: NoiseLevelConfig, lengths: Tensor, shift_frames: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """Times (B,) of items of ``lengths`` (B,) frames; ``shift_frames``: the shortest and the longest of the shift."""
    t = NOISE_LEVELS[config.family](len(lengths), generator)
    if config.shifted:
        t = shift_times(t, lengths.float(), *shift_frames)
    return torch.where(torch.rand(len(t), generator=generator) < config.one_shot, 1.0, t)
