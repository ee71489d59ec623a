"""Name pitches, keys and chords, and build them: MIDI numbers, C4 is 60."""

from __future__ import annotations

from dataclasses import dataclass

from sa3_torch.train.demo_set.sounds import NAMES, note_name

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
# Chord qualities by the words that follow the root in a caption.
CHORDS = {
    "major": (0, 4, 7),
    "minor": (0, 3, 7),
    "seventh": (0, 4, 7, 10),
    "major seventh": (0, 4, 7, 11),
    "minor seventh": (0, 3, 7, 10),
    "diminished": (0, 3, 6),
    "suspended": (0, 5, 7),
}
# Degrees of the scale (0 is the tonic), one a bar.
PROGRESSIONS = {
    "major": ((0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 4, 0), (5, 3, 0, 4), (0, 2, 3, 4), (1, 4, 0, 0), (0, 3, 0, 4)),
    "minor": ((0, 5, 2, 6), (0, 3, 4, 0), (0, 6, 5, 6), (0, 5, 3, 4), (0, 3, 6, 2), (0, 0, 3, 4), (0, 6, 5, 4)),
}

__all__ = ["CHORDS", "NAMES", "PROGRESSIONS", "SCALES", "MusicalKey", "note_name"]


@dataclass(frozen=True)
class MusicalKey:
    """Hold a key: the pitch class of its tonic (0 is C) and its mode, "major" or "minor"."""

    root: int
    mode: str

    @property
    def name(self) -> str:
        """Return its name as in captions: "F# minor"."""
        return f"{NAMES[self.root]} {self.mode}"

    def pitch(self, degree: int, near: int) -> int:
        """Return the MIDI number of a degree (7 is the octave above 0) from the tonic nearest to ``near``."""
        tonic = near + (self.root - near + 6) % 12 - 6
        octave, step = divmod(degree, 7)
        return tonic + 12 * octave + SCALES[self.mode][step]

    def triad(self, degree: int, near: int) -> tuple[int, ...]:
        """Return the three MIDI numbers of the triad on a degree, each in the octave that is nearest to ``near``."""
        pitches = (self.pitch(degree + step, near) for step in (0, 2, 4))
        return tuple(sorted({near + (pitch - near + 6) % 12 - 6 for pitch in pitches}))

    def chord_name(self, degree: int) -> str:
        """Return the name of the triad on a degree: "G major"."""
        root, third, fifth = (self.pitch(degree + step, 60) for step in (0, 2, 4))
        quality = {(4, 7): "major", (3, 7): "minor", (3, 6): "diminished"}[third - root, fifth - root]
        return f"{NAMES[root % 12]} {quality}"


KEYS = tuple(MusicalKey(root, mode) for root in range(12) for mode in SCALES)
