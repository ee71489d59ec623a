"""Name the class of a demo sound by a small network on log-mel bands in time segments after the onset.

``training.py`` makes its weights (judge.npz) from the demo set in a minute. It knows nothing of any model of this
project.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.measures.spectra import Float, mel_filters, mono
from sa3_torch.train.data.clip_cache import SAMPLE_RATE

from .pitch import pitch_of

WEIGHTS = Path(__file__).with_name("judge.npz")
BANDS = 40
_WINDOW, _HOP = 1024, 256
_EDGES_MS = (0, 15, 40, 90, 180, 350, 700, 1400, 2500)  # time segments after the onset
_SEGMENTS = len(_EDGES_MS) - 1
_FLOOR_DB = -60.0
FEATURES = BANDS * _SEGMENTS + _SEGMENTS + 3


@dataclass(frozen=True)
class Classification:
    """Say which class a clip belongs to, and how likely that is.

    ``label``: note, chord, kick, snare, clap, hihat, crash, tom, white, pink, brown, or silence. ``instrument`` is set
    for notes and chords. ``probability`` is that of the label.
    """

    label: str
    instrument: str | None
    probability: float


def features(audio: NDArray[np.floating]) -> NDArray[np.float32]:
    """Describe a clip (L,) or (L, channels) at 44.1 kHz independently of its level: (FEATURES,) float32.

    Log-mel bands (dB below the loudest, floor -60, scaled to 0..1) and level per time segment, then pitch confidence,
    pitch and the share of energy on the harmonics of that pitch. Silence gives zeros.
    """
    signal = mono(audio)
    peak = float(np.abs(signal).max()) if len(signal) else 0.0
    if peak < 1e-4:
        return np.zeros(FEATURES, dtype=np.float32)
    onset = max(0, int(np.argmax(np.abs(signal) > 0.05 * peak)) - 64)
    signal = np.pad(signal[onset:] / peak, (0, _WINDOW + _EDGES_MS[-1] * SAMPLE_RATE // 1000))
    frames = np.lib.stride_tricks.sliding_window_view(signal, _WINDOW)[::_HOP]
    frames = frames[: _EDGES_MS[-1] * SAMPLE_RATE // 1000 // _HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(_WINDOW), axis=1)) ** 2
    mel = power @ mel_filters(BANDS, _WINDOW, SAMPLE_RATE, 40.0)  # (frames, BANDS)
    edges = [round(ms * SAMPLE_RATE / 1000 / _HOP) for ms in _EDGES_MS]
    segments = np.stack([mel[a : max(b, a + 1)].mean(axis=0) for a, b in pairwise(edges)])
    level = segments.sum(axis=1)
    bands = _scaled_db(segments / max(segments.max(), 1e-12))
    levels = _scaled_db(level / max(level.max(), 1e-12))
    return np.concatenate([bands.ravel(), levels, _tonal(signal)]).astype(np.float32)


def tail_level(x: NDArray[np.floating]) -> float:
    """Return the mean level from 180 ms to 1.4 s after the onset, in dB below the loudest segment and at least -60.

    ``x`` is what ``features`` returns.
    """
    start = BANDS * _SEGMENTS + _EDGES_MS.index(180)
    return -_FLOOR_DB * float(x[start : start + _EDGES_MS.index(1400) - _EDGES_MS.index(180)].mean() - 1)


def attack_brightness(x: NDArray[np.floating]) -> float:
    """Return the mean of the bands above 5 kHz in the first 40 ms, in dB below the loudest band and at least -60.

    ``x`` is what ``features`` returns.
    """
    bands = x[: BANDS * _SEGMENTS].reshape(-1, BANDS)
    return -_FLOOR_DB * float(bands[: _EDGES_MS.index(40), BANDS * 3 // 5 :].mean() - 1)


def _scaled_db(power: Float) -> Float:
    return np.asarray(1 - np.maximum(10 * np.log10(np.maximum(power, 1e-12)), _FLOOR_DB) / _FLOOR_DB)


def _tonal(signal: Float) -> Float:
    """Return pitch confidence, pitch in units of two octaves from C4, and the share of energy on its harmonics."""
    pitch = pitch_of(signal[:SAMPLE_RATE], SAMPLE_RATE)
    spectrum = np.abs(np.fft.rfft(signal[:SAMPLE_RATE], SAMPLE_RATE)) ** 2  # bins of 1 Hz
    near = np.zeros(len(spectrum), dtype=bool)
    for centre in pitch.hz * np.arange(1, 13):
        width = 0.03 * centre / max(1.0, centre / pitch.hz / 2)
        near[int(centre - width) : int(centre + width) + 2] = True
    return np.array([pitch.confidence, (pitch.midi - 60) / 24, spectrum[near].sum() / max(spectrum.sum(), 1e-12)])


class Classifier:
    """Run the network. ``classes`` are "note:piano", "chord:organ", ..., "kick", ..., "white"."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        """Open the weights. Raises FileNotFoundError where there are none."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; make it with: python -m sa3_torch.evaluate.judge.training CACHE")
        with np.load(path) as data:
            self.classes: list[str] = data["classes"].tolist()
            self._mean, self._scale = data["mean"], data["scale"]
            self._w1, self._b1, self._w2, self._b2 = (data[k].astype(np.float32) for k in ("w1", "b1", "w2", "b2"))

    def hidden(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the 40 values from which the class is read, for the features (FEATURES,) of a clip."""
        return np.asarray(np.maximum((x - self._mean) / self._scale @ self._w1 + self._b1, 0), dtype=np.float32)

    def probabilities(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the probability of every class, for the features (FEATURES,) of a clip."""
        logits = self.hidden(x) @ self._w2 + self._b2
        e = np.exp(logits - logits.max())
        return np.asarray(e / e.sum(), dtype=np.float32)

    def embedding(self, audio: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return ``hidden`` of a clip, a point of the space of Frechet distances between sets of clips."""
        return self.hidden(features(audio))

    def classify(self, audio: NDArray[np.floating]) -> Classification:
        """Say what a clip (L,) or (L, channels) at 44.1 kHz sounds like."""
        return self.classify_features(features(audio))

    def classify_features(self, x: NDArray[np.float32]) -> Classification:
        """Say what a clip with these ``features`` sounds like; nothing but zeros is silence."""
        if not x.any():
            return Classification("silence", None, 1.0)
        p = self.probabilities(x)
        labels: Counter[str] = Counter()
        for name, value in zip(self.classes, p.tolist(), strict=True):
            labels[name.partition(":")[0]] += value
        label, probability = labels.most_common(1)[0]
        best = max((i for i, name in enumerate(self.classes) if name.partition(":")[0] == label), key=lambda i: p[i])
        return Classification(label, self.classes[best].partition(":")[2] or None, float(probability))

    def knows(self, label: str) -> bool:
        """Return whether clips of this label are among the classes."""
        return any(name.partition(":")[0] == label for name in self.classes)
