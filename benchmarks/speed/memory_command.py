"""``python -m benchmarks memory``."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import get_args

import click

from sa3_mlx.cli.models.listing import table
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.generation.memory import predict, stored_weight_bytes
from sa3_mlx.common.generation.request import Item, Request, Residency
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.precision import DTYPES
from sa3_mlx.pipeline import Pipeline

from .latency_command import find, parse_lengths
from .memory import measured, predicted
from .random_weights import PROMPT


@click.command()
@click.option(
    "--model",
    "name",
    default="demo",
    show_default=True,
    metavar="NAME|PATH",
    help="Installed model, folder, or known name: then with random weights.",
)
@click.option("--seconds", "lengths", default="1,4", show_default=True, callback=parse_lengths, metavar="N,N")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
def memory(name: str, lengths: tuple[float, ...], dtype: str) -> None:
    """Peak memory of every phase by MLX's counter, and what was predicted. The last line is JSON."""
    model, config = find(name)
    pipeline = Pipeline.load(model.folder, dtype=dtype)
    precision = pipeline.precision
    with TensorFile.open(model.folder / WEIGHTS_FILE) as file:
        weights = stored_weight_bytes(file, precision)
    sampling, tokens = replace(config.usual_sampling, steps=2), pipeline.tokenizer.count(PROMPT)
    rows, entries = [("audio", "weights for the", "phase", "measured", "predicted", "ratio")], []
    for seconds in lengths:
        request = Request(items=(Item(prompt=PROMPT, seconds=seconds, seed=0),), sampling=sampling)
        for residency in get_args(Residency):
            found = measured(pipeline, request, residency=residency)
            plan = predict(request, config, precision, residency=residency, tokens=tokens, weights=weights)
            wanted = predicted(plan)
            for phase in asdict(found):
                a, b = asdict(found)[phase], asdict(wanted)[phase]
                rows.append(
                    (f"{seconds:g} s", residency, phase, f"{a / 1e6:.1f} MB", f"{b / 1e6:.1f} MB", f"{b / a:.2f}")
                )
            entries.append(
                {
                    "seconds": seconds,
                    "residency": residency,
                    "measured": asdict(found),
                    "predicted": asdict(wanted),
                }
            )
    click.echo(table(rows))
    click.echo(json.dumps({"model": model.name, "dtype": precision.dtype, "entries": entries}))
