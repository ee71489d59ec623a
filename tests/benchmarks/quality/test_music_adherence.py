"""Test ``python -m benchmarks music-adherence``: what is judged of a model, beside real clips, and of two models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the judge needs PyTorch")
from click.testing import CliRunner

from benchmarks.quality.music_adherence import music_adherence, with_intervals
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, Draft, write_clips


def _note(midi: int, split: str) -> Draft:
    t = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    audio = 0.3 * np.sin(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * t).astype(np.float32)
    return Draft(
        id=f"{split} {midi}",
        captions=(f"flute note {midi}",),
        kind="note",
        label="note",
        instrument="flute",
        midi=midi,
        split=split,
        audio=np.stack([audio, audio], axis=1),
    )


def test_a_model_is_judged_beside_real_clips_and_another_model(tmp_path: Path) -> None:
    drafts = [_note(midi, "validation") for midi in (60, 64, 67)] + [_note(62, "train")]
    write_clips(tmp_path / "set", drafts, channels=2, about={})
    arguments = ["demo", "--backend", "torch", "--data", str(tmp_path / "set"), "--against", "demo"]
    options = ["--clips", "3", "--seeds", "2", "--steps", "1", "--guidance", "1"]
    result = CliRunner().invoke(music_adherence, [*arguments, *options], catch_exceptions=False)
    found = json.loads(result.output.splitlines()[-1])
    assert found["prompts"] == 3 and found["seeds"] == 2
    assert found["real"]["note pitch"] == {"value": 1.0, "low": 1.0, "high": 1.0, "sounds": 3}
    assert found["model"].keys() == found["real"].keys() == {"note instrument", "note family", "note pitch"}
    assert found["model"]["note pitch"]["sounds"] == 6
    assert found["model"] == found["against"]
    assert all(row["value"] == row["low"] == row["high"] == 0 for row in found["difference"].values())


def test_what_one_prompt_asks_for_has_no_interval() -> None:
    rows = [("a", {"note pitch": True}), ("a", {"note pitch": False}), ("b", {"loop tempo": True})]
    assert with_intervals(rows) == {}
    found = with_intervals([*rows, ("b", {"note pitch": True})])
    assert found["note pitch"]["value"] == pytest.approx(2 / 3, abs=1e-3)
    assert found["note pitch"]["low"] == 0.5 and found["note pitch"]["high"] == 1.0
