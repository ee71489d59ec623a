"""Clips that need no ears: silent, not finite, beyond full scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SILENT = 1e-4  # peak below which a clip is silent


@dataclass(frozen=True, kw_only=True)
class Health:
    """Shares of clips; ``clipped``: of those with any sample beyond full scale."""

    silent: float
    not_finite: float
    clipped: float


def health(conditions: Sequence[tuple[bool, bool, bool]]) -> Health:
    """Of what ``condition`` says of every clip. Raises ValueError without clips."""
    if not conditions:
        raise ValueError("no clips to examine")
    silent, broken, clipped = np.array(conditions, dtype=np.float64).mean(axis=0).tolist()
    return Health(silent=silent, not_finite=broken, clipped=clipped)


def condition(audio: NDArray[np.floating]) -> tuple[bool, bool, bool]:
    """Of one clip (L, channels): silent, not finite, clipped. One that is not finite counts as nothing else."""
    if not np.isfinite(audio).all():
        return False, True, False
    peak = float(np.abs(audio).max(initial=0))
    return peak < SILENT, False, peak > 1
