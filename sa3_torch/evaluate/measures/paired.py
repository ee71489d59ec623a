"""Compare two models on the same prompts: the mean difference and its interval, by drawing prompts again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from sa3_torch.train.run.random import Purpose, generator

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Hold a mean difference; ``low`` and ``high`` are its 95 % interval, ``prompts`` how many there were."""

    value: float
    low: float
    high: float
    prompts: int

    @property
    def clear(self) -> bool:
        """Return whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired_difference(
    first: ArrayLike, second: ArrayLike, prompts: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Difference:
    """Return the mean of ``first - second``, values (n,) of sounds of the same prompts, and its 95 % interval.

    Sounds of a prompt stay together, as they are no more independent than the prompt is. Raises ValueError for other
    sizes, or less than two prompts.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.shape != (len(prompts),):
        raise ValueError(
            f"values {a.shape} and {b.shape} of {len(prompts)} prompts: expected one of each for each sound"
        )
    names, group = np.unique(np.asarray(prompts), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"{len(names)} different prompt(s): at least 2 are needed for an interval")
    sums, counts = np.bincount(group, weights=a - b), np.bincount(group)
    drawn = generator(seed, Purpose.BOOTSTRAP).integers(0, len(names), (resamples, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Difference(value=float((a - b).mean()), low=float(low), high=float(high), prompts=len(names))
