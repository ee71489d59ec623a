"""Fuzz every reader for a moment, with the same inputs each time; ``python -m tests.fuzz`` does it at length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="the test extra is not installed")

from tests.fuzz.engine import Fuzzer, State
from tests.fuzz.known import is_open
from tests.fuzz.registry import targets
from tests.fuzz.target import Case

TARGETS = {name: target for name, target in targets().items() if not target.crashes}
FOUND = Path(__file__).with_name("found.jsonl")  # inputs that were read wrongly once


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs_are_read_or_refused(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fuzzer = Fuzzer(TARGETS[name], tmp_path)
    for line in FOUND.read_text(encoding="utf-8").splitlines() if FOUND.is_file() else ():
        data = json.loads(line)
        if data["target"] == name:
            fuzzer.read(Case.from_dict(data))
    result = fuzzer.run(seed=0, examples=40)
    capfd.readouterr()  # libraries for sounds print about damage
    new = [f"{f.signature}: {f.detail}" for f in result.findings.values() if not is_open(name, f.kind)]
    assert not new, new


def test_a_run_goes_on_where_the_one_before_stopped(tmp_path: Path) -> None:
    """Counts add up, the inputs are others, and those that reached new lines are damaged further."""
    target, path = TARGETS["regions"], tmp_path / "regions.json"
    drawn: list[Case] = []

    def part(name: str, examples: int) -> State:
        (tmp_path / name).mkdir()
        state = State.load(path, target.name)
        fuzzer = Fuzzer(target, tmp_path / name, state, watch=drawn.append, keep=lambda state: state.save(path))
        fuzzer.run(seed=3, examples=examples)
        return state

    first = part("first", 500)
    count = len(drawn)
    second = part("second", 50)
    assert (second.result.rounds, second.result.examples) == (11, 550) and second.result.seconds > first.result.seconds
    assert first.result.corpus > 1 and second.result.lines >= first.result.lines > 0
    corpus = first.corpus["input.txt"]
    again = drawn[count:]
    assert [case.data for case in again[: len(corpus)]] == corpus, "what reached new lines is read first"
    assert [case.data for case in drawn[1:51]] != [case.data for case in again[len(corpus) :]]
    assert State.load(path, target.name).corpus == second.corpus
