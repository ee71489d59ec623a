"""Measure the Frechet distance between two sets of clips in a feature space, its interval, and the floor of real clips.

The estimate grows as clips get fewer: compare values of equally many clips, and read them beside the floors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sa3_torch.train.run.random import Purpose, generator

Float = NDArray[np.float64]

ENOUGH = 384  # clips of either set [T12.2]
RESAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class Frechet:
    """Hold a distance: ``low`` and ``high`` are its 95 % interval, ``clips`` the size of the smaller set."""

    value: float
    low: float
    high: float
    clips: int

    @property
    def enough(self) -> bool:
        """Return whether the smaller set has at least ENOUGH clips."""
        return self.clips >= ENOUGH


def frechet(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Return the squared Frechet distance of the normal distributions of two sets (n, D), in float64 by eigenvalues.

    It is |mean a - mean b|^2 + tr(A) + tr(B) - 2 tr((A^1/2 B A^1/2)^1/2). Raises ValueError for less than two clips.
    """
    if min(len(a), len(b)) < 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"Frechet distance of {a.shape} and {b.shape}: expected two sets (n, D) of at least 2 clips")
    a, b = a.astype(np.float64), b.astype(np.float64)
    first, second = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ second @ root)
    mean = np.square(a.mean(axis=0) - b.mean(axis=0)).sum()
    return float(mean + np.trace(first) + np.trace(second) - 2 * np.sqrt(np.maximum(shared, 0)).sum())


def frechet_with_interval(
    a: NDArray[np.floating], b: NDArray[np.floating], *, resamples: int = RESAMPLES, seed: int = 0
) -> Frechet:
    """Return the distance and its 95 % interval.

    Both sets are resampled, and the resampled distances, which lie too high because clips repeat in them, are moved so
    that their median is the distance.
    """
    value, rng = frechet(a, b), generator(seed, Purpose.BOOTSTRAP)
    drawn = np.array(
        [frechet(a[rng.integers(0, len(a), len(a))], b[rng.integers(0, len(b), len(b))]) for _ in range(resamples)]
    )
    low, high = np.percentile(drawn - np.median(drawn), [2.5, 97.5]) + value
    return Frechet(value=value, low=max(float(low), 0.0), high=float(high), clips=min(len(a), len(b)))


def equal_floor(real: NDArray[np.floating], clips: int, *, repeats: int = 10, seed: int = 0) -> float:
    """Return the distance that ``clips`` real clips have to as many others, the mean over random draws of (n, D).

    It is what a perfect model of ``clips`` sounds would be measured at against as many clips. Raises ValueError where
    there are less than twice as many.
    """
    if not 2 <= clips <= len(real) // 2:
        raise ValueError(f"{clips} clips of {len(real)}: from 2 to half of them can be compared with others")
    rng = generator(seed, Purpose.HALVES, clips)
    orders = [rng.permutation(len(real)) for _ in range(repeats)]
    return float(np.mean([frechet(real[order[:clips]], real[order[clips : 2 * clips]]) for order in orders]))
