"""Write drum loops: styles, each with patterns of sixteen steps a bar, kits, a range of tempos and swing.

A pattern is a line for each drum: "X" accent, "x" hit, "o" soft hit, "?" a hit in half of the bars, "." rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .scores import Tone

DRUM_KEYS = {
    "kick": 36,
    "rim": 37,
    "snare": 38,
    "clap": 39,
    "hat": 42,
    "pedal": 44,
    "open": 46,
    "crash": 49,
    "ride": 51,
    "tambourine": 54,
    "cowbell": 56,
    "shaker": 70,
    "conga": 63,
    "low conga": 64,
    "low tom": 45,
    "tom": 47,
    "high tom": 50,
}
VELOCITY = {"X": 118, "x": 98, "o": 62, "?": 80}
STEPS = 16
Pattern = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Style:
    """Describe a style of drums. ``swing`` is by which share the first of two sixteenths, or eighths, is longer."""

    slowest: int  # bpm
    fastest: int
    kits: tuple[int, ...]
    patterns: tuple[Pattern, ...]
    swing: float = 0.0
    swung: int = 1  # 1: sixteenths are swung, 2: eighths


STYLES: dict[str, Style] = {
    "rock": Style(
        slowest=96,
        fastest=150,
        kits=(0, 8, 16),
        patterns=(
            {"kick": "X.......X.x.....", "snare": "....X.......X...", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "X.....x.X.?.....", "snare": "....X.......X..?", "open": "x.x.x.x.x.x.x.x."},
            {"kick": "X.x.....X.x.....", "snare": "....X.......X...", "ride": "x.x.x.x.x.x.x.x."},
        ),
    ),
    "hip hop": Style(
        slowest=72,
        fastest=104,
        kits=(0, 8, 25),
        patterns=(
            {"kick": "X......x..x.....", "snare": "....X.......X...", "hat": "x.x.x.x.x.x.x.xo"},
            {"kick": "X..x......x..x..", "snare": "....X.......X..o", "hat": "x.xox.x.x.xox.x."},
            {
                "kick": "X.x....x.x......",
                "clap": "....X.......X...",
                "hat": "x.x.x.x.x.x.x.x.",
                "open": "..............?.",
            },
        ),
        swing=0.28,
    ),
    "house": Style(
        slowest=116,
        fastest=130,
        kits=(24, 25),
        patterns=(
            {
                "kick": "X...X...X...X...",
                "clap": "....X.......X...",
                "open": "..x...x...x...x.",
                "hat": "xoxoxoxoxoxoxoxo",
            },
            {
                "kick": "X...X...X...X..?",
                "clap": "....X.......X...",
                "open": "..x...x...x...x.",
                "shaker": "oooooooooooooooo",
            },
        ),
    ),
    "techno": Style(
        slowest=126,
        fastest=148,
        kits=(24, 25),
        patterns=(
            {"kick": "X...X...X...X...", "hat": "..X...X...X...X.", "rim": "...o..o....o..?."},
            {"kick": "X...X...X...X...", "hat": "x.X.x.X.x.X.x.X.", "low tom": "...x..?....x...."},
            {"kick": "X...X...X...X..x", "ride": "..x...x...x...x.", "clap": "............X..."},
        ),
    ),
    "drum and bass": Style(
        slowest=150,
        fastest=170,
        kits=(0, 16, 24),
        patterns=(
            {"kick": "X.........X.....", "snare": "....X.......X...", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "X.....?...X.....", "snare": "....X..o.o..X..o", "ride": "x.x.x.x.x.x.x.x."},
            {"kick": "X.x.......xx....", "snare": "....X..o.o..X..?", "hat": "xoxoxoxoxoxoxoxo"},
        ),
    ),
    "funk": Style(
        slowest=92,
        fastest=118,
        kits=(0, 8),
        patterns=(
            {"kick": "X.x...x...x..x..", "snare": "....X..o.o..X..o", "hat": "xoxoxoxoxoxoxoxo"},
            {
                "kick": "X..x..x..x......",
                "snare": ".o..X..o....X.o.",
                "hat": "x.x.x.x.x.x.x...",
                "open": "..............x.",
            },
        ),
        swing=0.12,
    ),
    "disco": Style(
        slowest=110,
        fastest=126,
        kits=(0, 8),
        patterns=(
            {
                "kick": "X...X...X...X...",
                "snare": "....X.......X...",
                "open": "..x...x...x...x.",
                "hat": "x...x...x...x...",
            },
            {
                "kick": "X...X...X...X...",
                "snare": "....X.......X...",
                "open": "..x...x...x...x.",
                "tambourine": "xoxoxoxoxoxoxoxo",
                "cowbell": "x.....x.........",
            },
        ),
    ),
    "reggae": Style(
        slowest=70,
        fastest=92,
        kits=(0, 8),
        patterns=(
            {"kick": "........X.......", "rim": "........X.......", "hat": "x.x.x.x.x.x.x.x."},
            {
                "kick": "X.......X.......",
                "rim": "........X......?",
                "hat": "..x...x...x...x.",
                "open": "..............?.",
            },
        ),
        swing=0.22,
    ),
    "bossa nova": Style(
        slowest=110,
        fastest=146,
        kits=(0, 32, 40),
        patterns=(
            {"kick": "X.....x.X.....x.", "rim": "x.....x.....x...", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "X.....x.X.....x.", "rim": "..x...x..x..x...", "shaker": "xoxoxoxoxoxoxoxo"},
        ),
    ),
    "jazz": Style(
        slowest=104,
        fastest=168,
        kits=(32, 40),
        patterns=(
            {"ride": "x...x.x.x...x.x.", "pedal": "....x.......x...", "kick": "o...o...o...o..."},
            {
                "ride": "x...x.x.x...x.x.",
                "pedal": "....x.......x...",
                "snare": "......o.......?.",
                "kick": "?.........o.....",
            },
        ),
        swing=0.33,
        swung=2,
    ),
    "trap": Style(
        slowest=130,
        fastest=158,
        kits=(25,),
        patterns=(
            {"kick": "X.....x...x.....", "clap": "........X.......", "hat": "xxxxxoxxxxxxxoxx"},
            {
                "kick": "X..x......x..?..",
                "clap": "........X.......",
                "hat": "x.x.x.xxx.x.xxxx",
                "open": "......?.........",
            },
        ),
    ),
    "metal": Style(
        slowest=140,
        fastest=170,
        kits=(16,),
        patterns=(
            {
                "kick": "XxXxXxXxXxXxXxXx",
                "snare": "....X.......X...",
                "crash": "X...............",
                "ride": "x...x...x...x...",
            },
            {"kick": "X.XxX.XxX.XxX.Xx", "snare": "....X.......X...", "open": "x...x...x...x..."},
        ),
    ),
    "samba": Style(
        slowest=96,
        fastest=124,
        kits=(0, 8),
        patterns=(
            {
                "kick": "x...X..xx...X..x",
                "shaker": "XooxXooxXooxXoox",
                "conga": "..x..x.x..x..x.x",
                "low conga": "X......x.......x",
            },
            {"kick": "o...X..oo...X..o", "tambourine": "XooxXooxXooxXoox", "rim": "x.x..x.x.x.x..x."},
        ),
    ),
}


def tempos(style: str) -> range:
    """Return the tempos of a style in bpm: even numbers."""
    found = STYLES[style]
    return range(found.slowest, found.fastest + 1, 2)


def bar_seconds(bpm: int) -> float:
    """Return the seconds of a bar of four beats."""
    return 240 / bpm


def drum_tones(rng: np.random.Generator, style: str, bpm: int, bars: int, voice: int) -> list[Tone]:
    """Write ``bars`` bars of a pattern of a style, drawn; about half of longer loops end with a fill."""
    found = STYLES[style]
    pattern = found.patterns[int(rng.integers(len(found.patterns)))]
    fill = bars >= 2 and rng.random() < 0.5
    step = bar_seconds(bpm) / STEPS
    tones = []
    for bar in range(bars):
        filling = fill and bar == bars - 1
        for drum, line in pattern.items():
            for place, mark in enumerate(line[:12] if filling else line):
                if mark == "." or (mark == "?" and rng.random() < 0.5):
                    continue
                tones.append(_hit(rng, DRUM_KEYS[drum], bar * STEPS + place, step, VELOCITY[mark], found, voice))
        if filling:
            tones += _fill(rng, bar * STEPS + 12, step, found, voice)
    return tones


def _hit(rng: np.random.Generator, key: int, place: int, step: float, velocity: int, style: Style, voice: int) -> Tone:
    pair = 2 * style.swung
    within = place % pair
    late = style.swing * (within if within <= style.swung else pair - within)
    human = abs(rng.normal(0, 0.003)) if place else 0.0
    return Tone(
        voice=voice,
        key=key,
        start=(place + late) * step + human,
        seconds=0.1,
        velocity=int(np.clip(velocity + rng.normal(0, 5), 20, 127)),
    )


def _fill(rng: np.random.Generator, place: int, step: float, style: Style, voice: int) -> list[Tone]:
    """Write four steps of snare or toms."""
    drums = ("snare",) if rng.random() < 0.5 else ("high tom", "tom", "low tom", "low tom")
    return [_hit(rng, DRUM_KEYS[drums[i % len(drums)]], place + i, step, 88 + 8 * i, style, voice) for i in range(4)]
