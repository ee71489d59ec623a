"""Write melodies, arpeggios, bass lines and chords in a key: tones of one voice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .beats import STEPS, bar_seconds
from .instruments import Instrument
from .scores import Tone
from .theory import PROGRESSIONS, MusicalKey

# Rhythms of a bar in sixteenths, calm ones first.
MELODY_RHYTHMS = (
    (8, 8),
    (8, 4, 4),
    (4, 4, 8),
    (6, 2, 8),
    (4, 4, 4, 4),
    (6, 2, 4, 4),
    (4, 2, 2, 4, 4),
    (3, 3, 2, 4, 4),
    (2, 2, 2, 2, 4, 4),
    (3, 3, 2, 3, 3, 2),
    (2, 2, 4, 2, 2, 4),
)
ARPEGGIOS = ((0, 1, 2, 3), (0, 1, 2, 1), (3, 2, 1, 0), (0, 2, 1, 2), (0, 2, 1, 3), (0, 1, 2, 3, 2, 1))
# Bass lines: (start, length in sixteenths, degree above the root; 7 is the octave).
BASS_PATTERNS = {
    "roots": ((0, 8, 0), (8, 8, 0)),
    "eighths": tuple((2 * i, 2, 0) for i in range(8)),
    "octaves": tuple((2 * i, 2, 7 * (i % 2)) for i in range(8)),
    "offbeat": tuple((4 * i + 2, 2, 0) for i in range(4)),
    "walking": ((0, 4, 0), (4, 4, 2), (8, 4, 4), (12, 4, 5)),
    "fifths": ((0, 6, 0), (6, 2, 4), (8, 6, 4), (14, 2, 0)),
    "funky": ((0, 2, 0), (3, 1, 0), (6, 2, 7), (10, 2, 4), (12, 1, 6), (14, 2, 7)),
    "one drop": ((4, 2, 0), (6, 2, 2), (8, 4, 4), (14, 2, 0)),
    "long": ((0, 16, 0),),
}
# How chords are struck: (start, length in sixteenths).
COMPING = {
    "whole": ((0, 16),),
    "halves": ((0, 8), (8, 8)),
    "quarters": tuple((4 * i, 4) for i in range(4)),
    "eighths": tuple((2 * i, 2) for i in range(8)),
    "offbeat": tuple((4 * i + 2, 1) for i in range(4)),
    "charleston": ((0, 3), (6, 3), (14, 2)),
    "stabs": ((0, 2), (3, 2), (6, 2), (10, 2)),
    "bossa": ((0, 3), (3, 2), (6, 3), (10, 2), (12, 3)),
}


def progression(rng: np.random.Generator, key: MusicalKey, bars: int) -> list[int]:
    """Draw the degree on which the chord of each bar stands; the first is nearly always the tonic."""
    choices = PROGRESSIONS[key.mode]
    drawn = choices[int(rng.integers(len(choices)))]
    return [drawn[bar % len(drawn)] for bar in range(bars)]


def _in_range(pitch: int, low: int, high: int) -> int:
    """Move a pitch by octaves into a range of at least an octave."""
    while pitch < low:
        pitch += 12
    while pitch > high:
        pitch -= 12
    return pitch


def _velocity(rng: np.random.Generator, level: int, accent: bool) -> int:
    return int(np.clip(level + 8 * accent + rng.normal(0, 4), 25, 127))


def melody(
    rng: np.random.Generator,
    instrument: Instrument,
    key: MusicalKey,
    chords: Sequence[int],
    *,
    bpm: int,
    level: int,
    length: float,
    voice: int = 0,
    centre: int | None = None,
) -> list[Tone]:
    """Write a melody of a bar for each chord: chord tones on the beats, steps between them, the tonic at the end.

    ``length``: the share of its time that a note is held; ``centre`` of the range, drawn when None.
    """
    low, high = instrument.low, instrument.high
    if centre is None:
        centre = int(rng.integers(low + 7, high - 6)) if high - low > 14 else (low + high) // 2
    step = bar_seconds(bpm) / STEPS
    calm = bpm > 126  # fewer notes a beat in fast pieces
    rhythms = [MELODY_RHYTHMS[int(rng.integers(7 if calm else len(MELODY_RHYTHMS)))] for _ in range(2)]
    degree, tones = int(rng.choice([0, 2, 4])), []
    for bar, chord in enumerate(chords):
        place = 0
        for sixteenths in rhythms[bar % 2]:
            strong = place % 8 == 0
            degree += int(rng.choice([-2, -1, -1, 1, 1, 2, 0]))
            if strong:
                degree = min((chord + t + o for t in (0, 2, 4) for o in (-7, 0, 7)), key=lambda d: abs(d - degree))
            degree = int(np.clip(degree, -5, 9))
            tones.append(
                Tone(
                    voice=voice,
                    key=_in_range(key.pitch(degree, centre), low, high),
                    start=(bar * STEPS + place) * step,
                    seconds=length * sixteenths * step,
                    velocity=_velocity(rng, level, strong),
                )
            )
            place += sixteenths
    last = tones[-1]
    home = _in_range(key.pitch(0, last.key), low, high)
    return [*tones[:-1], Tone(voice=voice, key=home, start=last.start, seconds=last.seconds, velocity=last.velocity)]


def arpeggio(
    rng: np.random.Generator,
    instrument: Instrument,
    key: MusicalKey,
    chords: Sequence[int],
    *,
    bpm: int,
    level: int,
    length: float,
    voice: int = 0,
) -> list[Tone]:
    """Break the chord of each bar into eighths, or sixteenths in slow pieces."""
    low, high = instrument.low, instrument.high
    near = int(rng.integers(low + 6, max(high - 18, low + 7)))
    sixteenths = 1 if bpm < 110 and rng.random() < 0.5 else 2
    pattern = ARPEGGIOS[int(rng.integers(len(ARPEGGIOS)))]
    step, tones = bar_seconds(bpm) / STEPS, []
    for bar, chord in enumerate(chords):
        pitches = [key.pitch(chord + d, near) for d in (0, 2, 4, 7)]
        for i in range(STEPS // sixteenths):
            tones.append(
                Tone(
                    voice=voice,
                    key=_in_range(pitches[pattern[i % len(pattern)]], low, high),
                    start=(bar * STEPS + i * sixteenths) * step,
                    seconds=length * sixteenths * step,
                    velocity=_velocity(rng, level, i * sixteenths % 4 == 0),
                )
            )
    return tones


def bass_line(
    rng: np.random.Generator,
    instrument: Instrument,
    key: MusicalKey,
    chords: Sequence[int],
    pattern: str,
    *,
    bpm: int,
    level: int,
    length: float,
    voice: int = 0,
) -> list[Tone]:
    """Play a bass pattern under the chord of each bar, low in the range of the instrument."""
    step, tones = bar_seconds(bpm) / STEPS, []
    low, high = instrument.low, min(instrument.high, instrument.low + 24)
    for bar, chord in enumerate(chords):
        for start, sixteenths, degree in BASS_PATTERNS[pattern]:
            tones.append(
                Tone(
                    voice=voice,
                    key=_in_range(key.pitch(chord + degree, low + 8), low, high),
                    start=(bar * STEPS + start) * step,
                    seconds=length * sixteenths * step,
                    velocity=_velocity(rng, level, start == 0),
                )
            )
    return tones


def comping(
    rng: np.random.Generator,
    key: MusicalKey,
    chords: Sequence[int],
    pattern: str,
    *,
    bpm: int,
    level: int,
    near: int,
    voice: int,
) -> list[Tone]:
    """Strike the triad of each bar around the pitch ``near``."""
    step = bar_seconds(bpm) / STEPS
    return [
        Tone(
            voice=voice,
            key=pitch,
            start=(bar * STEPS + start) * step,
            seconds=0.92 * sixteenths * step,
            velocity=_velocity(rng, level, start == 0),
        )
        for bar, chord in enumerate(chords)
        for start, sixteenths in COMPING[pattern]
        for pitch in key.triad(chord, near)
    ]
