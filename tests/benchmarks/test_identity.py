"""How far trainings of two checkouts differ is read from their logs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.identity import losses


def write_log(folder: Path, *rows: dict[str, object]) -> None:
    log = folder / "train" / "pretrain" / "run" / "log.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_largest_distance_of_two_logs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of terms, and of all that is logged; what is timed or told, and what one log lacks, is left out."""
    old, new = tmp_path / "old", tmp_path / "new"
    write_log(old, {"step": 0, "revision": "a"}, {"step": 3, "flow": 2.0, "grad_norm/dit": -1.0, "items_per_second": 1})
    write_log(new, {"step": 0, "revision": "b"}, {"step": 3, "flow": 1.5, "grad_norm/dit": 1.0, "items_per_second": 9})
    assert losses(old, new, only="") == 0
    assert capsys.readouterr().out == (
        "pretrain: 2 values, largest relative difference of terms 2.5e-01 (flow of step 3), of all 2.0e+00 "
        "(grad_norm/dit of step 3)\n"
    )
    assert losses(old, new, only="clap") == 1
