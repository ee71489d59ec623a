"""Which of several sounds is the best: by a latent CLAP among those that passed the checks, or by the checks."""

from __future__ import annotations

import pytest

from sa3_mlx.common.measures.choice import Grade, best
from sa3_mlx.common.schema import ConfigError


def graded(clap: float | None = None, **checks: float) -> Grade:
    total = 1.0
    for value in checks.values():
        total *= value
    return Grade(total=total, checks=checks, clap=clap)


@pytest.mark.parametrize(
    ("grades", "wanted"),
    [
        ([graded(sound=1, length=0.5), graded(sound=1, length=0.9), graded(sound=0, length=1)], 1),
        ([graded(sound=0, clipping=0.2), graded(sound=0, clipping=0.9)], 1),  # where all fail, the other checks decide
        ([graded(0.1, sound=1, length=1), graded(0.3, sound=1, length=0.2), graded(0.2, sound=1, length=1)], 1),
        ([graded(0.1, sound=1, clipping=1), graded(0.9, sound=0, clipping=1)], 0),  # silent
        ([graded(0.1, sound=1, clipping=1), graded(0.9, sound=1, clipping=0)], 0),  # clipped
        ([graded(0.1, sound=1, joint=0.5), graded(0.9, sound=1, joint=0.19)], 0),  # a loop that does not join
        ([graded(0.1, sound=1, joint=0.5), graded(0.9, sound=1, joint=0.2)], 1),
        ([graded(-0.5, sound=1), graded(0.9, sound=0), graded(-0.2, sound=1)], 2),
        ([graded(0.9, sound=0, clipping=0.1), graded(0.1, sound=0, clipping=1)], 1),
        ([graded(0.5, sound=1), graded(0.5, sound=1)], 0),
    ],
)
def test_the_best_one(grades: list[Grade], wanted: int) -> None:
    assert best(grades) == wanted


def test_tags_hold_a_cosine_where_there_is_one() -> None:
    assert "clap" not in graded(sound=1).to_dict()
    stored = graded(0.25, sound=1).to_dict()
    assert stored["clap"] == 0.25 and Grade.from_dict(stored) == graded(0.25, sound=1)
    with pytest.raises(ConfigError, match="clap is nan: expected a number"):
        graded(float("nan"), sound=1)
