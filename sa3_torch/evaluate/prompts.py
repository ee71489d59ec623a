"""List held-out prompts of the demo sounds, and make sounds of them with a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.train.demo_set.sounds import (
    DRUM_CAPTIONS,
    chord_captions,
    held_out_chords,
    held_out_notes,
    note_captions,
)
from sa3_torch.train.demo_set.synth import NOISES

SECONDS = {"note": 1.5, "chord": 2.0, "noise": 1.5}
DRUM_SECONDS = {  # medians of the kits' real hits: a crash that is cut after a second is no crash
    "kick": 0.35,
    "snare": 0.4,
    "clap": 0.4,
    "hihat": 0.35,
    "crash": 3.9,
    "tom": 0.8,
}


@dataclass(frozen=True, kw_only=True)
class JudgedPrompt:
    """Hold one prompt with what a judge must find in its sound."""

    caption: str
    kind: str
    label: str
    instrument: str | None
    midi: int | None
    seconds: float


def held_out_prompts(seed: int) -> list[JudgedPrompt]:
    """Return the notes and chords that the data of this seed holds out, and one prompt per drum and noise class.

    Drum and noise prompts occur in training (their clips do not); notes and chords occur in no training clip.
    """
    prompts = [
        JudgedPrompt(
            caption=note_captions(name, midi)[0],
            kind="note",
            label="note",
            instrument=name,
            midi=midi,
            seconds=SECONDS["note"],
        )
        for name, midi in held_out_notes(seed)
    ]
    prompts += [
        JudgedPrompt(
            caption=chord_captions(name, midi, quality)[0],
            kind="chord",
            label="chord",
            instrument=name,
            midi=midi,
            seconds=SECONDS["chord"],
        )
        for name, midi, quality in held_out_chords(seed)
    ]
    untuned = [("drum", label, texts[0], DRUM_SECONDS[label]) for label, texts in DRUM_CAPTIONS.items()]
    untuned += [("noise", label, f"{label} noise", SECONDS["noise"]) for label in NOISES]
    prompts += [
        JudgedPrompt(caption=caption, kind=kind, label=label, instrument=None, midi=None, seconds=seconds)
        for kind, label, caption, seconds in untuned
    ]
    return prompts


def sounds(
    pipeline: BasePipeline[Any],
    prompts: list[JudgedPrompt],
    *,
    sampling: Sampling,
    seeds: int,
    first_seed: int = 0,
    progress: Callable[[list[JudgedPrompt]], Iterable[JudgedPrompt]] = iter,
) -> Iterator[tuple[NDArray[np.float32], JudgedPrompt]]:
    """Generate every prompt with ``seeds`` seeds, all seeds of a prompt in one batch; yield audio (L, channels) and
    prompt. ``progress`` goes through the prompts, with a bar for example."""
    for number, prompt in enumerate(progress(prompts)):
        items = tuple(
            Item(prompt=prompt.caption, seconds=prompt.seconds, seed=first_seed + 1000 * number + seed)
            for seed in range(seeds)
        )
        request = Request(items=items, sampling=sampling)
        for audio in pipeline.generate(request).audio:
            yield audio, prompt
