"""Word captions: templates for each kind of clip, filled with what was written, some facts named and some left out.

In a template ``{name}`` is a fact, and what stands in square brackets is kept half of the time, or left out where its
fact is missing. The last two templates of a kind are held out: one for validation, one for the test.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

Facts = Mapping[str, str]

# The first template states all that is judged. Training draws from all but the last two.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "note": (
        "{instrument} note {pitch}",
        "{instrument} {pitch}",
        "{pitch} {instrument}",
        "a [{level} ]{instrument} note, {pitch}[, {length}]",
        "a single {instrument} note {pitch}",
        "{length} {instrument} note {pitch}",
        "[{level} ]{instrument} playing {pitch}[ {space}]",
        "one {instrument} tone at {pitch}",
        "{pitch} played on {instrument}",
        "{level} {instrument} {pitch}[ {space}]",
        "{instrument} plays {pitch}",
        "{pitch} note of {instrument}",
    ),
    "chord": (
        "{instrument} chord {chord}",
        "{instrument} {chord}",
        "{chord} {instrument}",
        "a [{level} ]{chord} chord on {instrument}",
        "{chord} chord played on {instrument}[, {length}]",
        "{instrument} playing a {chord} chord",
        "a {length} {instrument} chord, {chord}",
        "[{level} ]{chord} chord, {instrument}[ {space}]",
        "{instrument} plays {chord}",
        "one {chord} chord of {instrument}",
    ),
    "melody": (
        "{instrument} melody in {key}, {bpm} bpm",
        "{instrument} melody in {key}",
        "{instrument} melody",
        "a [{speed} ][{mood} ]{instrument} melody in {key}, {bpm} bpm",
        "[{mood} ]{instrument} solo in {key}[ at {bpm} bpm]",
        "{speed} {instrument} tune[ in {key}][, {touch}]",
        "a {mood} {instrument} melody[ at {bpm} bpm]",
        "solo {instrument}, {key}, {bpm} bpm[, {mood}]",
        "{touch} {instrument} melody in {key}[ {space}]",
        "{instrument} playing a [{mood} ]melody in {key}, {bpm} bpm[, {seconds}]",
        "{key} melody on {instrument}[, {speed}]",
        "melody for {instrument} in {key}, {bpm} bpm",
        "a [{mood} ]tune played on {instrument} in {key} at {bpm} bpm",
    ),
    "arpeggio": (
        "{instrument} arpeggio in {key}, {bpm} bpm",
        "{instrument} arpeggio in {key}",
        "{instrument} arpeggio",
        "a [{speed} ][{mood} ]{instrument} arpeggio in {key}, {bpm} bpm",
        "[{mood} ]arpeggios on {instrument}[ in {key}][, {bpm} bpm]",
        "broken chords on {instrument} in {key}[ at {bpm} bpm]",
        "{instrument} playing {speed} arpeggios[ in {key}][ {space}]",
        "arpeggio, {instrument}, {key}, {bpm} bpm[, {seconds}]",
        "{key} arpeggio played on {instrument}[ at {bpm} bpm]",
        "{instrument} plays broken chords in {key}, {bpm} bpm",
    ),
    "bass": (
        "{line} in {key}, {bpm} bpm",
        "{line} in {key}",
        "{line}",
        "a [{speed} ][{mood} ]{line} in {key}, {bpm} bpm",
        "bass line on {instrument}[ in {key}][ at {bpm} bpm]",
        "{pattern} {line}[ in {key}][, {bpm} bpm]",
        "{instrument} playing a [{pattern} ]bass line in {key}[, {seconds}]",
        "bass line, {instrument}, {key}, {bpm} bpm",
        "{key} {line} at {bpm} bpm",
        "{instrument} plays a bass line in {key}, {bpm} bpm",
    ),
    "loop": (
        "{style} drum loop, {bpm} bpm",
        "{style} drums, {bpm} bpm",
        "{style} beat",
        "drum loop, {bpm} bpm",
        "a [{speed} ]{style} drum loop at {bpm} bpm",
        "{style} beat, {bpm} bpm[, {bars}]",
        "[{bars} ]{style} drum loop",
        "{bpm} bpm {style} beat",
        "a {style} groove[ at {bpm} bpm][, {sound} drums]",
        "{speed} {style} drums",
        "{sound} {style} drums, {bpm} bpm",
        "{style} rhythm, {bpm} bpm",
        "{bpm} bpm {style} drum beat",
        "drums playing {style} at {bpm} bpm",
    ),
    "music": (
        "{style} in {key}, {bpm} bpm",
        "{style}, {bpm} bpm",
        "{style} music",
        "a [{speed} ][{mood} ]{style} piece in {key}, {bpm} bpm",
        "{style} with {players}[, {bpm} bpm]",
        "[{mood} ]{style} music with {players} in {key}",
        "{mood} {style} song[ in {key}][ at {bpm} bpm]",
        "{style} band with {players}, {key}, {bpm} bpm",
        "{speed} {style} track[ in {key}][, {seconds}]",
        "{players} playing {style}[ in {key}][ at {bpm} bpm]",
        "{mood} {style} with {lead}, {bpm} bpm",
        "{lead} and band, {style}, {key}, {bpm} bpm[, {seconds}]",
        "instrumental {style} in {key} at {bpm} bpm",
        "a [{mood} ]{style} tune with {players} at {bpm} bpm",
    ),
    "drum": (
        "{drum}",
        "{drum} hit",
        "a [{level} ]{drum}",
        "single {drum}",
        "{level} {drum}",
        "{drum} one shot[ {space}]",
        "{drum} sample",
        "one {drum} hit",
        "a {drum} sound",
    ),
    "effect": (
        "{effect}",
        "a {effect}",
        "{length} {effect}",
        "{effect} sound effect[, {seconds}]",
        "a {length} {effect} sound",
        "{effect} sound",
        "sound of {effect}",
        "{effect} effect",
    ),
    "noise": (
        "{effect}",
        "{length} {effect}",
        "steady {effect}[, {seconds}]",
        "a {length} stretch of {effect}",
        "{effect} sound",
        "sound of {effect}",
    ),
    "sample": ("{what}", "a {what}", "{what} sample", "{what} sound", "recording of {what}", "sound of {what}"),
}
# What else an instrument, a drum or an effect is called. The name itself is said half of the time.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "piano": ("grand piano", "acoustic piano"),
    "electric piano": ("rhodes",),
    "organ": ("church organ", "pipe organ"),
    "acoustic guitar": ("guitar", "nylon guitar"),
    "electric guitar": ("clean electric guitar",),
    "distorted guitar": ("distorted electric guitar", "rock guitar"),
    "acoustic bass": ("upright bass", "double bass"),
    "electric bass": ("bass guitar",),
    "string ensemble": ("strings",),
    "choir": ("voices",),
    "french horn": ("horn",),
    "brass section": ("brass",),
    "saxophone": ("sax",),
    "synth lead": ("saw lead", "synthesizer"),
    "square lead": ("square synth",),
    "synth pad": ("warm pad", "pad"),
    "kick": ("kick drum", "bass drum"),
    "snare": ("snare drum",),
    "clap": ("hand clap",),
    "closed hat": ("closed hi-hat", "hi-hat"),
    "open hat": ("open hi-hat",),
    "crash": ("crash cymbal",),
    "ride": ("ride cymbal",),
    "tom": ("tom drum",),
    "rim": ("rim shot", "side stick"),
    "riser": ("rising sweep", "build up"),
    "fall": ("falling sweep", "downward sweep", "drop"),
    "impact": ("boom", "deep hit"),
    "drone": ("dark drone", "low drone"),
    "wind": ("blowing wind",),
    "ocean": ("ocean waves", "sea"),
    "rain": ("falling rain",),
    "crackle": ("vinyl crackle",),
    "laser": ("laser zap", "zap"),
    "beep": ("electronic beep",),
    "glitch": ("digital glitch",),
}
# Said before some captions of training: most are words that the model has no entry for, so it learns to pass over them.
FILLERS = ("please make", "i want", "give me", "generate", "high quality", "create", "studio recording of", "nice")
_FILLED, _SYNONYM, _KEPT = 0.08, 0.35, 0.5
_ALTERNATIVES = 5  # captions of a training clip beside the first


def templates(kind: str, wording: str) -> tuple[str, ...]:
    """Return the templates of ``wording``: "train", "validation" or "test"."""
    every = TEMPLATES[kind]
    return {"train": every[:-2], "validation": every[-2:-1], "test": every[-1:]}[wording]


def captions(rng: np.random.Generator, kind: str, facts: Facts, wording: str) -> tuple[str, ...]:
    """Word a clip: for "train" the plainest caption that states all, then others; for the rest the held-out one."""
    choices = [text for text in templates(kind, wording) if _needs(text) <= facts.keys()]
    if not choices:  # its fact is missing from this clip: the plainest caption
        choices = list(templates(kind, "train")[:1])
    found = [_fill(rng, choices[0], facts, plain=wording == "train")]
    if wording == "train":
        for _ in range(_ALTERNATIVES):
            text = _fill(rng, choices[int(rng.integers(len(choices)))], facts, plain=False)
            if rng.random() < _FILLED:
                text = f"{FILLERS[int(rng.integers(len(FILLERS)))]} {re.sub('^an? (?=[a-z])', '', text)}"
            found.append(text)
    return tuple(dict.fromkeys(found))


def _needs(template: str) -> set[str]:
    """Return the facts that stand outside of brackets."""
    return set(re.findall(r"{(\w+)}", re.sub(r"\[[^]]*]", "", template)))


def _fill(rng: np.random.Generator, template: str, facts: Facts, *, plain: bool) -> str:
    """Fill a template; ``plain``: no other names."""

    def optional(match: re.Match[str]) -> str:
        part = match.group(1)
        kept = rng.random() < _KEPT
        return part if kept and set(re.findall(r"{(\w+)}", part)) <= facts.keys() else ""

    def fact(match: re.Match[str]) -> str:
        text = facts[match.group(1)]
        other = rng.random() < _SYNONYM
        names = OTHER_NAMES.get(text, ())
        return names[int(rng.integers(len(names)))] if names and other and not plain else text

    text = re.sub(r"{(\w+)}", fact, re.sub(r"\[([^]]*)]", optional, template))
    return re.sub(r"\ba (?=[aeiou](?![#\d]|\s(?:major|minor|seventh|suspended|diminished)))", "an ", text).strip()


def tempo_word(bpm: int) -> str | None:
    """Return "slow" below 86, "fast" above 134 bpm."""
    return "slow" if bpm < 86 else "fast" if bpm > 134 else None


def mood_word(rng: np.random.Generator, mode: str, bpm: int) -> str:
    """Draw a word that mode and tempo suggest."""
    slow, fast = bpm < 96, bpm > 124
    words = {
        "minor": ("sad", "melancholic", "gloomy")
        if slow
        else ("dark", "tense", "dramatic")
        if fast
        else ("dark", "sad"),
        "major": ("calm", "peaceful", "gentle")
        if slow
        else ("happy", "cheerful", "bright")
        if fast
        else ("happy", "warm"),
    }[mode]
    return words[int(rng.integers(len(words)))]


def length_word(seconds: float) -> str | None:
    """Return "short" below 0.8 s, "long" above 2.5 s."""
    return "short" if seconds < 0.8 else "long" if seconds > 2.5 else None


def seconds_words(seconds: float) -> str:
    """Return the length in whole seconds: "8 seconds"."""
    whole = max(1, round(seconds))
    return f"{whole} second{'s' if whole > 1 else ''}"


def listing(names: tuple[str, ...]) -> str:
    """Join names: "piano, bass and drums"."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
