"""Test ``python -m benchmarks music-set`` on a few clips of which everything is known."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("torch")
from click.testing import CliRunner

from benchmarks.quality.music_set import music_set
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, Draft, write_clips


def _tone(midi, seconds=1.0):
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return sum(np.sin(2 * np.pi * k * 440 * 2 ** ((midi - 69) / 12) * t) / k**1.5 for k in (1, 2, 3)) * np.exp(-t)


def _beat(bpm):
    out = np.zeros(6 * SAMPLE_RATE)
    for i in range(int(6 * bpm / 30)):
        start = round(i * 30 / bpm * SAMPLE_RATE)
        hit = (
            np.random.default_rng(i).standard_normal(3000)
            * np.exp(-np.arange(3000) / 400)
            * (1.0 if i % 2 == 0 else 0.3)
        )
        out[start : start + 3000] += hit[: len(out) - start]
    return out


def _draft(name, kind, audio, split, *, pan=1.0, midi=None, **fields):
    audio = 0.5 * audio / np.abs(audio).max()
    return Draft(
        id=name,
        captions=(f"{kind} {fields}", "a sound"),
        kind=kind,
        label=kind,
        instrument="piano" if kind in ("note", "chord") else None,
        midi=midi,
        split=split,
        audio=np.stack([audio, pan * audio], axis=1).astype(np.float32),
        fields=fields,
    )


def test_it_counts_hears_and_finds_what_is_shared(tmp_path):
    drafts = [
        _draft("one", "note", _tone(60), "train", midi=60),
        _draft("equal", "note", _tone(60), "train", midi=60),
        _draft("shared", "note", _tone(60), "validation", midi=60),
        _draft("right", "note", _tone(45), "validation", midi=45, pan=0.5),
        _draft("wrong", "note", _tone(64), "validation", midi=65),
        _draft("chord", "chord", _tone(48) + _tone(52) + _tone(55), "validation", chord="C major"),
        _draft("loop", "loop", _beat(120), "validation", style="rock", bpm=120),
        _draft("late", "loop", _beat(110), "validation", style="rock", bpm=120),
    ]
    write_clips(tmp_path / "set", drafts, channels=2, about={})
    write_clips(tmp_path / "test", [_draft("t", "note", _tone(45), "validation", pan=0.5)], channels=2, about={})
    arguments = [str(tmp_path / "set"), "--test", str(tmp_path / "test"), "--picture", str(tmp_path / "sheet.png")]
    result = CliRunner().invoke(music_set, arguments, catch_exceptions=False)
    found = json.loads(result.output.splitlines()[-1])
    assert found["clips"] == {"train": 2, "validation": 6, "note": 5, "chord": 1, "loop": 2}
    assert found["captions"] == 16 and found["different_captions"] == 4
    assert found["sides"] == {"equal_in_train": 1, "train_validation": 1, "train_test": 0, "validation_test": 1}
    assert found["floors"]["note"] == {"clips": 3, "pitch": pytest.approx(2 / 3, abs=1e-3)}
    assert found["floors"]["chord"] == {"clips": 1, "chord": 1.0, "root": 1.0}
    assert found["floors"]["loop"]["tempo"] == 0.5
    assert found["peak_db"] == [-6.0, -6.0, -6.0] and found["correlation"]["note"] == 1.0
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
