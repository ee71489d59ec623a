"""Spectrograms: levels and places of known sounds, and a readable picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.common.files.spectrogram import save_spectrogram, spectrogram

RATE = 22050


def _sine(frequency: float, seconds: float = 1.0, level: float = 1.0) -> np.ndarray:
    time = np.arange(int(seconds * RATE)) / RATE
    return np.repeat((level * np.sin(2 * np.pi * frequency * time))[:, None], 2, axis=1).astype(np.float32)


@pytest.mark.parametrize("frequency", [110.0, 440.0, 3000.0, 9000.0])
def test_a_full_scale_sine_has_0_db_at_its_own_frequency(frequency: float):
    found = spectrogram(_sine(frequency), RATE)
    middle = found.levels_db[:, found.levels_db.shape[1] // 2]
    loudest = int(np.argmax(middle))
    assert found.frequencies[loudest] == pytest.approx(frequency, rel=0.03)
    assert middle[loudest] == pytest.approx(0, abs=0.5)  # between two bins 0.36 dB are lost


def test_half_the_level_is_6_db_less():
    whole, half = (spectrogram(_sine(440, level=level), RATE).levels_db.max() for level in (1.0, 0.5))
    assert whole - half == pytest.approx(6.02, abs=0.01)


def test_a_click_is_seen_when_it_happens():
    audio = np.zeros((RATE, 1), np.float32)
    audio[RATE // 2] = 1
    found = spectrogram(audio, RATE)
    column = int(np.argmax(found.levels_db.mean(axis=0)))
    assert found.times[column] == pytest.approx(0.5, abs=0.05)


def test_silence_and_very_short_audio_are_drawn(tmp_path: Path):
    for samples in (1, 7, 300):
        path = tmp_path / f"{samples}.png"
        save_spectrogram(path, np.zeros((samples, 2), np.float32), RATE)
        assert path.stat().st_size > 5000
    assert np.isfinite(spectrogram(np.zeros((300, 2), np.float32), RATE).levels_db).all()


def test_the_picture_is_a_png_and_equal_input_gives_equal_bytes(tmp_path: Path):
    for name in ("a.png", "b.png"):
        save_spectrogram(tmp_path / name, _sine(440, 0.3), RATE, title="100 $ of $rain$\n(seed 3)")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG") and data == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_impossible_pictures_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"\.png"):
        save_spectrogram(tmp_path / "a.jpg", _sine(440, 0.1), RATE)
    with pytest.raises(ValueError, match="with samples in it"):
        save_spectrogram(tmp_path / "a.png", np.zeros((0, 2), np.float32), RATE)
    with pytest.raises(OSError, match="could not be written"):
        save_spectrogram(tmp_path / "no" / "a.png", _sine(440, 0.1), RATE)
    assert not list(tmp_path.iterdir())
