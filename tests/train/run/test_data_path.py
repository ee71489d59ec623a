"""The measurement of the data path reads what a process of a full-scale preset reads."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from click.testing import CliRunner

from benchmarks.speed import data_path as measured


@pytest.mark.parametrize("preset", measured.MADE)
def test_every_preset_is_measured_and_the_last_line_is_json(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"LONG": 2, "ITEMS": 200, "FRAMES": 64, "CLIPS": 2, "CLIP_SECONDS": 6, "TRACKS": 2, "TRACK_SECONDS": 47}
    for name, value in small.items():
        monkeypatch.setattr(measured, name, value)
    if preset.startswith("same-l"):
        pytest.importorskip("webdataset", reason="the training extra is not installed")
    done = CliRunner().invoke(measured.data_path, ["--preset", preset, "--steps", "1"], catch_exceptions=False)
    found = json.loads(done.output.splitlines()[-1])
    assert done.exit_code == 0 and found["preset"] == preset
    of_stage_0 = dict.fromkeys(("autoencoder-same-l", "same-l-tracks", "same-l-pieces"), 9)
    assert found["items"] == {"clap": 128, **of_stage_0}.get(preset, 32)
    assert 0 < found["cpu_seconds"] <= found["most_cpu_seconds"] and found["noise_values"] > 0
