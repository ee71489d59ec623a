"""Measure how many sounds a judge finds as asked: ``python -m benchmarks adherence``."""

from __future__ import annotations

import json
from collections.abc import Iterable

import click
from tqdm import tqdm

from benchmarks.options import BACKEND, MODEL, SamplingChoice, open_pipeline, show
from sa3_mlx.cli.typed import TypedCommand
from sa3_torch.evaluate.adherence import measure
from sa3_torch.evaluate.prompts import JudgedPrompt


@click.command(cls=TypedCommand)
@MODEL
@BACKEND
@click.option("--seeds", type=click.IntRange(1), default=4, show_default=True, help="Sounds per prompt.")
@click.option("--data-seed", type=int, default=0, show_default=True, help="Seed of `sa3 data render`.")
def adherence(model: str, backend: str, choice: SamplingChoice, seeds: int, data_seed: int) -> None:
    """Measure the share of held-out prompts of the demo sounds that a judge finds as asked."""
    pipeline = open_pipeline(model, backend)
    sampling = choice.resolved(pipeline.config.usual_sampling)

    def progress(prompts: list[JudgedPrompt]) -> Iterable[JudgedPrompt]:
        return tqdm(prompts, desc="adherence", unit="prompt", disable=None, delay=1)

    result = measure(pipeline, data_seed=data_seed, seeds=seeds, sampling=sampling, progress=progress)
    show(result)
    click.echo(json.dumps({"model": pipeline.config.name, "backend": backend, **result}))
