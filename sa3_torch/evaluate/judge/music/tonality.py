"""Find the name of a chord and the key of a piece by signal processing, from the energy of pitch classes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.measures.spectra import Float, mono
from sa3_torch.evaluate.judge.pitch import semitones
from sa3_torch.train.demo_set.music.theory import CHORDS, NAMES

SAMPLE_RATE = 44_100
_WINDOW = 16_384
# Overtones of a tone, in semitones above it, and how much of its amplitude is taken off there.
_OVERTONES = ((12, 0.1), (19, 0.5), (28, 0.25))
_BASS = 0.02  # what the lowest strong tone adds to chords on it
# Albrecht and Shanahan 2013: how often each pitch class sounds in pieces in a key on C.
PROFILES = {
    "major": (0.238, 0.006, 0.111, 0.006, 0.137, 0.094, 0.016, 0.214, 0.009, 0.080, 0.008, 0.081),
    "minor": (0.220, 0.006, 0.104, 0.123, 0.019, 0.103, 0.012, 0.214, 0.062, 0.022, 0.061, 0.052),
}


def chord_name(audio: NDArray[np.floating]) -> str:
    """Name the chord of (L,) or (L, channels) whatever its position: "A minor seventh"."""
    bands = np.sqrt(semitones(audio))
    for i in range(len(bands)):
        for step, share in _OVERTONES:
            if i + step < len(bands):
                bands[i + step] = max(0.0, bands[i + step] - share * bands[i])
    classes = np.array([bands[i::12].sum() for i in range(12)])
    bass = int(np.argmax(bands[:24] > 0.3 * bands.max())) % 12  # it decides between equal sets of tones
    best, answer = -1.0, ""
    for root in range(12):
        for quality, steps in CHORDS.items():
            template = np.zeros(12)
            template[[(root + step) % 12 for step in steps]] = 1.0
            score = float(classes @ template) / max(float(np.linalg.norm(template) * np.linalg.norm(classes)), 1e-12)
            score += _BASS * (root == bass)
            if score > best:
                best, answer = score, f"{NAMES[root]} {quality}"
    return answer


def pitch_classes(audio: NDArray[np.floating]) -> Float:
    """Return the share of each pitch class, C first, in the tones of 65 Hz to 2 kHz: (12,), sum one."""
    signal = np.pad(mono(audio), _WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(signal, _WINDOW)[:: _WINDOW // 4]
    amplitude = np.abs(np.fft.rfft(frames * np.hanning(_WINDOW), axis=1))
    peaks = np.zeros_like(amplitude)
    inner = amplitude[:, 1:-1]
    higher = (inner > amplitude[:, :-2]) & (inner >= amplitude[:, 2:])
    peaks[:, 1:-1] = np.where(higher, inner, 0.0)
    f = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)
    inside = (f > 65) & (f < 2000)
    classes = np.round(12 * np.log2(f[inside] / 440) + 69).astype(int) % 12
    energy = np.sqrt(peaks[:, inside]).sum(axis=0)
    out = np.bincount(classes, weights=energy, minlength=12)
    return np.asarray(out / max(float(out.sum()), 1e-12))


def best_key(classes: Float) -> str:
    """Return the key whose profile correlates best with pitch classes (12,), C first; "" for none."""
    if not classes.any():
        return ""
    found = {
        f"{NAMES[root]} {mode}": float(np.corrcoef(np.roll(profile, root), classes)[0, 1])
        for mode, profile in PROFILES.items()
        for root in range(12)
    }
    return max(found, key=lambda name: found[name])


def key_of(audio: NDArray[np.floating]) -> str:
    """Name the key whose profile correlates best with the pitch classes: "F# minor"."""
    return best_key(pitch_classes(audio))
