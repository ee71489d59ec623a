"""Compare the three schedules of audio-to-audio: ``python -m benchmarks variation``.

The official one first adds noise above the chosen level [B23].
Sources are sounds the model made itself; the prompt of the variation asks for another instrument at the same pitch.
"""

from __future__ import annotations

import json
from typing import Any

import click
import numpy as np

from benchmarks.options import BACKEND, MODEL, SamplingChoice, open_pipeline
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import InitAudio, Item, Request
from sa3_mlx.common.measures.spectra import log_mel_l1
from sa3_mlx.common.model.dial import SCHEDULES, Schedule
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.judge.pitch import judge_note
from sa3_torch.train.demo_set.sounds import INSTRUMENTS, note_captions

LEVELS = (0.3, 0.5, 0.7, 0.9)
PITCHES = (52, 57, 62, 67)
SECONDS = 1.5


def measure(pipeline: BasePipeline[Any], sampling: Sampling) -> list[dict[str, Any]]:
    """Measure one row per noise level and schedule: mean log-mel distance to the source (log10 units), share of
    variations that keep the pitch, share with the instrument of the source and with the asked one."""
    judge, names = Judge(), list(INSTRUMENTS)
    pairs = [(name, names[(i + 1) % len(names)], PITCHES[i % len(PITCHES)]) for i, name in enumerate(names)]

    def request(which: int, init: tuple[InitAudio, ...] | None, schedule: Schedule) -> Request:
        items = tuple(
            Item(prompt=note_captions(pair[:2][which], pair[2])[0], seconds=SECONDS, seed=100 * which + i)
            for i, pair in enumerate(pairs)
        )
        return Request(items=items, sampling=sampling, init=init, schedule=schedule)

    sources = pipeline.generate(request(0, None, "official")).audio
    rows = []
    for level in LEVELS:
        init = tuple(InitAudio(audio=audio, noise_level=level) for audio in sources)
        for schedule in SCHEDULES:
            made = pipeline.generate(request(1, init, schedule)).audio
            heard = [judge.classifier.classify(audio).instrument for audio in made]
            rows.append(
                {
                    "noise_level": level,
                    "schedule": schedule,
                    "log_mel_to_source": float(np.mean([log_mel_l1(a, b) for a, b in zip(sources, made, strict=True)])),
                    "keeps_pitch": float(np.mean([judge_note(a, p[2]) for a, p in zip(made, pairs, strict=True)])),
                    "source_instrument": float(np.mean([h == p[0] for h, p in zip(heard, pairs, strict=True)])),
                    "asked_instrument": float(np.mean([h == p[1] for h, p in zip(heard, pairs, strict=True)])),
                }
            )
    return rows


@click.command(cls=TypedCommand)
@MODEL
@BACKEND
def variation(model: str, backend: str, choice: SamplingChoice) -> None:
    """Compare audio-to-audio with the three schedules [B23]."""
    pipeline = open_pipeline(model, backend)
    sampling = choice.resolved(pipeline.config.usual_sampling)
    rows = measure(pipeline, sampling)
    click.echo("  ".join(f"{name:>17}" for name in rows[0]))
    for row in rows:
        click.echo("  ".join(f"{v:17.2f}" if isinstance(v, float) else f"{v:>17}" for v in row.values()))
    click.echo(
        json.dumps({"model": pipeline.config.name, "backend": backend, "sampling": sampling.to_dict(), "rows": rows})
    )
