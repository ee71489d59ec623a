"""``python -m benchmarks latency``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from sa3_mlx.cli.backend import choose
from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.home import find_model, home, installed
from sa3_mlx.cli.models.listing import table as columns
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import longest
from sa3_mlx.common.model.precision import DTYPES, TEXT_DTYPES
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.model.sampling import SAMPLER_NAMES
from sa3_mlx.common.quant.format import Quantization

from .latency import RESULTS, Counts, Model, measure, save, table
from .machine import describe
from .random_weights import PROMPT, make_random_model
from .worker import Work


def parse_lengths(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        return tuple(float(text) for text in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: expected numbers such as 5,30,120") from error


@click.command()
@click.option(
    "--model",
    "name",
    default="small-music",
    show_default=True,
    metavar="NAME|PATH",
    help="Installed model, folder, or known name: then with random weights.",
)
@click.option("--backend", type=click.Choice(["auto", "mlx", "torch"]), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="Of torch: cpu, cuda, mps.")
@click.option("--mps", is_flag=True, help="PyTorch on a Mac's GPU: short for --backend torch --device mps.")
@click.option("--seconds", "lengths", default="5,30", show_default=True, callback=parse_lengths, metavar="N,N")
@click.option("--steps", type=click.IntRange(1), help="Default: the model's.")
@click.option("--sampler", type=click.Choice(SAMPLER_NAMES), help="Default: the model's.")
@click.option("--guidance", type=float, help="Default: the model's.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--text-dtype", type=click.Choice(TEXT_DTYPES), default="auto", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="PyTorch: compile the step and the decoder; long warm-up.")
@click.option("--cold", type=click.IntRange(0), default=1, show_default=True, help="Fresh processes to time.")
@click.option("--warmups", type=click.IntRange(1), default=1, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--sustained",
    type=click.FloatRange(0),
    default=0.0,
    metavar="MINUTES",
    help="Also generate for so long, to see the machine slow down.",
)
@click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="Default: benchmarks/results."
)
@click.option("--no-save", is_flag=True, help="Write no results file.")
def latency(
    name: str,
    backend: str,
    device: str,
    mps: bool,
    lengths: tuple[float, ...],
    steps: int | None,
    sampler: str | None,
    guidance: float | None,
    dtype: str,
    text_dtype: str,
    compiled: bool,
    cold: int,
    warmups: int,
    repeats: int,
    sustained: float,
    results: Path,
    no_save: bool,
) -> None:
    """How long a generation takes: cold and warm, every stage, memory, energy where the system tells it.

    Times are wall clock of an otherwise idle machine. The last line is JSON.
    """
    framework = choose("torch" if mps else backend)
    model, config = find(name)
    if compiled and framework != "torch":
        raise click.UsageError("--compile is for --backend torch; MLX compiles by itself on a GPU")
    machine = describe(framework)
    click.echo(f"{machine.text()}\n{model.name} ({weights_text(model)}), {framework}, {dtype}", err=True)
    entries = []
    for seconds in lengths:
        if seconds > config.max_seconds:
            click.echo(f"{seconds:g} s: left out, {model.name} makes up to {longest(config)}", err=True)
            continue
        work = Work(
            backend=framework,
            device="mps" if mps else device,
            folder=str(model.folder),
            dtype=dtype,
            text_dtype=text_dtype,
            compiled=compiled,
            prompt=PROMPT,
            seconds=seconds,
            steps=steps,
            sampler=sampler,
            guidance=guidance,
            warmups=warmups,
            repeats=repeats,
            minutes=0,
            write=False,
            spawned=0,
        )
        counts = Counts(cold=cold, warmups=warmups, repeats=repeats, sustained_minutes=sustained)
        entries.append(measure(model, work, counts, machine))
    if not entries:
        raise click.UsageError("no length left to measure")
    click.echo(columns(table(entries)))
    for entry in entries:
        if "sustained" in entry:
            run = entry["sustained"]
            click.echo(
                f"{entry['seconds']:g} s, sustained {run['minutes']:.1f} min, {run['runs']} runs: "
                f"{run['first_p50']:.3f} s at first, {run['last_p50']:.3f} s at last, "
                f"{run['slowdown']:.2f} times as long"
            )
    if any(entry["busy"] for entry in entries):
        click.echo("other programs were running here: the times are too long, and `report` leaves them out")
    if not no_save:
        click.echo(f"file   {save(results, machine, entries)}")
    sys.stdout.flush()
    click.echo(json.dumps({"machine": machine.to_dict(), "entries": entries}))


def find(name: str) -> tuple[Model, ModelConfig]:
    """The model, with random weights where a known one is not installed."""
    if name in PRESETS and name not in installed() and not Path(name).is_dir():
        config = PRESETS[name]
        if config.diffusion is None:
            raise click.UsageError(f"{name} is an autoencoder alone; choose a model with a DiT")
        folder = home() / "benchmarks" / name
        click.echo(f"{name} is not installed: random weights in {folder}", err=True)
        return Model(name=name, folder=make_random_model(folder, config), weights="random", recipe=None), config
    found = find_model(name, generates=True)
    with TensorFile.open(found.folder / WEIGHTS_FILE) as file:
        quantization = Quantization.read(file)
    recipe = None if quantization is None else quantization.recipe
    weights = fingerprint(found.folder, found.config)
    return Model(name=found.config.name, folder=found.folder, weights=weights, recipe=recipe), found.config


def weights_text(model: Model) -> str:
    return "random weights" if model.weights == "random" else f"weights {model.weights[:19]}"
