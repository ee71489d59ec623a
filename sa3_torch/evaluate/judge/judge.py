"""The judge of the demo sounds: what is heard in a clip, and whether it is what the caption asked for.

Pitch and chord names come from signal processing (pitch.py). The class comes from a small network on log-mel bands
in time segments after the onset; ``judge_training.py`` makes its weights (judge.npz) from the demo set in seconds.
It knows nothing of any model of this project.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sa3_torch.train.autoencoder.metrics import Float, mel_filters, mono

from .pitch import chord_of, pitch_of

WEIGHTS = Path(__file__).with_name("judge.npz")
SAMPLE_RATE = 44_100
BANDS = 40
_WINDOW, _HOP = 1024, 256
_EDGES_MS = (0, 15, 40, 90, 180, 350, 700, 1400, 2500)  # time segments after the onset
_FLOOR_DB = -60.0
_NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")


class Record(Protocol):
    """What the judge needs to know of a clip: its class, and for notes and chords what was written."""

    @property
    def caption(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def instrument(self) -> str | None: ...
    @property
    def midi(self) -> int | None: ...


@dataclass(frozen=True)
class Heard:
    """``label``: note, chord, kick, snare, clap, hihat, crash, tom, white, pink, brown, or silence.

    ``instrument`` is set for notes and chords. ``probability`` is that of the label.
    """

    label: str
    instrument: str | None
    probability: float


def features(audio: NDArray[np.floating]) -> NDArray[np.float32]:
    """Level-free description of a clip: (BANDS * segments + segments + 3,) float32.

    Log-mel bands (dB below the loudest, floor -60, scaled to 0..1) and level per time segment, then pitch confidence,
    pitch and the share of energy on the harmonics of that pitch.
    """
    signal = mono(audio)
    peak = float(np.abs(signal).max()) if len(signal) else 0.0
    if peak < 1e-4:
        return np.zeros(feature_count(), dtype=np.float32)
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
    return np.concatenate([bands.ravel(), _scaled_db(level / max(level.max(), 1e-12)), _tonal(signal)]).astype(
        np.float32
    )


def feature_count() -> int:
    segments = len(_EDGES_MS) - 1
    return BANDS * segments + segments + 3


def tail_level(x: NDArray[np.floating]) -> float:
    """Of ``features`` x: the level from 180 ms to 1.4 s after the onset in dB below the loudest segment, at least -60,
    mean over the segments."""
    start = BANDS * (len(_EDGES_MS) - 1) + _EDGES_MS.index(180)
    return -_FLOOR_DB * float(x[start : start + _EDGES_MS.index(1400) - _EDGES_MS.index(180)].mean() - 1)


def attack_brightness(x: NDArray[np.floating]) -> float:
    """Of ``features`` x: the bands above 5 kHz in the first 40 ms, in dB below the loudest band, at least -60, mean
    over bands and segments."""
    bands = x[: BANDS * (len(_EDGES_MS) - 1)].reshape(-1, BANDS)
    return -_FLOOR_DB * float(bands[: _EDGES_MS.index(40), BANDS * 3 // 5 :].mean() - 1)


def _scaled_db(power: Float) -> Float:
    return np.asarray(1 - np.maximum(10 * np.log10(np.maximum(power, 1e-12)), _FLOOR_DB) / _FLOOR_DB)


def _tonal(signal: Float) -> Float:
    pitch = pitch_of(signal[:SAMPLE_RATE], SAMPLE_RATE)
    spectrum = np.abs(np.fft.rfft(signal[:SAMPLE_RATE], SAMPLE_RATE)) ** 2  # bins of 1 Hz
    near = np.zeros(len(spectrum), dtype=bool)
    for centre in pitch.hz * np.arange(1, 13):
        width = 0.03 * centre / max(1.0, centre / pitch.hz / 2)
        near[int(centre - width) : int(centre + width) + 2] = True
    return np.array([pitch.confidence, (pitch.midi - 60) / 24, spectrum[near].sum() / max(spectrum.sum(), 1e-12)])


class Judge:
    """The classifier. ``classes`` are "note:piano", "chord:organ", ..., "kick", ..., "white"."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; make it with: python -m sa3_torch.evaluate.judge.training CACHE")
        with np.load(path) as data:
            self.classes: list[str] = data["classes"].tolist()
            self._mean, self._scale = data["mean"], data["scale"]
            self._w1, self._b1, self._w2, self._b2 = (data[k].astype(np.float32) for k in ("w1", "b1", "w2", "b2"))

    def probabilities(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Of every class, from the features (F,) of a clip."""
        logits = self.hidden(x) @ self._w2 + self._b2
        e = np.exp(logits - logits.max())
        return np.asarray(e / e.sum(), dtype=np.float32)

    def hidden(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """The 40 values from which the class is read, from the features (F,) of a clip."""
        return np.asarray(np.maximum((x - self._mean) / self._scale @ self._w1 + self._b1, 0), dtype=np.float32)

    def embedding(self, audio: NDArray[np.floating]) -> NDArray[np.float32]:
        """``hidden`` of a clip: the space of Frechet distances between sets of clips."""
        return self.hidden(features(audio))

    def classify(self, audio: NDArray[np.floating]) -> Heard:
        """What a clip (L,) or (L, channels) at 44.1 kHz sounds like."""
        return self.classify_features(features(audio))

    def classify_features(self, x: NDArray[np.float32]) -> Heard:
        """As ``classify``, of what ``features`` says of a clip; nothing but zeros is silence."""
        if not x.any():
            return Heard("silence", None, 1.0)
        p = self.probabilities(x)
        labels: Counter[str] = Counter()
        for name, value in zip(self.classes, p.tolist(), strict=True):
            labels[name.partition(":")[0]] += value
        label, probability = labels.most_common(1)[0]
        best = max((i for i, name in enumerate(self.classes) if name.partition(":")[0] == label), key=lambda i: p[i])
        return Heard(label, self.classes[best].partition(":")[2] or None, float(probability))

    def knows(self, label: str) -> bool:
        """Whether it can say that a clip of this label is one."""
        return any(name.partition(":")[0] == label for name in self.classes)

    def check(self, audio: NDArray[np.floating], record: Record) -> dict[str, Any]:
        """Verdicts on one clip: "class" always; "instrument", "pitch" and "cents" for notes; "chord" for chords."""
        return verdict(audio, self.classify(audio), record)

    def evaluate(self, clips: Sequence[tuple[NDArray[np.floating], Record]]) -> dict[str, Any]:
        """Shares of right verdicts over clips, see ``shares``."""
        return shares([(record, self.check(audio, record)) for audio, record in clips])


def verdict(audio: NDArray[np.floating], heard: Heard, record: Record) -> dict[str, Any]:
    """``Judge.check`` of a clip that was classified as ``heard``."""
    found: dict[str, Any] = {"heard": heard.label, "class": heard.label == record.label}
    if record.label in ("note", "chord"):
        found["instrument"] = found["class"] and heard.instrument == record.instrument
    if record.label == "note" and record.midi is not None:
        pitch = pitch_of(audio)
        found["cents"] = 100 * (pitch.midi - record.midi)
        found["pitch"] = pitch.confidence >= 0.3 and abs(found["cents"]) <= 50
    if record.label == "chord" and record.midi is not None:
        root, quality = chord_of(audio)
        found["chord"] = root == _NAMES[record.midi % 12] and quality in record.caption.split()
    return found


def all_right(found: dict[str, Any]) -> bool:
    """Whether everything that was asked for is heard."""
    return all(found[name] for name in ("class", "instrument", "pitch", "chord") if name in found)


def shares(verdicts: Sequence[tuple[Record, dict[str, Any]]]) -> dict[str, Any]:
    """Shares of right verdicts over clips.

    Keys: clips, all (everything asked for), class, notes_class, notes_pitch, notes_instrument, chords_class,
    chords_name, drums_class, noises_class (None where there is no such clip), cents_median (absolute, of notes),
    by_label, confused.
    """
    notes = [v for record, v in verdicts if record.label == "note"]
    chords = [v for record, v in verdicts if record.label == "chord"]
    noises = [v for record, v in verdicts if record.label in ("white", "pink", "brown")]
    tonal_or_noise = ("note", "chord", "white", "pink", "brown")
    drums = [v for record, v in verdicts if record.label not in tonal_or_noise]
    labels = sorted({record.label for record, _ in verdicts})
    confused = Counter(f"{record.label} -> {v['heard']}" for record, v in verdicts if not v["class"])
    return {
        "clips": len(verdicts),
        "all": float(np.mean([all_right(v) for _, v in verdicts])) if verdicts else None,
        "class": _share([v for _, v in verdicts], "class"),
        "notes_class": _share(notes, "class"),
        "notes_pitch": _share(notes, "pitch"),
        "notes_instrument": _share(notes, "instrument"),
        "cents_median": float(np.median([abs(v["cents"]) for v in notes])) if notes else None,
        "chords_class": _share(chords, "class"),
        "chords_name": _share(chords, "chord"),
        "drums_class": _share(drums, "class"),
        "noises_class": _share(noises, "class"),
        "by_label": {label: _share([v for r, v in verdicts if r.label == label], "class") for label in labels},
        "confused": dict(confused.most_common()),
    }


def _share(verdicts: Sequence[dict[str, Any]], key: str) -> float | None:
    return float(np.mean([v[key] for v in verdicts])) if verdicts else None
