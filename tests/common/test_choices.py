"""Places with several ways: what the user said, else what was tuned, else the usual way."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sa3_mlx.common.tuning.choice import Choice, Choices
from sa3_mlx.common.tuning.threads import thread_counts

PLACES = (
    Choice(
        name="sum", about="", ways=("plain", "fast", "rough"), usual={"cpu": "plain", "gpu": "fast"}, work=("step",)
    ),
    Choice(
        name="product",
        about="",
        ways=("plain", "half"),
        usual={"cpu": "plain", "gpu": "plain"},
        work=("decode",),
        asked={"half": 1e-3},
    ),
)


def test_the_usual_way_is_that_of_the_device() -> None:
    assert Choices("mlx", "cpu", PLACES).way("sum") == "plain"
    assert Choices("mlx", "gpu", PLACES).way("sum") == "fast"


def test_words_of_the_user_go_before_what_was_tuned() -> None:
    choices = Choices("mlx", "cpu", PLACES)
    with choices.tuned({"sum": "fast"}):
        assert choices.way("sum") == "fast"
        with choices.using({"sum": "rough", "product": "half"}):
            assert (choices.way("sum"), choices.way("product")) == ("rough", "half")
        assert (choices.way("sum"), choices.way("product")) == ("fast", "plain")
        choices.use("sum", "rough")
    assert choices.way("sum") == "rough"


def test_ways_end_with_their_block_also_after_an_error() -> None:
    choices = Choices("mlx", "cpu", PLACES)
    refused = pytest.raises(ValueError, match=r"^sum is 'slow': allowed are plain, fast, rough$")
    with refused, choices.using({"product": "half", "sum": "slow"}):
        pass
    with pytest.raises(RuntimeError), choices.tuned({"sum": "fast"}):
        raise RuntimeError
    assert (choices.way("sum"), choices.way("product")) == ("plain", "plain")


def test_a_setting_of_the_process_is_made_when_its_way_changes() -> None:
    made: list[str] = []
    threads = Choice(
        name="threads", about="", ways=("all", "one"), usual={"cpu": "all"}, work=("step",), apply=made.append
    )
    choices = Choices("mlx", "cpu", (*PLACES, threads))
    with choices.tuned({"threads": "one"}), choices.using({"sum": "fast"}):
        assert made == ["one"]
    assert made == ["one", "all"]


def test_a_setting_of_a_new_process_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Choice(
        name="limits",
        about="",
        ways=("usual", "large"),
        usual={"cpu": "usual"},
        work=("step",),
        environment={"large": {"SA3_TEST_LIMIT": "200"}},
    )
    choices = Choices("mlx", "cpu", (limits,))
    assert choices.way("limits") == "usual"
    with pytest.raises(ValueError, match="limits is settled when a process begins: large needs SA3_TEST_LIMIT=200"):
        choices.use("limits", "large")
    monkeypatch.setenv("SA3_TEST_LIMIT", "200")
    assert Choices("mlx", "cpu", (limits,)).way("limits") == "large"


def test_threads_worth_a_try() -> None:
    assert thread_counts(1) == {"all": 1}
    assert thread_counts(2) == {"all": 2, "one": 1}
    assert thread_counts(16) == {"all": 16, "half": 8, "one": 1}


def test_places_that_are_passed_are_told() -> None:
    choices = Choices("mlx", "cpu", PLACES)
    with choices.watching() as met, choices.using({"sum": "fast"}):
        choices.way("sum")
    choices.way("product")
    assert met == {"sum"}


def test_ways_by_which_bits_may_differ() -> None:
    places = (replace(PLACES[0], tolerance=1e-6), PLACES[1], replace(PLACES[0], name="order"))
    choices = Choices("mlx", "gpu", places)
    assert choices.differing({"sum": "fast", "order": "plain"}) == {}, (
        "the usual way on a GPU, and one of the same bits"
    )
    assert choices.differing({"sum": "plain", "product": "half"}) == {"sum": "plain", "product": "half"}


def test_unknown_names_are_refused_in_one_line() -> None:
    choices = Choices("mlx", "cpu", PLACES)
    for ask in (lambda: choices.way("rest"), lambda: choices.use("rest", "plain")):
        with pytest.raises(ValueError, match=r"^no place is called 'rest': there are sum, product$"):
            ask()


def test_a_way_to_be_asked_for_is_not_the_usual_one() -> None:
    with pytest.raises(ValueError, match="must ask for"):
        Choice(name="a", about="", ways=("b",), usual={"cpu": "b"}, work=("step",), asked={"b": 1.0})
    with pytest.raises(ValueError, match="allowed are b"):
        Choice(name="a", about="", ways=("b",), usual={"cpu": "c"}, work=("step",))
