"""``first-hour`` runs the commands of a new user against files that it serves, and keeps what they took."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.peer.first_hour import first_hour
from tests.support.foreign.port_files import PORT, write_port_files

pytest.importorskip("mlx.core")


def test_a_new_user_gets_a_model_and_two_sounds(tmp_path: Path) -> None:
    files = write_port_files(tmp_path / "files", replace(PORT["tiny-s"], name="sm-music"))
    options = ["--files", files, "--work", tmp_path / "work", "--results", tmp_path / "results"]
    done = CliRunner().invoke(first_hour, [*map(str, options), "--seconds", "0.5", "--steps", "1"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    (path,) = (tmp_path / "results").iterdir()
    result = json.loads(path.read_text())
    assert [wait["command"] for wait in result["waits"]] == ["sa3 get", "sa3 generate", "sa3 generate"]
    assert result["waits"][0]["phases"].keys() == {"fetch", "convert"}
    assert all(wait["peak_bytes"] > 1e7 and wait["cpu_seconds"] > 0 for wait in result["waits"])
    assert {path.name for path in (tmp_path / "work").glob("*.wav")} == {"1.wav", "2.wav"}


def test_a_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(first_hour, ["--files", str(tmp_path), "--results", str(tmp_path)])
    assert done.exit_code == 2 and "no dit_sm-music_f16.npz there" in done.output
