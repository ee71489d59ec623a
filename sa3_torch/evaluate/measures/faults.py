"""Count clips that are wrong by their samples: silent, not finite, beyond full scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SILENT = 1e-4  # peak below which a clip is silent


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Hold shares of clips; ``clipped``: those with any sample beyond full scale."""

    silent: float
    not_finite: float
    clipped: float


def faults(found: Sequence[tuple[bool, bool, bool]]) -> Faults:
    """Return the shares of what ``clip_faults`` says of every clip. Raises ValueError without clips."""
    if not found:
        raise ValueError("no clips to examine")
    silent, broken, clipped = np.array(found, dtype=np.float64).mean(axis=0).tolist()
    return Faults(silent=silent, not_finite=broken, clipped=clipped)


def clip_faults(audio: NDArray[np.floating]) -> tuple[bool, bool, bool]:
    """Return whether a clip (L, channels) is silent, not finite, clipped; one not finite counts as nothing else."""
    if not np.isfinite(audio).all():
        return False, True, False
    peak = float(np.abs(audio).max(initial=0))
    return peak < SILENT, False, peak > 1
