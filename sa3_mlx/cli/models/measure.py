"""Measure differences that several commands print."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def snr_db(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the signal-to-noise ratio of ``found`` in dB; inf when equal, -inf for a silent reference."""
    wanted = reference.astype(np.float64)
    noise = float(np.sum((found.astype(np.float64) - wanted) ** 2))
    signal = float(np.sum(wanted**2))
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else -float("inf")


def snr_text(reference: NDArray[np.float32], found: NDArray[np.float32]) -> str:
    """Return that ratio as text."""
    return f"{snr_db(reference, found):.2f} dB" if reference.any() else "not defined, as the reference is silent"


def relative_l2(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Return the relative L2 difference; inf when the shapes differ."""
    if reference.shape != found.shape:
        return float("inf")
    wanted = reference.astype(np.float64)
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-30))
