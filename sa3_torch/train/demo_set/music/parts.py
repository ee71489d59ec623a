"""Render a part of the set, about ten minutes of all kinds: the unit of work, a function of (seed, split, number)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.atomic import new_file, write_json
from sa3_torch.train.data.clip_cache import Draft
from sa3_torch.train.run.random import Purpose, generator

from .clips import (
    ClipPlace,
    ClipPlan,
    arpeggio_line,
    bass,
    chord,
    coloured,
    drum,
    effect,
    loop,
    melody_line,
    music,
    note,
)
from .finish import LONGEST, Ending, finish
from .samples import LICENCE, samples
from .scores import LEAD_SECONDS, SAMPLE_RATE, play
from .splits import REASONS
from .wordings import captions

# Clips of each kind in a part.
COUNTS: dict[str, tuple[int, Callable[[ClipPlace], ClipPlan]]] = {
    "note": (46, note),
    "chord": (22, chord),
    "melody": (12, melody_line),
    "arpeggio": (8, arpeggio_line),
    "bass": (8, bass),
    "loop": (18, loop),
    "music": (16, music),
    "drum": (28, drum),
    "effect": (10, effect),
    "noise": (4, coloured),
}
SPLITS = ("train", "validation", "test")
_FADED, _SILENT_END = 0.05, 0.1
_CONTINUOUS = ("line", "music", "effect", "noise")  # kinds that may fade
FONT_LICENCE = "MIT (FluidR3 GM)"
SYNTHESISED_LICENCE = "none needed: synthesised"


@dataclass(frozen=True, kw_only=True)
class PartJob:
    """Name a part: ``number`` of ``split``; None is the files of ``samples`` that are of the split."""

    seed: int
    split: str
    number: int | None
    font: Path
    samples: Path

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return f"{self.split}-{'samples' if self.number is None else f'{self.number:05d}'}"


def plan_part(seed: int, split: str, number: int) -> list[ClipPlan]:
    """Plan the clips of a part, in an order in which kinds are mixed."""
    plans = []
    for place, (count, plan) in enumerate(COUNTS.values()):
        for i in range(count):
            rng = generator(seed, Purpose.MUSIC_PLAN, SPLITS.index(split), number, place, i)
            reason = "" if split == "train" else REASONS[i % len(REASONS)]
            where = ClipPlace(rng=rng, seed=seed, split=split, reason=reason, number=number * count + i)
            plans.append(_varied(plan(where), reason, rng))
    order = generator(seed, Purpose.MUSIC_ORDER, SPLITS.index(split), number).permutation(len(plans))
    return [plans[i] for i in order]


def _varied(plan: ClipPlan, reason: str, rng: np.random.Generator) -> ClipPlan:
    """Let some clips fade and some keep the silence at their end; note why a held-out clip is held out."""
    ending, texts = replace(plan.ending, silence=rng.random() < _SILENT_END), plan.captions
    if plan.kind in _CONTINUOUS and rng.random() < _FADED:
        fade = "in" if rng.random() < 0.3 else "out"
        ending, texts = replace(ending, fade=fade), tuple(f"{text}, fading {fade}" for text in texts)
    fields = plan.fields | ({"held_out": reason} if reason else {})
    return replace(plan, ending=ending, captions=texts, fields=fields)


def drafts(job: PartJob, place: Path | None = None) -> Iterator[Draft]:
    """Render the clips of a job, one after another; what fluidsynth writes lies in ``place``."""
    if job.number is None:
        yield from _sample_drafts(job)
        return
    plans = plan_part(job.seed, job.split, job.number)
    played = play([plan.score for plan in plans if plan.score is not None], job.font, place)
    for i, plan in enumerate(plans):
        if plan.recipe is not None:
            own = generator(job.seed, Purpose.MUSIC_SYNTH, SPLITS.index(job.split), job.number, i)
            audio: NDArray[np.floating] = plan.recipe(own)
        else:
            audio = next(played)[round(LEAD_SECONDS * SAMPLE_RATE) * (not plan.ending.onset) :]
        rng = generator(job.seed, Purpose.MUSIC_FINISH, SPLITS.index(job.split), job.number, i)
        yield Draft(
            id=f"{job.name}-{i:03d}-{plan.label.replace(' ', '-')}",
            captions=plan.captions,
            kind=plan.kind,
            label=plan.label,
            instrument=plan.instrument,
            midi=plan.midi,
            split="train" if job.split == "train" else "validation",
            licence=SYNTHESISED_LICENCE if plan.recipe is not None else FONT_LICENCE,
            fields=plan.fields,
            audio=finish(audio, plan.ending, rng),
        )


def _sample_drafts(job: PartJob) -> Iterator[Draft]:
    for i, sample in enumerate(samples(job.samples)):
        if sample.side != job.split:
            continue
        rng = generator(job.seed, Purpose.MUSIC_FINISH, SPLITS.index(job.split), 1 << 31, i)
        yield Draft(
            id=f"sample-{sample.path.stem}",
            captions=captions(rng, "sample", {"what": sample.what}, "train"),
            kind="sample",
            label="sample",
            instrument=None,
            midi=None,
            split="train" if job.split == "train" else "validation",
            licence=LICENCE,
            source=sample.digest,
            audio=finish(sample.read(), Ending(seconds=LONGEST), rng),
        )


def render_part(job: PartJob, folder: Path) -> float:
    """Write the part to ``folder``, its audio and then what is known of its clips; return its seconds.

    A part that is there is left as it is.
    """
    index = folder / f"{job.name}.json"
    if not index.is_file():
        rows: list[dict[str, Any]] = []
        with new_file(index.with_suffix(".npy")) as partial, partial.open("wb") as file:
            for draft in drafts(job, folder):
                audio = np.asarray(draft.audio, dtype="<f2")
                file.write(audio.tobytes())
                rows.append({**_facts(draft), "samples": len(audio)})
        write_json(index, rows)
    return sum(row["samples"] for row in json.loads(index.read_text(encoding="utf-8"))) / SAMPLE_RATE


def _facts(draft: Draft) -> dict[str, Any]:
    return {
        "id": draft.id,
        "captions": draft.captions,
        "kind": draft.kind,
        "label": draft.label,
        "instrument": draft.instrument,
        "midi": draft.midi,
        "split": draft.split,
        "licence": draft.licence,
        "source": draft.source,
        "fields": draft.fields,
    }


def read_part(job: PartJob, folder: Path) -> Iterator[Draft]:
    """Read the drafts of a part that was rendered."""
    index = folder / f"{job.name}.json"
    rows = json.loads(index.read_text(encoding="utf-8"))
    if not rows:  # no file of the samples is of the split
        return
    audio: NDArray[np.float16] = np.memmap(index.with_suffix(".npy"), dtype="<f2", mode="r").reshape(-1, 2)
    start = 0
    for row in rows:
        stop = start + row.pop("samples")
        yield Draft(**row | {"captions": tuple(row["captions"])}, audio=np.asarray(audio[start:stop], dtype=np.float32))
        start = stop
