"""List the prompts that a quantization is calibrated on and judged by, and make runs of them.

Every fourth prompt only judges. A file of prompts has one a line, with its length before it: "8 rain on tin".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.generation.request import PROMPT_MAX, Inpaint, Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.text.tokenizer import Tokenizer

BATCH = 4  # clips of a run, all of one length, so that no frame is padding
HELD_OUT_EVERY = 4
STEPS_MAX = 16  # longer runs visit no other states, only more of them
FIRST_SEED = 7_000_000  # away from the seeds of people and of benchmarks
SENSITIVITY_STATES = 12  # about so many are enough to rank layers


@dataclass(frozen=True)
class CalibrationPrompt:
    """Hold a text and the length of its clip in seconds."""

    seconds: float
    text: str


GENERAL = tuple(
    CalibrationPrompt(seconds, text)
    for seconds, text in (
        (8, "warm lo-fi hip hop beat with vinyl crackle and mellow electric piano, 84 BPM"),
        (8, "solo grand piano, slow and sad, in a large hall"),
        (8, "driving techno with a rolling bass line and sharp hi-hats, 132 BPM"),
        (8, "acoustic guitar fingerpicking, close microphone, gentle"),
        (8, "heavy rain on a tin roof with distant thunder"),
        (8, "footsteps on gravel, then a wooden door that creaks open"),
        (8, "city street at night, cars passing, muffled voices"),
        (8, "glass breaking on a stone floor"),
        (20, "orchestral film score, strings and brass, rising tension"),
        (20, "ambient drone, evolving pads, no drums"),
        (20, "funk with slap bass, clavinet and a tight drum kit, 108 BPM"),
        (20, "ocean waves on a pebble beach, seagulls"),
        (20, "jazz trio, brushed drums, upright bass, piano solo"),
        (20, "steam train leaving a station, whistle"),
        (20, "drum and bass, fast breakbeat, deep sub bass, 174 BPM"),
        (20, "birds in a forest at dawn, a stream in the background"),
    )
)
DEMO = tuple(
    CalibrationPrompt(seconds, text)
    for seconds, text in (
        (1.5, "piano note C4"),
        (1.5, "violin note E4"),
        (1.5, "organ note G3"),
        (1.5, "flute note B4"),
        (1.5, "guitar note D3"),
        (1.5, "trumpet note F4"),
        (1.5, "marimba note B3"),
        (1.5, "vibraphone note C4"),
        (1.5, "white noise"),
        (1.5, "violin note G4"),
        (1.5, "piano note F3"),
        (1.5, "trumpet note A3"),
        (2.0, "piano chord C major"),
        (2.0, "organ chord F minor"),
        (2.0, "guitar chord G major"),
        (2.0, "piano chord E minor"),
        (2.0, "organ chord D major"),
        (2.0, "guitar chord A minor"),
        (2.0, "brown noise"),
        (2.0, "pink noise"),
        (0.8, "kick drum"),
        (0.8, "snare drum"),
        (0.8, "closed hi-hat"),
        (0.8, "hand clap"),
        (0.8, "crash cymbal"),
        (0.8, "tom drum"),
        (0.8, "guitar note E4"),
        (0.8, "marimba note D4"),
    )
)


def read_prompts(path: Path) -> tuple[CalibrationPrompt, ...]:
    """Read lines of "SECONDS TEXT"; empty ones and those that start with # are skipped.

    Raises FileNotFoundError, and ValueError for a file that is not UTF-8, for a line that is none, and for fewer than
    four prompts.
    """
    found = []
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8") from error
    for number, line in enumerate(lines, 1):
        seconds, _, text = line.strip().partition(" ")
        if not seconds or seconds.startswith("#"):
            continue
        try:
            length = float(seconds)
        except ValueError:
            length = math.nan
        if not 0 < length < math.inf:
            raise ValueError(f"{path}: line {number}: expected SECONDS TEXT, such as '8 rain on tin'")
        if len(text) > PROMPT_MAX:
            raise ValueError(f"{path}: line {number}: {len(text):,} characters; allowed are up to {PROMPT_MAX:,}")
        found.append(CalibrationPrompt(length, text.strip()))
    if len(found) < HELD_OUT_EVERY:
        raise ValueError(f"{path}: has {len(found)} prompts; at least {HELD_OUT_EVERY} are needed")
    return tuple(found)


def usual_prompts(tokenizer: Tokenizer) -> tuple[CalibrationPrompt, ...]:
    """Return the prompts of the demo sounds for a model that knows no other words, else music and effects."""
    knows_demo = not any(tokenizer.unknown(prompt.text) for prompt in DEMO)
    return DEMO if tokenizer.closed_vocabulary() and knows_demo else GENERAL


def requests(prompts: Sequence[CalibrationPrompt], config: ModelConfig, *, held_out: bool) -> list[Request]:
    """Return the runs, with the model's usual sampling, of the prompts that judge (``held_out``) or of the others."""
    chosen = [
        (number, prompt)
        for number, prompt in enumerate(prompts)
        if (number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out
    ]
    usual, longest = config.usual_sampling, config.max_seconds / 2
    sampling = replace(usual, steps=min(usual.steps, STEPS_MAX))
    groups: dict[float, list[Item]] = {}
    for number, prompt in chosen:
        seconds = min(prompt.seconds, longest)
        item = Item(prompt=prompt.text, seconds=seconds, seed=FIRST_SEED + number)
        groups.setdefault(seconds, []).append(item)
    return [
        Request(items=tuple(items[start : start + BATCH]), sampling=sampling)
        for items in groups.values()
        for start in range(0, len(items), BATCH)
    ]


def continued(request: Request, audio: Sequence[NDArray[np.float32]]) -> Request:
    """Return the request for the same clips with the first half of ``audio``, what came out, kept.

    Some layers work only where audio is kept.
    """
    kept = tuple(
        Inpaint(audio=sound, regions=((item.seconds / 2, item.seconds),))
        for sound, item in zip(audio, request.items, strict=True)
    )
    return replace(request, inpaint=kept)
