"""Plan clips: what is played or synthesised, how it is finished, and what it is called. Every kind is one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from sa3_torch.train.demo_set.synth import DRUMS
from sa3_torch.train.run.random import Purpose, generator

from .bands import BANDS, arrange, band_tempos
from .beats import STYLES, bar_seconds, drum_tones, tempos
from .effects import EFFECTS, Float, noise
from .finish import LONGEST, Ending
from .instruments import FLAT_CENTS, INSTRUMENTS, Instrument, Role, of_role
from .lines import BASS_PATTERNS, arpeggio, bass_line, melody, progression
from .scores import Score, Tone, Voice
from .splits import draw_of_side, side
from .theory import CHORDS, KEYS, NAMES, MusicalKey, note_name
from .wordings import Facts, captions, length_word, listing, mood_word, seconds_words, tempo_word

NOISES = ("white", "pink", "brown")
KITS = {0: "acoustic", 8: "acoustic", 16: "powerful", 24: "electronic", 25: "electronic", 32: "acoustic", 40: "brush"}
# One-shot drums: General MIDI keys, and the kits whose hits sound like their names.
HITS = {
    "kick": (35, 36),
    "snare": (38, 40),
    "clap": (39,),
    "rim": (37,),
    "closed hat": (42,),
    "open hat": (46,),
    "crash": (49, 57),
    "ride": (51, 59),
    "tom": (41, 43, 45, 47, 48, 50),
    "cowbell": (56,),
    "tambourine": (54,),
    "conga": (62, 63, 64),
    "shaker": (70,),
    "woodblock": (76, 77),
}
_SYNTHESISED = {"kick": "kick", "snare": "snare", "clap": "clap", "closed hat": "hihat", "crash": "crash", "tom": "tom"}


@dataclass(frozen=True, kw_only=True)
class ClipPlan:
    """Hold what a clip is made of: a ``score``, or a ``recipe`` that synthesises it, and all that is said of it."""

    kind: str
    label: str
    captions: tuple[str, ...]
    fields: dict[str, Any]
    ending: Ending
    score: Score | None = None
    recipe: Callable[[np.random.Generator], Float] | None = None
    instrument: str | None = None
    midi: int | None = None


@dataclass(frozen=True, kw_only=True)
class ClipPlace:
    """Say which clip is planned: generator, seed of the set, split, and why it is held out ("" in training).

    ``number`` counts the clips of its kind in the split.
    """

    rng: np.random.Generator
    seed: int
    split: str
    reason: str
    number: int

    @property
    def side(self) -> str:
        """Return the side that combinations are drawn of."""
        return self.split if self.reason == "combination" else "train"

    def words(self, kind: str, facts: dict[str, str | None]) -> tuple[str, ...]:
        """Word the clip; facts that are None are left out."""
        known: Facts = {name: text for name, text in facts.items() if text is not None}
        return captions(self.rng, kind, known, self.split if self.reason == "wording" else "train")

    def choose(self, draw: Callable[[], Any], combinations: Callable[[Any], list[tuple[object, ...]]]) -> Any:
        """Draw attributes whose combinations are of the clip's side."""
        return draw_of_side(draw, combinations, self.seed, self.side)


