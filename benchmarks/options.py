"""Define the options that several measurements share, and what they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.common.generation.pipeline import BasePipeline
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
RENDERED = click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="Folder made by `sa3 data render`.",
)
RESULTS_FOLDER = click.option(
    "--results", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, help="Default: benchmarks/results."
)
MUSIC_RESULTS_FOLDER = click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=RESULTS / "music",
    help="Default: benchmarks/results/music.",
)


@dataclass(frozen=True, kw_only=True)
class SamplingChoice:
    """Say how sounds are sampled; None stands for the model's own way."""

    steps: Annotated[int | None, click.Option(["--steps"], type=click.IntRange(1), help="Default: the model's.")]
    sampler: Annotated[
        str | None, click.Option(["--sampler"], type=click.Choice(SAMPLER_NAMES), help="Default: the model's.")
    ]
    guidance: Annotated[float | None, click.Option(["--guidance"], type=float, help="Default: the model's.")]

    def resolved(self, usual: Sampling) -> Sampling:
        """Return the sampling that was asked for, with the usual one where nothing was."""
        guidance = usual.guidance if self.guidance is None else Guidance(scale=self.guidance)
        return Sampling(sampler=self.sampler or usual.sampler, steps=self.steps or usual.steps, guidance=guidance)


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
