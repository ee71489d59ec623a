"""Options that several measurements share, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import SAMPLER_NAMES, Guidance, Sampling

RESULTS = Path(__file__).with_name("results")


def parse_lengths(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[float, ...]:
    """Read lengths in seconds, such as "5,30". Raises click.BadParameter."""
    try:
        return tuple(float(text) for text in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: expected numbers such as 5,30,120") from error


MODEL = click.argument("model", metavar="NAME|PATH")
BACKEND = click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True)
STEPS = click.option("--steps", type=click.IntRange(1), help="Default: the model's.")
SAMPLER = click.option("--sampler", type=click.Choice(SAMPLER_NAMES), help="Default: the model's.")
GUIDANCE = click.option("--guidance", type=float, help="Default: the model's.")
RESULTS_FOLDER = click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="Default: benchmarks/results."
)


def chosen_sampling(config: ModelConfig, steps: int | None, sampler: str | None, guidance: float | None) -> Sampling:
    """Return the sampling that was asked for, with the model's own where nothing was."""
    usual = config.usual_sampling
    scaled = usual.guidance if guidance is None else Guidance(scale=guidance)
    return Sampling(sampler=sampler or usual.sampler, steps=steps or usual.steps, guidance=scaled)


def open_pipeline(model: str, backend: str, *, generates: bool = True) -> BasePipeline[Any]:
    """Open the pipeline of the chosen twin, of an installed model or a folder."""
    folder = find_model(model, generates=generates).folder
    if backend == "torch":
        from sa3_torch.pipeline import Pipeline as TorchPipeline

        return TorchPipeline.load(folder)
    from sa3_mlx.pipeline import Pipeline as MlxPipeline

    return MlxPipeline.load(folder)


def show(result: Mapping[str, object]) -> None:
    """Print the numbers of a result, a line each."""
    for name, value in result.items():
        if isinstance(value, float):
            click.echo(f"{name:28} {value:8.3f}")
