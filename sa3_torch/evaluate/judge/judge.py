"""Judge demo sounds: does a clip sound like what its caption asks for?

Pitch and chord names come from signal processing (pitch.py), the class from a small network (classifier.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sa3_torch.train.demo_set.sounds import NAMES

from .classifier import WEIGHTS, Classification, Classifier
from .pitch import chord_of, pitch_of

RIGHT = ("all", "class", "notes_pitch", "notes_instrument", "chords_name")  # what `right` says of single clips


class Record(Protocol):
    """Say what the judge needs to know of a clip: its class, and for notes and chords what was written."""

    @property
    def caption(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def instrument(self) -> str | None: ...
    @property
    def midi(self) -> int | None: ...


class Judge:
    """Compare clips with what was asked for."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        """Open the classifier. Raises FileNotFoundError where it has no weights."""
        self.classifier = Classifier(path)

    def check(self, audio: NDArray[np.floating], record: Record) -> dict[str, Any]:
        """Return verdicts on a clip: "class" always; "instrument", "pitch", "cents" for notes; "chord" for chords."""
        return verdict(audio, self.classifier.classify(audio), record)

    def evaluate(self, clips: Sequence[tuple[NDArray[np.floating], Record]]) -> dict[str, Any]:
        """Return the shares of right verdicts over clips, see ``shares``."""
        return shares([(record, self.check(audio, record)) for audio, record in clips])


def verdict(audio: NDArray[np.floating], classified: Classification, record: Record) -> dict[str, Any]:
    """Return what ``Judge.check`` does, for a clip that was ``classified`` before."""
    found: dict[str, Any] = {"label": classified.label, "class": classified.label == record.label}
    if record.label in ("note", "chord"):
        found["instrument"] = found["class"] and classified.instrument == record.instrument
    if record.label == "note" and record.midi is not None:
        pitch = pitch_of(audio)
        found["cents"] = 100 * (pitch.midi - record.midi)
        found["pitch"] = pitch.confidence >= 0.3 and abs(found["cents"]) <= 50
    if record.label == "chord" and record.midi is not None:
        root, quality = chord_of(audio)
        found["chord"] = root == NAMES[record.midi % 12] and quality in record.caption.split()
    return found


def all_right(found: dict[str, Any]) -> bool:
    """Return whether a clip is all that was asked for."""
    return all(found[name] for name in ("class", "instrument", "pitch", "chord") if name in found)


def shares(verdicts: Sequence[tuple[Record, dict[str, Any]]]) -> dict[str, Any]:
    """Return the shares of right verdicts over clips.

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
    confused = Counter(f"{record.label} -> {v['label']}" for record, v in verdicts if not v["class"])
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


def right(record: Record, found: dict[str, Any]) -> dict[str, bool]:
    """Return what is right of one clip, by the key of ``shares`` of which that is a part."""
    kind = {"note": "notes", "chord": "chords"}.get(record.label, "")
    named = {f"{kind}_{name}": found[name] for name in ("pitch", "instrument") if kind == "notes" and name in found}
    named |= {"chords_name": found["chord"]} if kind == "chords" and "chord" in found else {}
    return {"all": all_right(found), "class": found["class"], **named}


def _share(verdicts: Sequence[dict[str, Any]], key: str) -> float | None:
    return float(np.mean([v[key] for v in verdicts])) if verdicts else None
