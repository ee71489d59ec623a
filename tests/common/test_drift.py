"""Drift of long pieces, on sounds whose level, brightness and statistics are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.common.files.drift_picture import save_drift
from sa3_mlx.common.measures.drift import DriftMeter

RATE = 8192


def sine(hertz: float, seconds: float, amplitude: float) -> np.ndarray:
    wave = amplitude * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE)
    return np.stack([wave, wave], axis=1).astype(np.float32)


def test_level_and_centroid_of_each_span() -> None:
    """-6.02 dB of amplitude, 3.01 dB of the sine; a Hann window smears a partial by less than 1 Hz on average."""
    meter = DriftMeter(RATE, 512, span_seconds=4.0)
    audio = np.concatenate([sine(500, 4, 0.5), sine(2000, 4, 0.25), np.zeros((4 * RATE, 2), np.float32)])
    for start in range(0, len(audio), 1000):  # in pieces that fit nothing
        meter.add_audio(audio[start : start + 1000])
    rows = meter.rows()
    assert [row.start for row in rows] == [0, 4, 8]
    assert [row.level_db for row in rows] == pytest.approx([-9.03, -15.05, -120], abs=0.02)
    assert [row.centroid_hz for row in rows] == pytest.approx([500, 2000, 0], abs=2)


def test_statistics_of_latents() -> None:
    rng = np.random.default_rng(1)
    meter = DriftMeter(RATE, 512, span_seconds=32.0)  # 512 frames
    meter.add_audio(sine(500, 64, 0.5))
    first, second = rng.normal(0, 1, (512, 8)), rng.normal(2, 3, (512, 8))
    for part in np.split(np.concatenate([first, second]), [100, 700, 701]):
        meter.add_latents(part)
    one, two = meter.rows()
    assert one.mean == pytest.approx(first.mean()) and one.spread == pytest.approx(first.std(axis=0).mean())
    assert two.mean == pytest.approx(second.mean()) and two.spread == pytest.approx(second.std(axis=0).mean())
    expected = [(second.mean(0) - first.mean(0)) ** 2, (second.std(0) - first.std(0)) ** 2]
    assert one.moved == 0 and two.moved == pytest.approx(np.sqrt(np.mean(expected)))


def test_spans_are_joined_to_a_short_table() -> None:
    meter = DriftMeter(RATE, 512, span_seconds=1.0)
    for amplitude in (0.5, 0.25) * 10:
        meter.add_audio(sine(512, 1, amplitude))
        meter.add_latents(np.full((16, 4), amplitude))
    assert len(meter.rows()) == 20
    short = meter.rows(10)
    assert [row.start for row in short] == list(range(0, 20, 2))
    level = 10 * np.log10((0.5**2 + 0.25**2) / 4)
    assert {round(row.level_db, 2) for row in short} == {round(float(level), 2)}
    assert all(row.moved == 0 and row.mean == 0.375 and row.spread == 0.125 for row in short)


def test_a_picture(tmp_path: Path) -> None:
    meter = DriftMeter(RATE, 512, span_seconds=1.0)
    meter.add_audio(sine(512, 3, 0.5))
    save_drift(tmp_path / "a.png", {"": meter.rows()}, title="雨 (seed 1)")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert DriftMeter(RATE, 512).rows() == []
