"""Hold out combinations: each is of a side, "train", "validation" or "test", by a hash of the seed and itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TypeVar

HELD_OUT = 0.05  # of all combinations, for validation, and as many for the test
REASONS = ("take", "combination", "wording")  # why a held-out clip is none of training's, in turn
_DRAWS = 10_000
_Found = TypeVar("_Found")


def side(seed: int, *combination: object) -> str:
    """Return the side of a combination such as ("melody", "piano", "A minor")."""
    digest = hashlib.sha256(repr((seed, combination)).encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    return "validation" if place < HELD_OUT else "test" if place < 2 * HELD_OUT else "train"


def draw_of_side(
    draw: Callable[[], _Found], combinations: Callable[[_Found], list[tuple[object, ...]]], seed: int, wanted: str
) -> _Found:
    """Draw until all combinations are training's, or, for a held-out side, one is of that side and none of the other.

    Raises RuntimeError where that never happens.
    """
    for _ in range(_DRAWS):
        found = draw()
        sides = {side(seed, *combination) for combination in combinations(found)}
        if wanted in sides and sides <= {"train", wanted}:
            return found
    raise RuntimeError(f"no combination of the side {wanted} was drawn for {combinations(draw())}")
