"""Measure the peak memory of the phases of a run by MLX's own counter: ``python -m benchmarks memory``."""

from __future__ import annotations

import gc
import json
from dataclasses import asdict, dataclass, replace
from typing import get_args

import click

from benchmarks.options import parse_lengths
from sa3_mlx.cli.models.listing import table
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.generation.events import Conditioned, Finished, Sampled, Stepped
from sa3_mlx.common.generation.request import Item, Request, Residency
from sa3_mlx.common.memory.prediction import MemoryPlan, predict, stored_weight_bytes
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.precision import DTYPES
from sa3_mlx.pipeline import Pipeline
from sa3_mlx.runtime import apple_gpu, mx

from .models import PROMPT, find


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Hold peaks in bytes; ``before`` sampling are text and, with given audio, encoding."""

    before: int
    sample: int
    decode: int


def measured(pipeline: Pipeline, request: Request, *, residency: Residency) -> Peaks:
    """Measure one run that begins with no part in memory."""
    pipeline.free(*pipeline.loaded)
    gc.collect()
    other, peaks = mx.get_active_memory(), []  # what earlier work left
    mx.reset_peak_memory()
    for event in pipeline.stream(request, residency=residency):
        if isinstance(event, Stepped):
            mx.eval(event.denoised)
        if isinstance(event, Conditioned | Sampled | Finished):
            peaks.append(mx.get_peak_memory() - other)
            mx.reset_peak_memory()
    return Peaks(before=peaks[0], sample=peaks[1], decode=peaks[2])


def predicted(plan: MemoryPlan) -> Peaks:
    """Return the peaks that the plan expects."""
    phases = {phase.name: phase.peak for phase in plan.phases}
    return Peaks(before=max(phases["text"], phases.get("encode", 0)), sample=phases["sample"], decode=phases["decode"])


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
    """Print the peak memory of every phase by MLX's counter, and what was predicted. The last line is JSON."""
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
            plan = predict(
                request,
                config,
                precision,
                residency=residency,
                tokens=tokens,
                weights=weights,
                metal=apple_gpu(long_chunks=False),
            )
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
