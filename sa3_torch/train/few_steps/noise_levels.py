"""Distributions of noise levels of adversarial post-training [T7.2].

t = 0 is data, t = 1 noise. Each function maps uniform numbers in [0, 1) to times: (B,) -> (B,) float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.flow.times import shift_times, truncated_logit_normal
from sa3_torch.train.run.settings import check

LOW, HIGH = -6.0, 2.0  # log-SNR ln((1 - t) / t)


def sampling_log_snr(u: Tensor) -> Tensor:
    """Return times of a log-SNR uniform from -6 to 2: nearly the sampling schedule of few-step models."""
    return torch.sigmoid(-(LOW + (HIGH - LOW) * u.float()))


NOISE_LEVELS: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated_logit_normal": truncated_logit_normal,
    "sampling_log_snr": sampling_log_snr,
}


@dataclass(frozen=True, kw_only=True)
class NoiseLevelConfig(Config):
    """Say how noisy the inputs of a network are in training."""

    family: str  # of NOISE_LEVELS
    shifted: bool  # by the length of each item [T4.4]
    one_shot: float  # share of items at t = 1 whatever the family draws

    def __post_init__(self) -> None:
        check(self, 0, 1, "one_shot")
        if self.family not in NOISE_LEVELS:
            raise ConfigError(f"family is {self.family!r}: allowed are {', '.join(NOISE_LEVELS)}")


def draw_levels(config: NoiseLevelConfig, lengths: Tensor, shift_frames: tuple[int, int], u: Tensor) -> Tensor:
    """Return times (B,) of items of ``lengths`` (B,) frames for uniform numbers u (B, 2).

    ``shift_frames`` are least and most of the shift.
    """
    t = NOISE_LEVELS[config.family](u[:, 0])
    if config.shifted:
        t = shift_times(t, lengths.float(), *shift_frames)
    return torch.where(u[:, 1] < config.one_shot, 1.0, t)
