"""Test ``python -m benchmarks`` music-runs and seams on tiny models: everything is made and written down."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core", reason="the measurements are made with MLX")
pytest.importorskip("torch", reason="what the demo knows is named beside its training")

from click.testing import CliRunner

from benchmarks.music.pitches import heard, pitches, summary
from benchmarks.music.runs import measure, music_runs, runs
from benchmarks.music.seams import seams
from sa3_mlx.common.files.audio import write_audio
from sa3_torch.train.demo_set.sounds import INSTRUMENTS
from tests.support.command import tone
from tests.support.tiny import TINY


def test_every_feature_runs_once(random_models: dict[str, Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(runs, [str(random_models["tiny-s"]), "--steps", "1", "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())["runs"]
    assert [one["run"] for one in found] == [run.name for run in music_runs(TINY["tiny-s"])]
    assert all(one["exact_length"] and one["kept_exact"] in (True, None) and one["made_differs"] for one in found)
    assert sum(one["kept_exact"] is True for one in found) == 4
    assert all(one["cpu_seconds"] > 0 and one["peak_mb"] > 1 for one in found)


def test_a_wrong_length_and_a_kept_part_that_is_not_are_seen(random_models: dict[str, Path], tmp_path: Path) -> None:
    config, options = TINY["tiny-s"], ("--steps", "1", "--seed", "1", "--model", str(random_models["tiny-s"]))
    write_audio(tmp_path / "in.wav", tone(2.5), config.sample_rate, "pcm16")
    (run,) = (run for run in music_runs(config) if run.name == "extend, one run")
    wrong = measure(replace(run, seconds=3.1, words=(*run.words, "--no-paste")), config, options, tmp_path)
    assert not wrong.exact_length and wrong.kept_exact is False and wrong.made_differs
    with pytest.raises(ValueError, match=r"extend, one run: .*finite"):
        measure(replace(run, words=(*run.words[:-1], "nan")), config, options, tmp_path)


def test_seams_are_measured_beside_untouched_sounds(random_models: dict[str, Path], tmp_path: Path) -> None:
    options = ["--sounds", "2", "--steps", "1", "--results", str(tmp_path)]
    result = CliRunner().invoke(seams, [str(random_models["tiny-s"]), *options])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.iterdir()
    rows = {row["way"]: row for row in json.loads(file.read_text())["rows"]}
    untouched, cut = rows["untouched"], rows["untouched, at the cut"]
    assert untouched["level_more"] == untouched["moved_db"] == cut["step_more"] == 0
    assert [row["seams"] for row in rows.values()] == [4] * 8 + [2] * 3
    assert rows["hard cut"]["step"] > rows["feather 0 s"]["step"]
    assert rows["feather 0 s"]["moved_db"] > 0
    assert all(np.isfinite(value) for row in rows.values() for name, value in row.items() if name != "way")


def test_lost_pitches_are_counted() -> None:
    """Two seconds of an A, one of noise, one of a C, one of silence."""
    a, c = (np.sin(2 * np.pi * hz * np.arange(88_200) / 44_100)[:, None].repeat(2, 1) * 0.3 for hz in (440, 523.25))
    noise = np.random.default_rng(0).normal(0, 0.1, (44_100, 2))
    audio = np.concatenate([a, noise, c[:44_100], np.zeros((44_100, 2))]).astype(np.float32)
    found = heard(audio, 69, 44_100)
    assert found == ["asked"] * 4 + ["unclear"] * 2 + ["other"] * 2 + ["silent"] * 2
    shares = summary([found, ["asked"] * 10], 2)
    assert (shares["asked_first"], shares["asked_later"], shares["longest"]) == (1, 0.625, 3.0)
    assert shares["other"] == shares["unclear"] == shares["silent"] == 0.125


def test_the_pitch_of_long_notes_is_written_down(
    random_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For two instruments of the eight, which go alike."""
    played = [*INSTRUMENTS][:2]
    monkeypatch.setattr("benchmarks.music.pitches.INSTRUMENTS", played)
    options = ["--seconds", "66", "--seeds", "1", "--steps", "1", "--results", str(tmp_path)]
    result = CliRunner().invoke(pitches, [str(random_models["tiny-s"]), *options])
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    assert [row["instrument"] for row in rows] == played
    assert all(0 <= row["asked_later"] <= 1 for row in rows)