def _pick(rng: np.random.Generator, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _room(rng: np.random.Generator) -> float:
    return 0.0 if rng.random() < 0.6 else rng.uniform(0.35, 0.9)


def _level_word(velocity: int) -> str | None:
    return "soft" if velocity < 62 else "loud" if velocity > 112 else None


def _space(reverb: float) -> str | None:
    return "with reverb" if reverb > 0 else None


def _single(rng: np.random.Generator, instrument: Instrument, reverb: float) -> Voice:
    """Set up an instrument by itself: somewhere between the sides, out of tune by a few cents."""
    detuned = float(np.clip(rng.normal(0, 4), -9, 9))
    cents = detuned + FLAT_CENTS.get(instrument.name, 0)
    return Voice(program=instrument.program, pan=rng.uniform(-0.6, 0.6), reverb=reverb, cents=cents)


@cache
def _note_pairs(seed: int, wanted: str) -> list[tuple[Instrument, int]]:
    """Return all (instrument, MIDI pitch) of a side, in random order."""
    pairs = [(i, midi) for i in INSTRUMENTS.values() for midi in range(i.low, i.high + 1)]
    order = generator(seed, Purpose.MUSIC_NOTES).permutation(len(pairs))
    return [pairs[i] for i in order if side(seed, "note", pairs[i][0].name, pairs[i][1]) == wanted]


def note(place: ClipPlace) -> ClipPlan:
    """Plan a note; instruments and pitches come in turn, each pair equally often."""
    rng = place.rng
    pairs = _note_pairs(place.seed, place.side)
    instrument, midi = pairs[place.number % len(pairs)]
    velocity, reverb = int(rng.integers(45, 124)), _room(rng)
    held = rng.uniform(0.3, 3.2) if instrument.sustained else rng.uniform(0.2, 2.6)
    tone = Tone(voice=0, key=midi, start=0.0, seconds=held, velocity=velocity)
    facts = {
        "instrument": instrument.name,
        "pitch": note_name(midi),
        "length": length_word(held),
        "level": _level_word(velocity),
        "space": _space(reverb),
    }
    return ClipPlan(
        kind="note",
        label="note",
        instrument=instrument.name,
        midi=midi,
        captions=place.words("note", facts),
        fields={"family": instrument.family, "velocity": velocity},
        ending=Ending(seconds=min(held + 2.0, 5.0), onset=True),
        score=Score(voices=(_single(rng, instrument, reverb),), tones=(tone,), seconds=min(held + 2.0, 5.0)),
    )


def chord(place: ClipPlace) -> ClipPlan:
    """Plan a chord of an instrument, in one of three positions."""
    rng = place.rng
    instrument, root, quality = place.choose(
        lambda: (_pick(rng, of_role("chord")), int(rng.integers(12)), _pick(rng, tuple(CHORDS))),
        lambda found: [("chord", found[0].name, found[1], found[2])],
    )
    bottom = int(np.clip(48 + root + 12 * rng.integers(-1, 2), instrument.low, instrument.high - 12))
    bottom += (root - bottom) % 12
    keys = [bottom + step for step in CHORDS[quality]]
    if rng.random() < 0.3:  # the root an octave lower as well, or the first tone an octave up
        keys = [*keys, bottom - 12] if bottom - 12 >= instrument.low else [*keys[1:], keys[0] + 12]
    velocity, reverb, held = int(rng.integers(50, 118)), _room(rng), rng.uniform(0.5, 3.2)
    strum = rng.uniform(0.0, 0.03) if instrument.family == "guitar" else 0.0
    tones = tuple(
        Tone(voice=0, key=int(key), start=i * strum, seconds=held, velocity=velocity)
        for i, key in enumerate(sorted(keys))
    )
    name = f"{NAMES[root]} {quality}"
    facts = {
        "instrument": instrument.name,
        "chord": name,
        "length": length_word(held),
        "level": _level_word(velocity),
        "space": _space(reverb),
    }
    return ClipPlan(
        kind="chord",
        label="chord",
        instrument=instrument.name,
        midi=bottom,
        captions=place.words("chord", facts),
        fields={"chord": name, "family": instrument.family},
        ending=Ending(seconds=min(held + 2.0, 5.0), onset=True),
        score=Score(voices=(_single(rng, instrument, reverb),), tones=tones, seconds=min(held + 2.0, 5.0)),
    )


def _bars(rng: np.random.Generator, bpm: int, longest: float) -> int:
    """Draw 1, 2 or 4 bars, those that fit; longer ones more often."""
    fit = [bars for bars in (1, 2, 4) if bars * bar_seconds(bpm) <= longest]
    return int(rng.choice(fit, p=np.array(fit) / sum(fit)))


def _line(place: ClipPlace, role: Role) -> ClipPlan:
    """Plan a melody, an arpeggio or a bass line, whole bars that ring out."""
    rng = place.rng
    instrument, key = place.choose(
        lambda: (_pick(rng, of_role(role)), _pick(rng, KEYS)), lambda found: [(role, found[0].name, found[1].name)]
    )
    bpm = 2 * int(rng.integers(35, 86))
    bars = max(2, _bars(rng, bpm, LONGEST - 2.0)) if bpm >= 100 else _bars(rng, bpm, LONGEST - 2.0)
    chords, reverb, level = progression(rng, key, bars), _room(rng), int(rng.integers(70, 112))
    length = float(rng.choice([0.4, 0.9, 1.0], p=[0.2, 0.5, 0.3]))
    pattern = _pick(rng, tuple(BASS_PATTERNS))
    if role == "bass":
        tones = bass_line(rng, instrument, key, chords, pattern, bpm=bpm, level=level, length=length)
    else:
        write = melody if role == "melody" else arpeggio
        tones = write(rng, instrument, key, chords, bpm=bpm, level=level, length=length)
    seconds = bars * bar_seconds(bpm)
    facts = {
        "instrument": instrument.name,
        "line": f"{instrument.name}{'' if instrument.family == 'bass' else ' bass'} line",
        **_facts_of_music(rng, key, bpm, seconds),
        "touch": {0.4: "staccato", 1.0: "legato"}.get(length),
        "pattern": pattern if pattern in ("walking", "funky", "offbeat") else None,
        "space": _space(reverb),
    }
    return ClipPlan(
        kind="line",
        label=role,
        instrument=instrument.name,
        captions=place.words(role, facts),
        fields={"key": key.name, "bpm": bpm, "bars": bars, "family": instrument.family},
        ending=Ending(seconds=min(seconds + 1.5, LONGEST)),
        score=Score(voices=(_single(rng, instrument, reverb),), tones=tuple(tones), seconds=seconds + 1.5),
    )


def _facts_of_music(rng: np.random.Generator, key: MusicalKey, bpm: int, seconds: float) -> dict[str, str | None]:
    return {
        "key": key.name,
        "bpm": str(bpm),
        "speed": tempo_word(bpm),
        "mood": mood_word(rng, key.mode, bpm),
        "seconds": seconds_words(seconds),
    }


def melody_line(place: ClipPlace) -> ClipPlan:
    """Plan a melody."""
    return _line(place, "melody")


def arpeggio_line(place: ClipPlace) -> ClipPlan:
    """Plan an arpeggio."""
    return _line(place, "arpeggio")


def bass(place: ClipPlace) -> ClipPlan:
    """Plan a bass line."""
    return _line(place, "bass")


def loop(place: ClipPlace) -> ClipPlan:
    """Plan a drum loop of whole bars, cut exactly at the end of the last."""
    rng = place.rng

    def draw() -> tuple[str, int]:
        style = _pick(rng, tuple(STYLES))
        return style, int(_pick(rng, tempos(style)))

    style, bpm = place.choose(draw, lambda found: [("loop", found[0], found[1] // 4)])
    kit, bars, reverb = int(_pick(rng, STYLES[style].kits)), _bars(rng, bpm, LONGEST), rng.uniform(0, 0.25)
    tones = drum_tones(rng, style, bpm, bars, 0)
    seconds = bars * bar_seconds(bpm)
    facts = {
        "style": style,
        "bpm": str(bpm),
        "speed": tempo_word(bpm),
        "bars": {1: "one bar", 2: "two bars", 4: "four bars"}[bars],
        "sound": KITS[kit],
    }
    return ClipPlan(
        kind="loop",
        label="loop",
        captions=place.words("loop", facts),
        fields={"style": style, "bpm": bpm, "bars": bars, "kit": kit},
        ending=Ending(seconds=seconds, exact=True),
        score=Score(voices=(Voice(program=kit, reverb=reverb, drums=True),), tones=tuple(tones), seconds=seconds),
    )


def music(place: ClipPlace) -> ClipPlan:
    """Plan an arrangement of a band, whole bars, some cut at the end and some ringing out."""
    rng = place.rng

    def draw() -> tuple[str, MusicalKey, int]:
        style = _pick(rng, tuple(BANDS))
        keys = [key for key in KEYS if key.mode in BANDS[style].modes]
        return style, _pick(rng, keys), int(_pick(rng, band_tempos(style)))

    style, key, bpm = place.choose(
        draw, lambda found: [("music", found[0], found[1].name), ("music", found[0], found[2] // 4)]
    )
    most = [bars for bars in (2, 3, 4, 6, 8) if bars * bar_seconds(bpm) <= LONGEST - 1.0]
    bars = int(_pick(rng, most[-2:]))
    made, seconds, ringing = arrange(rng, style, key, bpm, bars), bars * bar_seconds(bpm), rng.random() < 0.5
    facts = {
        "style": style,
        **_facts_of_music(rng, key, bpm, seconds),
        "players": listing(made.players),
        "lead": made.players[0],
    }
    return ClipPlan(
        kind="music",
        label="music",
        captions=place.words("music", facts),
        fields={"style": style, "key": key.name, "bpm": bpm, "bars": bars, "players": list(made.players)},
        ending=Ending(seconds=min(seconds + 2.0, LONGEST)) if ringing else Ending(seconds=seconds, exact=True),
        score=made.score,
    )


def drum(place: ClipPlace) -> ClipPlan:
    """Plan a one-shot of a drum, from a kit or synthesised."""
    rng = place.rng

    def draw() -> tuple[str, int, int]:
        name = _pick(rng, tuple(HITS))
        return name, int(_pick(rng, tuple(KITS))), int(_pick(rng, HITS[name]))

    name, kit, key = place.choose(draw, lambda found: [("drum", *found)])
    velocity, reverb = int(rng.integers(60, 127)), 0.6 if rng.random() < 0.2 else 0.0
    words = place.words("drum", {"drum": name, "level": _level_word(velocity), "space": _space(reverb)})
    if name in _SYNTHESISED and not reverb and place.side == "train" and rng.random() < 0.4:
        make, angle = DRUMS[_SYNTHESISED[name]], rng.uniform(0.35, 0.65) * np.pi / 2
        return ClipPlan(
            kind="drum",
            label=name,
            captions=words,
            fields={"synthesised": True},
            ending=Ending(seconds=4.0, onset=True),
            recipe=lambda own: make(own).astype(np.float64)[:, None] * np.array([np.cos(angle), np.sin(angle)]),
        )
    tone = Tone(voice=0, key=key, start=0.0, seconds=1.0, velocity=velocity)
    voice = Voice(program=kit, pan=rng.uniform(-0.3, 0.3), reverb=reverb, drums=True)
    return ClipPlan(
        kind="drum",
        label=name,
        captions=words,
        fields={"kit": kit, "hit": key},
        ending=Ending(seconds=4.0, onset=True),
        score=Score(voices=(voice,), tones=(tone,), seconds=4.0),
    )


def effect(place: ClipPlace) -> ClipPlan:
    """Plan a riser, texture, signal or the like; only takes and wordings are held out."""
    name = _pick(place.rng, tuple(EFFECTS))
    return ClipPlan(
        kind="effect",
        label=name,
        captions=place.words("effect", {"effect": name}),
        fields={},
        ending=Ending(seconds=9.0),
        recipe=EFFECTS[name],
    )


def coloured(place: ClipPlace) -> ClipPlan:
    """Plan a noise of a colour; only takes and wordings are held out."""
    colour = _pick(place.rng, NOISES)
    return ClipPlan(
        kind="noise",
        label=colour,
        captions=place.words("noise", {"effect": f"{colour} noise"}),
        fields={},
        ending=Ending(seconds=9.0),
        recipe=lambda rng: noise(rng, colour),
    )
