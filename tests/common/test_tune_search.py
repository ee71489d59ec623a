"""The search for the fastest right way, with a bench whose clock and numbers are made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle

import numpy as np
import pytest

from sa3_mlx.common.tuning.choice import Choice, Choices, Work
from sa3_mlx.common.tuning.search import Found, Search, Trial, bound
from sa3_mlx.common.tuning.timing import Times, interleaved

SUM = Choice(
    name="sum",
    about="",
    ways=("plain", "fast", "wrong", "broken"),
    usual={"cpu": "plain", "gpu": "fast"},
    work=("step",),
    tolerance=1e-5,
)
PRODUCT = Choice(
    name="product",
    about="",
    ways=("plain", "half"),
    usual={"cpu": "plain", "gpu": "plain"},
    work=("step", "decode"),
    asked={"half": 1e-2},
)
LIMITS = Choice(
    name="limits",
    about="",
    ways=("small", "large"),
    usual={"cpu": "small", "gpu": "small"},
    work=("decode",),
    environment={"small": {"MLX_TEST": "1"}, "large": {"MLX_TEST": "2"}},
)


@dataclass
class FakeBench:
    """Numbers and seconds of every way as the test says; what is not said is exact and takes no time."""

    choices: Choices
    errors: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    noise: Sequence[float] = (0.0,)
    elsewhere: Sequence[str] = ()  # places that this model does not pass
    environment: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[Work, str] = field(default_factory=lambda: {"step": "float32", "decode": "float32"})

    def __post_init__(self) -> None:
        self._noise = cycle(self.noise)

    @property
    def timed(self) -> Sequence[Work]:
        return list(self.dtypes)

    def _now(self) -> list[str]:
        ways = [f"{name} {self.choices.way(name)}" for name in self.choices.places if name not in self.elsewhere]
        return ways + [f"{name} {value}" for name, value in self.environment.items()]

    def results(self, works: Sequence[Work]) -> list[np.ndarray]:
        if "sum broken" in self._now():
            raise RuntimeError("no kernel for this shape\nmore lines")
        return [np.full(4, 1 + sum(self.errors.get(way, 0.0) for way in self._now()), np.float32) for _ in works]

    def seconds(self, works: Sequence[Work]) -> float:
        cost = 1 + sum(self.costs.get(way, 0.0) for way in self._now())
        return len(works) * cost + next(self._noise)

    def fresh(self, ways: Mapping[str, str], environment: Mapping[str, str]) -> FakeBench:  # noqa: ARG002
        return replace(self, environment=environment)


def _search(bench: FakeBench, allowed: Mapping[str, str] | None = None) -> tuple[Found, list[Trial]]:
    trials: list[Trial] = []
    search = Search(
        bench.choices, bench, allowed=allowed or {}, impossible=lambda _place, _way: None, report=trials.append
    )
    return search.run(rounds=lambda _seconds: 5), trials


def _verdicts(trials: Sequence[Trial]) -> dict[str, str]:
    return {f"{trial.place} {trial.way}": trial.verdict for trial in trials}


def test_a_faster_right_way_is_kept() -> None:
    bench = FakeBench(Choices("mlx", "cpu", (SUM, PRODUCT)), {"sum fast": 1e-6}, {"sum fast": -0.2})
    found, trials = _search(bench)
    assert found.ways == {"sum": "fast"} and found.environment == {}
    assert _verdicts(trials)["sum fast"] == "kept"
    assert (found.before.median, found.after.median) == (pytest.approx(2.0), pytest.approx(1.6))
    assert bench.choices.way("sum") == "plain", "the search leaves the ways as they were"


def test_a_wrong_way_is_dropped_however_fast() -> None:
    found, trials = _search(FakeBench(Choices("mlx", "cpu", (SUM,)), {"sum wrong": 1e-2}, {"sum wrong": -0.9}))
    assert found.ways == {}
    assert _verdicts(trials)["sum wrong"] == "dropped: error 1.0e-02 of step, allowed are 1.0e-05"


def test_numbers_that_are_not_finite_are_wrong() -> None:
    found, trials = _search(FakeBench(Choices("mlx", "cpu", (SUM,)), {"sum wrong": np.nan}, {"sum wrong": -0.9}))
    assert found.ways == {} and _verdicts(trials)["sum wrong"].startswith("dropped: error inf")


def test_a_raising_way_is_dropped_in_one_line() -> None:
    _, trials = _search(FakeBench(Choices("mlx", "cpu", (SUM,))))
    assert _verdicts(trials)["sum broken"] == "dropped: RuntimeError no kernel for this shape"


def test_a_win_within_the_spread_is_none() -> None:
    noise = (0.0, 0.1, 0.2, 0.05, 0.3, 0.15, 0.25)
    found, trials = _search(FakeBench(Choices("mlx", "cpu", (SUM,)), {}, {"sum fast": -0.05}, noise))
    assert found.ways == {} and _verdicts(trials)["sum fast"] in ("slower", "no faster than the spread")


def test_a_win_of_less_than_one_in_a_hundred_changes_no_bits() -> None:
    found, trials = _search(FakeBench(Choices("mlx", "cpu", (SUM,)), {}, {"sum fast": -0.005}))
    assert found.ways == {} and _verdicts(trials)["sum fast"] == "no faster than the spread"


def test_a_wrong_usual_way_gives_place_to_the_plain_form() -> None:
    found, trials = _search(FakeBench(Choices("mlx", "gpu", (SUM,)), {"sum fast": 1e-2}, {"sum fast": -0.5}))
    assert found.ways == {"sum": "plain"}
    assert _verdicts(trials)["sum fast"].startswith("dropped")


def test_a_device_that_never_gives_the_same_bits_keeps_its_usual_ways() -> None:
    class Noisy(FakeBench):
        def results(self, works: Sequence[Work]) -> list[np.ndarray]:
            return [np.full(4, 1 + 1e-3 * next(self._noise), np.float32) for _ in works]

    limits = replace(LIMITS, usual={"cpu": "large"})
    bench = Noisy(Choices("mlx", "cpu", (limits,)), {}, {"MLX_TEST 2": -0.3}, noise=(0.0, 1.0, 2.0))
    found, trials = _search(bench)
    assert (found.ways, found.environment) == ({}, {})
    assert all(trial.verdict.startswith("dropped") for trial in trials)


def test_what_must_be_asked_for_is_tried_when_it_is() -> None:
    bench = FakeBench(Choices("mlx", "cpu", (PRODUCT,)), {"product half": 5e-3}, {"product half": -0.5})
    found, trials = _search(bench)
    assert found.ways == {} and trials == []
    found, trials = _search(bench, {"product": "half"})
    assert found.ways == {"product": "half"}


def test_settings_of_a_new_process_are_timed_there() -> None:
    found, trials = _search(FakeBench(Choices("mlx", "cpu", (LIMITS,)), {}, {"MLX_TEST 2": -0.3}))
    assert found.ways == {} and found.environment == {"MLX_TEST": "2"}
    assert _verdicts(trials) == {"limits small": "usual", "limits large": "kept"}
    found, trials = _search(FakeBench(Choices("mlx", "cpu", (LIMITS,)), {"MLX_TEST 2": 1e-6}, {"MLX_TEST 2": -0.3}))
    assert found.environment == {} and _verdicts(trials)["limits large"].startswith("dropped"), "same bits or none"


def test_places_that_a_model_does_not_pass_are_left_out() -> None:
    found, trials = _search(FakeBench(Choices("mlx", "cpu", (SUM,)), elsewhere=("sum",)))
    assert found.ways == {} and _verdicts(trials) == {"sum any": "left out: this model does not pass here"}


def test_errors_may_add_up_and_no_more() -> None:
    """Two ways that are right by themselves and wrong together."""
    other = replace(SUM, name="other", ways=("plain", "fast"))
    choices = Choices("mlx", "cpu", (SUM, other))

    class Meeting(FakeBench):
        def results(self, works: Sequence[Work]) -> list[np.ndarray]:
            both = {"sum fast", "other fast"} <= set(self._now())
            return [np.full(4, 1.5 if both else 1.0, np.float32) for _ in works]

    costs = {"sum fast": -0.2, "other fast": -0.2, "sum wrong": 9}
    found, trials = _search(Meeting(choices, {}, costs))
    assert found.ways == {} and trials[-1].verdict.startswith("dropped: error 5.0e-01 of step")


def test_ways_that_are_slower_together_are_dropped() -> None:
    other = replace(SUM, name="other", ways=("plain", "fast"))
    choices = Choices("mlx", "cpu", (SUM, other))

    class Meeting(FakeBench):
        def seconds(self, works: Sequence[Work]) -> float:
            return super().seconds(works) * (3 if len(works) == 2 and "sum fast" in self._now() else 1)

    found, trials = _search(Meeting(choices, {}, {"sum fast": -0.2}))
    assert found.ways == {} and trials[-1].verdict == "dropped: slower together"


def test_sixteen_bits_have_roundings_of_their_own() -> None:
    assert bound(SUM, "fast", "float32") == 1e-5
    assert bound(SUM, "fast", "float16") == pytest.approx(3e-2)
    assert bound(replace(SUM, tolerance=0.0), "fast", "float16") == 0, "the same bits in any type"
    assert bound(PRODUCT, "half", "float32") == 1e-2


def test_a_win_wins_most_rounds() -> None:
    """Medians far apart with a small spread, and yet every other round the other way was faster."""
    usual = Times((2.0, 1.0, 2.0, 1.0, 2.0))
    assert not Times((1.0, 1.9, 1.0, 1.9, 1.0)).beats(Times((1.9, 1.8, 1.9, 1.8, 1.9)))
    assert Times((0.5, 0.6, 0.5, 0.6, 0.5)).beats(Times((1.9, 1.8, 1.9, 1.8, 1.9)))
    assert not usual.beats(usual)


def test_ways_are_timed_in_turn_forth_and_back() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    times = interleaved({"a": lambda: run("a"), "b": lambda: run("b")}, 2)
    assert order == ["a", "b", "b", "a"]
    assert times["a"] == Times((1.0, 4.0)) and times["a"].median == 2.5
    assert times["b"].spread == pytest.approx(0.5)
