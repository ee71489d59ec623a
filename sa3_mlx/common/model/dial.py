"""Turn a strength from 0 to 1 into the noise level of audio-to-audio, so that equal steps make about equal change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from sa3_mlx.common.schema import Config, is_finite, quoted, require

# How times begin at a noise level below 1: "official" warps a ramp from the level, which climbs first; "normalized"
# scales the warped ramp from 1 by the level; "monotone" cuts it at the level. At level 1 all are the same.
Schedule = Literal["official", "normalized", "monotone"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
NOTCHES = 10  # strengths 0.1, 0.2, ... 1


@dataclass(frozen=True, kw_only=True)
class Dial(Config):
    """Hold, for every schedule, the noise levels of the strengths 0.1, 0.2, ... 1; found by ``sa3 calibrate``."""

    official: tuple[float, ...]
    normalized: tuple[float, ...]
    monotone: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in SCHEDULES:
            levels = getattr(self, name)
            rising = all(low < high for low, high in zip((0.0, *levels), levels, strict=False))
            require(
                len(levels) == NOTCHES and rising and levels[-1] == 1,
                f"dial.{name}: expected {NOTCHES} rising noise levels above 0, the last 1, got {quoted(levels)}",
            )

    def noise_level(self, strength: float, schedule: Schedule) -> float:
        """Return the level for a strength above 0 and up to 1. Raises ValueError for any other."""
        if not is_finite(strength) or not 0 < strength <= 1:
            raise ValueError(f"strength is {quoted(strength)}: allowed is above 0 and up to 1")
        notches = np.arange(NOTCHES + 1) / NOTCHES
        return float(np.interp(strength, notches, [0.0, *getattr(self, schedule)]))
