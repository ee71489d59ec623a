"""Measurements of quality. The last line of every command is one line of JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.schema import ConfigError
from sa3_torch.evaluate.adherence import measure as measure_adherence
from sa3_torch.train.data.clip_cache import ClipSet

from .reconstruction import measure as measure_reconstruction
from .variation import measure as measure_variation


def open_pipeline(model: str, backend: str, *, generates: bool = True) -> BasePipeline[Any]:
    """Open the pipeline of the chosen twin, of an installed model or a folder."""
    folder = find_model(model, generates=generates).folder
    if backend == "torch":
        from sa3_torch.pipeline import Pipeline as TorchPipeline

        return TorchPipeline.load(folder)
    from sa3_mlx.pipeline import Pipeline as MlxPipeline

    return MlxPipeline.load(folder)


MODEL = click.argument("model", metavar="NAME|PATH")
BACKEND = click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True)
STEPS = click.option("--steps", type=click.IntRange(1), default=None, help="Default: the model's.")
SAMPLER = click.option("--sampler", default=None, help="Default: the model's.")
GUIDANCE = click.option("--guidance", type=float, default=None, help="Default: the model's.")


def chosen_sampling(
    pipeline: BasePipeline[Any], steps: int | None, sampler: str | None, guidance: float | None
) -> Sampling:
    """Settings of a run, with the model's own where none was given."""
    usual = pipeline.config.usual_sampling
    scaled = usual.guidance if guidance is None else Guidance(scale=guidance)
    return Sampling(sampler=sampler or usual.sampler, steps=steps or usual.steps, guidance=scaled)


def _latents(pipeline: BasePipeline[Any]) -> str:
    same = pipeline.config.same
    return f"{same.latent_channels} channels per {same.samples_per_latent} samples"


def show(result: dict[str, object]) -> None:
    """The shares and numbers of a result, a line each."""
    for name, value in result.items():
        if isinstance(value, float):
            click.echo(f"{name:28} {value:8.3f}")


@click.command()
@MODEL
@BACKEND
@STEPS
@SAMPLER
@GUIDANCE
@click.option("--seeds", type=click.IntRange(1), default=4, show_default=True, help="Sounds per prompt.")
@click.option("--data-seed", type=int, default=0, show_default=True, help="Seed of `sa3 data render`.")
def adherence(
    model: str,
    backend: str,
    steps: int | None,
    sampler: str | None,
    guidance: float | None,
    seeds: int,
    data_seed: int,
) -> None:
    """Share of held-out prompts of the demo sounds that a judge hears as asked."""
    pipeline = open_pipeline(model, backend)
    sampling = chosen_sampling(pipeline, steps, sampler, guidance)
    result = measure_adherence(pipeline, data_seed=data_seed, seeds=seeds, sampling=sampling)
    show(result)
    click.echo(json.dumps({"model": pipeline.config.name, "backend": backend, **result}))


@click.command()
@MODEL
@BACKEND
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="Folder made by `sa3 data render`.",
)
@click.option(
    "--decoder",
    metavar="NAME|PATH",
    default=None,
    help="Another autoencoder that decodes its latents: a distilled one, or the teacher.",
)
def reconstruction(model: str, backend: str, data: Path, decoder: str | None) -> None:
    """How well the autoencoder gives held-out sounds back."""
    pipeline = open_pipeline(model, backend, generates=False)
    other = None if decoder is None else open_pipeline(decoder, backend, generates=False)
    if other is not None and _latents(other) != _latents(pipeline):
        raise ConfigError(
            f"--decoder {decoder} reads {_latents(other)}, {model} makes {_latents(pipeline)}; choose one that was "
            "distilled from the other"
        )
    result = measure_reconstruction(pipeline, ClipSet(data), other)
    show(result)
    about = {"model": pipeline.config.name, "decoder": (other or pipeline).config.name, "backend": backend}
    click.echo(json.dumps({**about, **result}))


@click.command()
@MODEL
@BACKEND
@STEPS
@SAMPLER
@GUIDANCE
def variation(model: str, backend: str, steps: int | None, sampler: str | None, guidance: float | None) -> None:
    """Audio-to-audio with the official and with the monotone schedule [B23]."""
    pipeline = open_pipeline(model, backend)
    sampling = chosen_sampling(pipeline, steps, sampler, guidance)
    rows = measure_variation(pipeline, sampling)
    click.echo("  ".join(f"{name:>17}" for name in rows[0]))
    for row in rows:
        click.echo("  ".join(f"{v:17.2f}" if isinstance(v, float) else f"{v:>17}" for v in row.values()))
    click.echo(
        json.dumps({"model": pipeline.config.name, "backend": backend, "sampling": sampling.to_dict(), "rows": rows})
    )
