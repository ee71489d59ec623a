"""How often items and captions are drawn."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.schema import Config
from sa3_torch.train.run.settings import check

CANONICAL = 0.6  # how often the first caption is drawn


@dataclass(frozen=True, kw_only=True)
class SharesConfig(Config):
    """How often each kind of clip is drawn, whatever its number of clips; kinds without clips do not count."""

    note: float
    chord: float
    drum: float
    noise: float
    sample: float  # one-shots without captions
    user: float  # imported recordings
    line: float = 0.0  # melodies, arpeggios, bass lines
    loop: float = 0.0
    music: float = 0.0  # arrangements
    effect: float = 0.0

    def __post_init__(self) -> None:
        check(self, 0, math.inf, *(field.name for field in fields(self)))


def draw_weights(kinds: Sequence[str], shares: Mapping[str, float] | None) -> NDArray[np.float64]:
    """Return the probability of each item: its kind's share over the items of that kind; ``shares`` None: all alike.

    Raises ValueError when the items have a kind that ``shares`` does not name, and when theirs are all 0; a share
    without items is ignored.
    """
    if not kinds:
        raise ValueError("no items to draw from")
    if shares is None:
        return np.full(len(kinds), 1 / len(kinds))
    unknown = sorted(set(kinds) - set(shares))
    if unknown:
        raise ValueError(f"no share given for kind(s) {', '.join(unknown)}; given: {', '.join(sorted(shares))}")
    counts = Counter(kinds)
    weights = np.array([shares[kind] / counts[kind] for kind in kinds])
    if not weights.sum() > 0:
        raise ValueError(f"the shares of {', '.join(sorted(counts))} are all 0; raise one")
    return np.asarray(weights / weights.sum())


def draw_caption(captions: Sequence[str], rng: np.random.Generator) -> str:
    """Draw the canonical caption 60 % of the time, an alternative otherwise; "" where there is none. Two draws."""
    pick, canonical = int(rng.integers(1, max(len(captions), 2))), rng.random() < CANONICAL
    if not captions:
        return ""
    return captions[0] if canonical or len(captions) == 1 else captions[pick]


def draw_parts(parts: Sequence[str], rng: np.random.Generator) -> str:
    """Draw parts of a caption, in random order, each with probability 1/2, at least one [T4.1]."""
    kept = np.flatnonzero(rng.random(len(parts)) < 0.5)
    if not len(kept):
        kept = rng.integers(len(parts), size=1)
    return ", ".join(parts[i] for i in rng.permutation(kept))
