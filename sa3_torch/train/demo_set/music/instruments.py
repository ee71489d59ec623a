"""List the instruments of the set: General MIDI programs, the range in which they are played, and their roles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["melody", "arpeggio", "bass", "chord"]


@dataclass(frozen=True, kw_only=True)
class Instrument:
    """Describe an instrument. ``sustained``: it holds its notes.

    ``low`` and ``high`` are the MIDI range in which a single note has a clear pitch, the written one.
    """

    name: str
    family: str
    program: int
    low: int
    high: int
    roles: tuple[Role, ...]
    sustained: bool


def _of(family: str, sustained: bool, *rows: tuple[str, int, int, int, str]) -> list[Instrument]:
    """Make the instruments of a family; roles are letters: m melody, a arpeggio, b bass line, c chords."""
    letters: dict[str, Role] = {"m": "melody", "a": "arpeggio", "b": "bass", "c": "chord"}
    return [
        Instrument(
            name=name,
            family=family,
            program=program,
            low=low,
            high=high,
            roles=tuple(letters[letter] for letter in roles),
            sustained=sustained,
        )
        for name, program, low, high, roles in rows
    ]


_ALL = [
    *_of(
        "keys",
        False,
        ("piano", 0, 28, 96, "mabc"),
        ("electric piano", 4, 33, 96, "mac"),
        ("harpsichord", 6, 36, 84, "mac"),
    ),
    *_of(
        "mallets",
        False,
        ("celesta", 8, 60, 100, "ma"),
        ("music box", 10, 60, 96, "ma"),
        ("vibraphone", 11, 53, 89, "mac"),
        ("marimba", 12, 45, 90, "ma"),
        ("xylophone", 13, 65, 96, "m"),
        ("kalimba", 108, 55, 84, "ma"),
        ("steel drums", 114, 55, 84, "m"),
    ),
    *_of("organ", True, ("organ", 19, 36, 69, "mac"), ("accordion", 21, 53, 89, "mc"), ("harmonica", 22, 60, 89, "m")),
    *_of(
        "guitar",
        False,
        ("acoustic guitar", 24, 40, 84, "mac"),
        ("electric guitar", 27, 40, 86, "mac"),
        ("distorted guitar", 30, 40, 81, "m"),
    ),
    *_of(
        "plucked",
        False,
        ("banjo", 105, 48, 81, "ma"),
        ("harp", 46, 36, 81, "ma"),
        ("sitar", 104, 48, 77, "m"),
        ("koto", 107, 48, 81, "ma"),
    ),
    *_of(
        "bass",
        False,
        ("acoustic bass", 32, 28, 55, "b"),
        ("electric bass", 33, 28, 55, "b"),
        ("slap bass", 36, 28, 53, "b"),
        ("synth bass", 38, 28, 55, "b"),
    ),
    *_of(
        "strings",
        True,
        ("violin", 40, 55, 93, "m"),
        ("viola", 41, 48, 84, "m"),
        ("cello", 42, 36, 76, "mb"),
        ("string ensemble", 48, 36, 89, "mc"),
        ("choir", 52, 48, 79, "c"),
    ),
    *_of("strings", False, ("pizzicato strings", 45, 40, 84, "ma")),
    *_of(
        "brass",
        True,
        ("trumpet", 56, 54, 84, "m"),
        ("trombone", 57, 40, 72, "m"),
        ("tuba", 58, 29, 58, "b"),
        ("french horn", 60, 41, 77, "m"),
        ("brass section", 61, 41, 81, "mc"),
    ),
    *_of(
        "woodwinds",
        True,
        ("saxophone", 65, 50, 80, "m"),
        ("oboe", 68, 58, 89, "m"),
        ("bassoon", 70, 34, 70, "mb"),
        ("clarinet", 71, 50, 89, "m"),
        ("flute", 73, 60, 94, "m"),
        ("pan flute", 75, 60, 89, "m"),
    ),
    *_of(
        "synth",
        True,
        ("synth lead", 81, 48, 88, "ma"),
        ("square lead", 80, 48, 88, "ma"),
        ("synth pad", 89, 40, 84, "c"),
    ),
]
FLAT_CENTS = {"xylophone": 50}  # by how much the font plays them too low [measured: records/music-set.md]
INSTRUMENTS: dict[str, Instrument] = {instrument.name: instrument for instrument in _ALL}


def of_role(role: Role) -> list[Instrument]:
    """Return the instruments of a role."""
    return [instrument for instrument in INSTRUMENTS.values() if role in instrument.roles]
