"""Listen whether notes without an end keep their pitch: ``python -m benchmarks pitches demo``.

Every half second of a piece in windows is heard by YIN: the asked pitch, another one, none that is clear, or silence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np

from benchmarks.options import BACKEND, MODEL, MUSIC_RESULTS_FOLDER, SamplingChoice, open_pipeline
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.request import Item, LongForm, Request
from sa3_mlx.common.terminal import report
from sa3_torch.evaluate.judge.pitch import pitch_of
from sa3_torch.train.demo_set.sounds import INSTRUMENTS, note_captions

PART_SECONDS = 0.5
CLEAR, NEAR = 0.3, 0.5  # confidence, and semitones
SILENT_DB = -60.0
Heard = Literal["asked", "other", "unclear", "silent"]


def heard(audio: Audio, midi: int, sample_rate: int) -> list[Heard]:
    """Name what is heard in every whole part of half a second."""
    size, found = round(PART_SECONDS * sample_rate), list[Heard]()
    for start in range(0, len(audio) - size + 1, size):
        part = audio[start : start + size]
        if 10 * np.log10(np.mean(part.astype(np.float64) ** 2) + 1e-12) < SILENT_DB:
            found.append("silent")
            continue
        pitch = pitch_of(part, sample_rate)
        if pitch.confidence < CLEAR:
            found.append("unclear")
        else:
            found.append("asked" if abs(pitch.midi - midi) <= NEAR else "other")
    return found


def summary(pieces: Sequence[Sequence[Heard]], first: int) -> dict[str, Any]:
    """Return shares of parts: of the asked pitch in the first ``first`` parts and after them, and what else is heard.

    ``longest``: seconds without the asked pitch, at most.
    """
    early, late = (np.array([word == "asked" for piece in pieces for word in piece[cut]]) for cut in _cuts(first))
    later = [word for piece in pieces for word in piece[first:]]
    gaps = (len(run) for piece in pieces for run in "".join(" " if w == "asked" else "x" for w in piece).split())
    return {
        "asked_first": round(float(early.mean()), 3),
        "asked_later": round(float(late.mean()), 3),
        **{word: round(later.count(word) / len(later), 3) for word in ("other", "unclear", "silent")},
        "longest": max(gaps, default=0) * PART_SECONDS,
    }


def _cuts(first: int) -> tuple[slice, slice]:
    return slice(None, first), slice(first, None)


@click.command(cls=TypedCommand)
@MODEL
@BACKEND
@click.option("--seconds", type=float, default=30.0, show_default=True)
@click.option("--pitch", type=int, default=60, show_default=True, help="MIDI number.")
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True)
@MUSIC_RESULTS_FOLDER
def pitches(
    model: str, backend: str, choice: SamplingChoice, seconds: float, pitch: int, seeds: int, results: Path
) -> None:
    """Count the half seconds of long notes that have the asked pitch: in the first window, and after it."""
    pipeline = open_pipeline(model, backend)
    config, sampling, rows = pipeline.config, choice.resolved(pipeline.config.usual_sampling), list[dict[str, Any]]()
    for instrument in INSTRUMENTS:
        pieces = list[list[Heard]]()
        for seed in range(seeds):
            item = Item(prompt=note_captions(instrument, pitch)[0], seconds=seconds, seed=seed)
            made = pipeline.generate(Request(items=(item,), sampling=sampling, long=LongForm()))
            pieces.append(heard(made.audio[0], pitch, config.sample_rate))
        rows.append({"instrument": instrument, **summary(pieces, int(config.max_seconds / PART_SECONDS))})
        report("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    record = {
        "model": config.name,
        "backend": backend,
        "seconds": seconds,
        "pitch": pitch,
        "seeds": seeds,
        "rows": rows,
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"pitches-{config.name}-{datetime.now(UTC):%Y-%m-%d}.json", record)
    report(json.dumps(record))
