"""Disturb commands for a moment, with the same faults each time; ``python -m tests.faults`` does it at length.

The campaign splits processes, which must not have computed yet, so it runs in one of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.known import is_open

ROOT = Path(__file__).resolve().parents[2]
QUICK = ("generate wav", "generate flac", "encode npy", "convert", "lora merge", "data import", "data shards")


def _campaign(folder: Path, faults: int, *arguments: str) -> None:
    table = folder / "faults.json"
    command = [sys.executable, "-m", "tests.faults", "--faults", str(faults), "--json", str(table), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert table.is_file(), done.stderr
    rows = json.loads(table.read_text())["rows"]
    assert len(rows) == faults
    new = [(row, words) for row in rows for kind, words in row["problems"] if not is_open(row["command"], kind)]
    assert not new, new


@pytest.mark.skipif(sys.platform != "linux", reason="frameworks survive the split of a process on Linux only")
def test_commands_that_are_disturbed_lose_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    _campaign(tmp_path, 21, *(word for name in QUICK for word in ("--only", name)))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="frameworks survive the split of a process on Linux only")
def test_all_commands_that_are_disturbed_lose_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    _campaign(tmp_path, 120)
