"""Distributions of noise levels of adversarial post-training [T7.2].

t = 0 is data, t = 1 noise. Each function maps uniform numbers in [0, 1) to times: (B,) -> (B,) float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.presets import LOGSNR
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.flow.times import shift_times, truncated_logit_normal
from sa3_torch.train.run.settings import check

FEW = (1, 2, 4, 8)  # steps
LOW, HIGH = -6.0, 2.0  # log-SNR ln((1 - t) / t)
QUIET = 0.25  # up to here attacks and tails of sounds can still be told


def sampling_log_snr(u: Tensor) -> Tensor:
    """Return times of a log-SNR uniform from -6 to 2: nearly the sampling schedule of few-step models."""
    return torch.sigmoid(-(LOW + (HIGH - LOW) * u.float()))


@cache
def _grid_levels() -> Tensor:
    """Return the levels at which 1, 2, 4 and 8 steps evaluate the network: (32,), each number of steps as often."""
    grids = (torch.from_numpy(sigmas(LOGSNR, steps, 1.0, [1]))[0, :-1] for steps in FEW)
    return torch.cat([grid.repeat_interleave(FEW[-1] // len(grid)) for grid in grids])


def sampling_grids(u: Tensor) -> Tensor:
    """Return times at which few-step sampling evaluates the network, and no others; nearly half are 1."""
    return _grid_levels()[(u * len(FEW) * FEW[-1]).long()]


NOISE_LEVELS: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated_logit_normal": truncated_logit_normal,
    "sampling_log_snr": sampling_log_snr,
    "sampling_grids": sampling_grids,
}


@dataclass(frozen=True, kw_only=True)
class NoiseLevelConfig(Config):
    """Say how noisy the inputs of a network are in training."""

    family: str  # of NOISE_LEVELS
    shifted: bool  # by the length of each item [T4.4]
    one_shot: float  # share of items at t = 1 whatever the family draws
    low_noise: float = 0.0  # share of items at levels uniform from 0 to QUIET whatever the family draws

    def __post_init__(self) -> None:
        check(self, 0, 1, "one_shot", "low_noise")
        if self.one_shot + self.low_noise > 1:
            raise ConfigError(
                f"one_shot is {self.one_shot:g}, low_noise {self.low_noise:g}: allowed are shares of 1 together"
            )
        if self.family not in NOISE_LEVELS:
            raise ConfigError(f"family is {self.family!r}: allowed are {', '.join(NOISE_LEVELS)}")


def draw_levels(config: NoiseLevelConfig, lengths: Tensor, shift_frames: tuple[int, int], u: Tensor) -> Tensor:
    """Return times (B,) of items of ``lengths`` (B,) frames for uniform numbers u (B, 2).

    ``shift_frames`` are least and most of the shift.
    """
    t = NOISE_LEVELS[config.family](u[:, 0])
    if config.shifted:
        t = shift_times(t, lengths.float(), *shift_frames)
    quiet = 1 - u[:, 1] < config.low_noise
    t = torch.where(quiet, QUIET * u[:, 0].float(), t)
    return torch.where(u[:, 1] < config.one_shot, 1.0, t)
