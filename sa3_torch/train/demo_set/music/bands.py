"""Write small arrangements: drums, bass, chords and a melody, panned, in styles that one would name."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .beats import bar_seconds, drum_tones
from .instruments import INSTRUMENTS
from .lines import arpeggio, bass_line, comping, melody, progression
from .scores import Score, Tone, Voice
from .theory import MusicalKey


@dataclass(frozen=True, kw_only=True)
class Band:
    """Describe a style of music: ``drums`` is a style of ``beats``, None plays without."""

    slowest: int  # bpm
    fastest: int
    drums: str | None
    kits: tuple[int, ...]
    basses: tuple[str, ...]
    bass_patterns: tuple[str, ...]
    chords: tuple[str, ...]
    comping: tuple[str, ...]
    leads: tuple[str, ...]
    modes: tuple[str, ...] = ("major", "minor")
    reverb: float = 0.25


BANDS: dict[str, Band] = {
    "rock": Band(
        slowest=100,
        fastest=144,
        drums="rock",
        kits=(0, 16),
        basses=("electric bass",),
        bass_patterns=("eighths", "roots"),
        chords=("electric guitar", "organ"),
        comping=("eighths", "quarters", "halves"),
        leads=("distorted guitar", "electric guitar"),
    ),
    "pop": Band(
        slowest=88,
        fastest=124,
        drums="rock",
        kits=(0, 8),
        basses=("electric bass",),
        bass_patterns=("roots", "eighths", "fifths"),
        chords=("piano", "acoustic guitar", "electric piano"),
        comping=("quarters", "halves", "stabs"),
        leads=("flute", "synth lead", "violin", "piano"),
    ),
    "jazz": Band(
        slowest=104,
        fastest=160,
        drums="jazz",
        kits=(32, 40),
        basses=("acoustic bass",),
        bass_patterns=("walking",),
        chords=("piano", "electric guitar"),
        comping=("charleston", "whole"),
        leads=("saxophone", "trumpet", "vibraphone", "clarinet"),
    ),
    "bossa nova": Band(
        slowest=112,
        fastest=144,
        drums="bossa nova",
        kits=(0, 40),
        basses=("acoustic bass",),
        bass_patterns=("fifths",),
        chords=("acoustic guitar",),
        comping=("bossa",),
        leads=("flute", "saxophone", "piano"),
    ),
    "house": Band(
        slowest=118,
        fastest=130,
        drums="house",
        kits=(24, 25),
        basses=("synth bass",),
        bass_patterns=("offbeat", "octaves"),
        chords=("piano", "synth pad", "organ"),
        comping=("stabs", "offbeat"),
        leads=("synth lead", "square lead"),
    ),
    "techno": Band(
        slowest=126,
        fastest=146,
        drums="techno",
        kits=(24,),
        basses=("synth bass",),
        bass_patterns=("offbeat", "eighths"),
        chords=("synth pad",),
        comping=("whole", "stabs"),
        leads=("square lead", "synth lead"),
        modes=("minor",),
    ),
    "hip hop": Band(
        slowest=74,
        fastest=102,
        drums="hip hop",
        kits=(0, 25),
        basses=("synth bass", "electric bass"),
        bass_patterns=("funky", "long", "fifths"),
        chords=("electric piano", "piano"),
        comping=("whole", "halves", "charleston"),
        leads=("vibraphone", "flute", "electric piano"),
        modes=("minor",),
    ),
    "reggae": Band(
        slowest=70,
        fastest=92,
        drums="reggae",
        kits=(0,),
        basses=("electric bass",),
        bass_patterns=("one drop",),
        chords=("electric guitar", "organ"),
        comping=("offbeat",),
        leads=("trombone", "harmonica", "organ"),
    ),
    "funk": Band(
        slowest=94,
        fastest=116,
        drums="funk",
        kits=(0, 8),
        basses=("slap bass", "electric bass"),
        bass_patterns=("funky",),
        chords=("electric guitar", "electric piano"),
        comping=("stabs", "charleston"),
        leads=("brass section", "saxophone", "trumpet"),
    ),
    "disco": Band(
        slowest=110,
        fastest=126,
        drums="disco",
        kits=(0, 8),
        basses=("electric bass",),
        bass_patterns=("octaves",),
        chords=("string ensemble", "electric guitar"),
        comping=("quarters", "stabs"),
        leads=("brass section", "violin"),
    ),
    "drum and bass": Band(
        slowest=154,
        fastest=170,
        drums="drum and bass",
        kits=(0, 24),
        basses=("synth bass",),
        bass_patterns=("long", "fifths"),
        chords=("synth pad", "electric piano"),
        comping=("whole",),
        leads=("synth lead", "square lead"),
        modes=("minor",),
    ),
    "metal": Band(
        slowest=140,
        fastest=170,
        drums="metal",
        kits=(16,),
        basses=("electric bass",),
        bass_patterns=("eighths",),
        chords=("distorted guitar",),
        comping=("eighths", "quarters"),
        leads=("distorted guitar",),
        modes=("minor",),
        reverb=0.1,
    ),
    "samba": Band(
        slowest=98,
        fastest=122,
        drums="samba",
        kits=(0,),
        basses=("acoustic bass",),
        bass_patterns=("fifths",),
        chords=("acoustic guitar", "piano"),
        comping=("bossa", "stabs"),
        leads=("flute", "trumpet"),
        modes=("major",),
    ),
    "ambient": Band(
        slowest=70,
        fastest=92,
        drums=None,
        kits=(),
        basses=("synth bass", "cello"),
        bass_patterns=("long",),
        chords=("synth pad", "choir"),
        comping=("whole",),
        leads=("celesta", "music box", "harp", "electric piano"),
        reverb=0.7,
    ),
    "classical": Band(
        slowest=70,
        fastest=132,
        drums=None,
        kits=(),
        basses=("cello", "bassoon"),
        bass_patterns=("roots", "walking"),
        chords=("string ensemble", "harpsichord", "piano"),
        comping=("halves", "quarters", "whole"),
        leads=("violin", "flute", "oboe", "clarinet", "french horn"),
        reverb=0.4,
    ),
    "folk": Band(
        slowest=84,
        fastest=128,
        drums=None,
        kits=(),
        basses=("acoustic bass",),
        bass_patterns=("fifths", "roots"),
        chords=("acoustic guitar", "accordion"),
        comping=("quarters", "eighths"),
        leads=("violin", "harmonica", "banjo", "flute"),
        modes=("major",),
        reverb=0.15,
    ),
}


def band_tempos(style: str) -> range:
    """Return the tempos of a style in bpm: even numbers."""
    return range(BANDS[style].slowest, BANDS[style].fastest + 1, 2)


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Hold a score and the names of what plays in it, the lead first; drums are called "drums"."""

    score: Score
    players: tuple[str, ...]


