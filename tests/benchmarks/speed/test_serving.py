"""The measurement of a server runs and says what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("fastapi")

from benchmarks.speed.serving import serving
from tests.support.command import use_home


def test_a_server_is_measured(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_home(shared_home, monkeypatch)
    model = str(shared_home / "models" / "little")
    done = CliRunner().invoke(serving, ["--model", model, "--backend", "mlx", "--seconds", "0.3", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.output.splitlines()[-1])
    assert set(result) >= {"process", "first", "second", "first_sound", "queue_full_each"}
    assert all(value > 0 for value in result.values() if isinstance(value, float)), result
