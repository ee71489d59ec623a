"""Fuzz every reader for a moment, with the same inputs each time; ``python -m tests.fuzz`` does it at length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="the test extra is not installed")

from tests.fuzz.engine import Fuzzer
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
