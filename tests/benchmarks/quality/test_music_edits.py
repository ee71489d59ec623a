"""Test ``python -m benchmarks music-edits``: what is kept stays, and judging the untouched clips finds their tempo."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the judge needs PyTorch")
from click.testing import CliRunner

from benchmarks.quality.music_edits import edits, music_edits
from sa3_mlx.assets import DEMO
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.pipeline import Pipeline
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, ClipSet, Draft, write_clips


def _line(bpm: float, split: str) -> Draft:
    """Eight plucked quarter notes A4 and C5 in turn."""
    t = np.arange(round(4 * SAMPLE_RATE)) / SAMPLE_RATE
    beat = t * bpm / 60
    hz = np.where(beat.astype(int) % 2, 523.25, 440.0)
    audio = (0.4 * np.sin(2 * np.pi * hz * t) * np.exp(-6 * (beat % 1))).astype(np.float32)
    return Draft(
        id=f"{split} {bpm:g}",
        captions=(f"piano note A4 {bpm:g}",),
        kind="line",
        label="melody",
        instrument="piano",
        midi=None,
        split=split,
        audio=np.stack([audio, audio], axis=1),
        fields={"bpm": bpm, "key": "a minor"},
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_clips(
        tmp_path / "set", [*(_line(bpm, "validation") for bpm in (100, 120)), _line(90, "train")], channels=2, about={}
    )
    return tmp_path / "set"


def test_tempo_key_and_seams_stand_beside_those_of_the_untouched_clips(data: Path) -> None:
    arguments = ["demo", "--backend", "torch", "--data", str(data), "--steps", "1"]
    result = CliRunner().invoke(music_edits, arguments, catch_exceptions=False)
    found = json.loads(result.output.splitlines()[-1])
    assert found["clips"] == 2 and found["sampling"] == "euler:1:1"
    assert found["kept"]["real"]["line tempo"]["value"] == 1.0
    assert {"inpainted", "extended", "real, second half", "extended, second half"} < found["kept"].keys()
    assert found["seams_db"].keys() == {"inpainted", "inpainted, untouched", "extended", "extended, untouched"}


def test_only_what_was_asked_for_is_made_anew(data: Path) -> None:
    clips = ClipSet(data)
    clip = clips.select("validation")[0]
    audio, sampling = clips.read(clip), Sampling(sampler="euler", steps=1)
    inpainted, extended = edits(Pipeline.load(DEMO), audio, clip, sampling, seed=1)
    third, half = len(audio) // 3, len(audio) // 2
    assert inpainted.shape == extended.shape == audio.shape
    for made, kept in ((inpainted, np.r_[:third, 2 * third + 1 : len(audio)]), (extended, np.r_[:half])):
        np.testing.assert_array_equal(made[kept], audio[kept])
        assert np.abs(made - audio).max() > 0.01