def arrange(rng: np.random.Generator, style: str, key: MusicalKey, bpm: int, bars: int) -> Arrangement:
    """Write an arrangement: bass in the middle, chords and lead on opposite sides; now and then a part is silent."""
    band = BANDS[style]
    bass, harmony, lead = (str(rng.choice(names)) for names in (band.basses, band.chords, band.leads))
    side = float(rng.choice([-1, 1])) * rng.uniform(0.25, 0.75)
    chords = progression(rng, key, bars)
    voices: list[Voice] = []
    players: list[str] = []
    tones: list[Tone] = []

    def voice(name: str, pan: float, volume: float, reverb: float) -> int:
        voices.append(Voice(program=INSTRUMENTS[name].program, pan=pan, volume=volume, reverb=reverb))
        players.append(name)
        return len(voices) - 1

    if rng.random() < 0.85:
        number, level = voice(lead, side, rng.uniform(0.72, 0.9), band.reverb), int(rng.integers(88, 112))
        write = arpeggio if lead in ("harp", "music box") and rng.random() < 0.5 else melody
        tones += write(rng, INSTRUMENTS[lead], key, chords, bpm=bpm, level=level, length=0.9, voice=number)
    if not players or rng.random() < 0.92:
        number = voice(harmony, -side, rng.uniform(0.5, 0.68), band.reverb)
        near = int(np.clip(60 + rng.integers(-4, 5), INSTRUMENTS[harmony].low + 7, INSTRUMENTS[harmony].high - 7))
        tones += comping(rng, key, chords, str(rng.choice(band.comping)), bpm=bpm, level=82, near=near, voice=number)
    number = voice(bass, 0.0, rng.uniform(0.75, 0.9), 0.0)
    pattern = str(rng.choice(band.bass_patterns))
    tones += bass_line(rng, INSTRUMENTS[bass], key, chords, pattern, bpm=bpm, level=98, length=0.9, voice=number)
    if band.drums is not None:
        voices.append(Voice(program=int(rng.choice(band.kits)), volume=rng.uniform(0.7, 0.85), drums=True))
        players.append("drums")
        tones += drum_tones(rng, band.drums, bpm, bars, len(voices) - 1)
    seconds = bars * bar_seconds(bpm)
    return Arrangement(
        score=Score(voices=tuple(voices), tones=tuple(tones), seconds=seconds + 2.0), players=tuple(players)
    )
