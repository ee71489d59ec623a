"""Spectrograms: levels and places of known sounds, and a readable picture."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from sa3_mlx.common.files.lettering import lettered, write_title
from sa3_mlx.common.files.spectrogram import save_spectrogram, spectrogram

ROOT = Path(__file__).resolve().parents[3]
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


@pytest.mark.parametrize("low", [700.0, 3000.0])
def test_attacks_are_not_smeared_and_partials_stay_apart(low: float):
    """A burst over a steady tone is not seen 12 ms before it, and the tone stays narrow."""
    steady = np.concatenate([_sine(low, level=0.1), _sine(low, level=0.1)])
    audio = steady.copy()
    noise = np.random.default_rng(0).standard_normal((RATE // 2, 1)).astype(np.float32)
    audio[RATE : RATE + RATE // 2] += 0.3 * noise
    found, alone = spectrogram(audio, RATE), spectrogram(steady, RATE)
    above = found.frequencies > 1.3 * low
    before = (found.times > 1 - 0.03) & (found.times < 1 - 0.012)
    after = (found.times > 1.01) & (found.times < 1.4)
    rise = found.levels_db[above][:, after].mean() - found.levels_db[above][:, before].mean()
    assert rise > 40  # measured 92 and 102 dB; 15 and 16 dB with one window of 93 ms
    middle = alone.levels_db[:, 200]
    wide = alone.frequencies[middle > middle.max() - 20]
    assert wide[-1] / wide[0] < 1.06  # measured 1.045 and 1.015


def test_columns_of_a_long_sound_leave_nothing_out():
    """Clicks between the windows of two columns are seen."""
    audio = np.zeros((1400 * 9000, 1), np.float32)  # a column is 0.4 s
    places = np.array([100 * 9000 + 4000, 200 * 9000 + 6000, 300 * 9000 + 8000])
    audio[places] = 1
    columns = spectrogram(audio, RATE).levels_db.max(axis=0)
    assert {int(place // 9000) for place in places} <= {
        column + shift for column in np.flatnonzero(columns > -100) for shift in (-1, 0)
    }


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


def _drawn_text(text: str) -> tuple[str, list[str]]:
    """Draw a title as an error where a glyph is missing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure()
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_title(axes, text)
        figure.draw_without_rendering()
    title = axes.get_title(loc="left")
    return title, lettered(title)[1]


def test_titles_in_any_script_are_drawn_without_boxes_and_warnings(monkeypatch: pytest.MonkeyPatch):
    """From fonts that have the letters, else as escapes; control characters and formulas are text."""
    assert _drawn_text("A♭4 größe пианино $x$ \\frac") == ("A♭4 größe пианино $x$ \\frac", ["DejaVu Sans"])
    assert _drawn_text("a\x1b[31m\nb")[0] == "a\\x1b[31m b"
    monkeypatch.setattr("sa3_mlx.common.files.lettering._others", tuple)
    assert _drawn_text("ピアノ") == ("\\u30d4\\u30a2\\u30ce", ["DejaVu Sans"])
    assert _drawn_text("🎹")[0] == "\\U0001f3b9" and len(_drawn_text("ピ" * 500)[0]) < 800


def test_a_font_that_has_the_letters_is_found(monkeypatch: pytest.MonkeyPatch):
    """The first that has some, then others for the rest; those without any are left out."""
    letters = {"Latin": "abc", "Kana": "ピアノ", "Han": "雨", "Both": "雨ピ"}

    def without(family: str, wanted: set[str]) -> set[str]:
        return wanted - set(letters.get(family, "piano, "))

    monkeypatch.setattr("sa3_mlx.common.files.lettering._without", without)
    monkeypatch.setattr("sa3_mlx.common.files.lettering._others", lambda: ("Latin", "Kana", "Han", "Both"))
    assert lettered("piano ピアノ") == ("piano ピアノ", ["DejaVu Sans", "Kana"])
    assert lettered("雨 ピアノ é") == ("雨 ピアノ \\xe9", ["DejaVu Sans", "Kana", "Han"])


def test_matplotlib_says_nothing_of_its_folders(tmp_path: Path):
    """Where it has no folder for its caches it would warn with their paths."""
    script = (
        "import numpy as np; from sa3_mlx.common.files.spectrogram import save_spectrogram\n"
        "save_spectrogram('a.png', np.zeros((99, 1), np.float32), 8000)"
    )
    environment = os.environ | {"MPLCONFIGDIR": "/dev/null/x", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "") and (tmp_path / "a.png").is_file()


def test_made_parts_are_marked(tmp_path: Path):
    """Shaded in the level, under a bar in the spectrum; a picture without them is as it was."""
    audio, pictures = _sine(440, 1.0, 0.5), {}
    for name, made in {"plain": (), "inside": ((0.25, 0.5),), "end": ((0.75, 1.0),)}.items():
        save_spectrogram(tmp_path / f"{name}.png", audio, RATE, title="(rigid)", made=made)
        pictures[name] = image.imread(tmp_path / f"{name}.png")[..., :3]
    plain = pictures.pop("plain")
    for picture, (start, stop) in zip(pictures.values(), ((0.25, 0.5), (0.75, 1.0)), strict=True):
        rows, columns = np.nonzero((np.abs(picture - plain) > 0.05).any(axis=2))
        left, right = 78, 1299  # of the panels, in pixels
        inside = columns[(rows > 40) & (rows < 160)]
        assert inside.min() == pytest.approx(left + start * (right - left), abs=8)
        assert inside.max() == pytest.approx(left + stop * (right - left), abs=8)


def test_impossible_pictures_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"\.png"):
        save_spectrogram(tmp_path / "a.jpg", _sine(440, 0.1), RATE)
    with pytest.raises(ValueError, match="with samples in it"):
        save_spectrogram(tmp_path / "a.png", np.zeros((0, 2), np.float32), RATE)
    with pytest.raises(OSError, match="could not be written"):
        save_spectrogram(tmp_path / "no" / "a.png", _sine(440, 0.1), RATE)
    assert not list(tmp_path.iterdir())
