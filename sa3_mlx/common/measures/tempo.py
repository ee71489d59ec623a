"""Find tempo and key: what a prompt names, and what is heard.

The tempo of a sound is estimated by librosa, which is not needed for anything else: ``pip install "sa3[music]"``.
"""

from __future__ import annotations

import importlib.util
import math
import re

import numpy as np
from numpy.typing import NDArray

from .spectra import mono, spectrogram

MISSING = 'tempo is not estimated: librosa is missing; pip install "sa3[music]"'
_LEAST_SECONDS = 12.0  # that a loop is repeated to, so that its beats can be counted
_BPM = re.compile(
    r"(?<![\w.])(\d{2,3}(?:\.\d+)?)\s*-?bpm\b|\bbpm\s*[:=]?\s*(\d{2,3}(?:\.\d+)?)(?![\w.])", re.IGNORECASE
)
_KEY = re.compile(r"(?<![\w#])([A-G])\s*(#|♯|b|♭|[ -]?(?i:sharp|flat)\b)?[ -]*((?i:major|minor|maj\b|min\b))")
_NOTES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
# How much each step of the scale belongs to a key [Krumhansl and Kessler 1982], major and minor.
_MAJOR = np.array([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88])
_MINOR = np.array([6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17])


def named_bpm(prompt: str) -> float | None:
    """Return the tempo that a prompt names, "120 bpm" or "BPM: 120", None without one."""
    found = _BPM.search(prompt)
    return None if found is None else float(found[1] or found[2])


def named_key(prompt: str) -> str | None:
    """Return the key that a prompt names, as "C# minor", None without one."""
    found = _KEY.search(prompt)
    if found is None:
        return None
    sign = (found[2] or "").strip(" -").lower()
    step = 1 if sign in ("#", "♯", "sharp") else -1 if sign else 0
    note = _NOTES[(_NOTES.index(found[1].upper()) + step) % 12]
    return f"{note} {'major' if found[3].lower().startswith('maj') else 'minor'}"


def has_librosa() -> bool:
    """Tell whether tempo can be estimated here."""
    return importlib.util.find_spec("librosa") is not None


def tempo(audio: NDArray[np.floating], sample_rate: int, *, loop: bool) -> float | None:
    """Estimate the tempo of (L, channels) in beats per minute; None where there is no beat.

    A ``loop`` is repeated, so that short ones have beats to count. Raises ImportError, one line, without librosa.
    """
    if not has_librosa():
        raise ImportError(MISSING)
    import librosa

    signal = mono(audio).astype(np.float32)
    if loop:
        signal = np.tile(signal, max(1, math.ceil(_LEAST_SECONDS * sample_rate / len(signal))))
    if not len(signal) or float(np.abs(signal).max()) < 1e-4:
        return None
    onsets = librosa.onset.onset_strength(y=signal, sr=sample_rate)
    found = float(np.ravel(librosa.feature.tempo(onset_envelope=onsets, sr=sample_rate))[0])
    return found if found > 0 else None


def tempo_share(found: float, asked: float) -> float:
    """Return 1 for the asked tempo, its half or its double, falling to 0 at a seventh beside it."""
    off = min(abs(math.log2(found / (asked * factor))) for factor in (0.5, 1.0, 2.0))
    return max(0.0, 1 - 5 * off)


def key(audio: NDArray[np.floating], sample_rate: int) -> str:
    """Estimate the key of (L, channels), as "C# minor", by how much of each note of the scale sounds."""
    strength = spectrogram(audio, 8192, 4096) ** 2
    hz = np.fft.rfftfreq(8192, 1 / sample_rate)
    used = (hz > 60) & (hz < min(4000, sample_rate / 2))
    note = np.round(12 * np.log2(hz[used] / 440) + 9).astype(int) % 12  # 0 is C
    chroma = np.bincount(note, np.sqrt(strength[:, used]).sum(axis=0), 12)
    keys = [
        (_NOTES[k] + f" {name}", np.roll(row, k))
        for name, row in (("major", _MAJOR), ("minor", _MINOR))
        for k in range(12)
    ]
    fits = [np.corrcoef(chroma, row)[0, 1] if chroma.std() else 0.0 for _, row in keys]
    return keys[int(np.argmax(fits))][0]
