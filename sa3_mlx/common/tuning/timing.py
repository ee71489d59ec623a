"""Compare times of several ways to do the same work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

MOST = 0.8  # share of the rounds, in each of which both ways met the same machine, that a win must win
LEAST = 0.01  # share of the time that a win must save: bits are not changed for less


@dataclass(frozen=True)
class Times:
    """Hold seconds of several runs of one way."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the time that half of the runs stay below."""
        return float(np.median(self.values))

    @property
    def spread(self) -> float:
        """Return the width of the middle half of the runs."""
        low, high = np.percentile(self.values, (25, 75))
        return float(high - low)

    def text(self) -> str:
        """Return median and spread for people."""
        return f"{self.median * 1000:.1f} ms (spread {self.spread * 1000:.1f})"

    def beats(self, other: Times) -> bool:
        """Tell whether this is faster by more than the spread of both, by one part in a hundred, and in most rounds."""
        gain, rounds = other.median - self.median, list(zip(self.values, other.values, strict=True))
        won = sum(mine < theirs for mine, theirs in rounds) / len(rounds)
        return gain > max(self.spread, other.spread) and gain >= LEAST * other.median and won >= MOST


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Times]:
    """Time several ways in turn, forth and back, so that a machine that gets hot or busy meets all of them.

    Every run returns the seconds that it took.
    """
    values: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
            values[name].append(runs[name]())
    return {name: Times(tuple(seconds)) for name, seconds in values.items()}
