"""Measure what latents are like and what can be read from them: ``python -m benchmarks latents``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.options import BACKEND, MODEL, RENDERED, open_pipeline, show
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.autoencoder.probe import Probe
from sa3_torch.train.autoencoder.semantics import Regressors
from sa3_torch.train.autoencoder.stage import AutoencoderConfig
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.run.settings import load_settings


@click.command()
@MODEL
@BACKEND
@RENDERED
@click.option(
    "--settings",
    default="tiny",
    show_default=True,
    help="Preset or .toml file of `sa3 train autoencoder`: its regressors say what is read.",
)
@click.option(
    "--clips", "count", type=click.IntRange(1), default=500, show_default=True, help="At most, of each split."
)
@click.option(
    "--pan",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="How far mono clips are moved to a side; 0 for an autoencoder that knows only mono.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=None, help="JSON file to write, too.")
def latents(
    model: str, backend: str, data: Path, settings: str, count: int, pan: float, seed: int, out: Path | None
) -> None:
    """Measure held-out latents, and read pitch and level from them by ridge regression."""
    pipeline = open_pipeline(model, backend, generates=False)
    semantics = load_settings(AutoencoderConfig, "autoencoder", settings, ()).semantics
    if semantics is None:
        raise ConfigError(f"--settings {settings}: without [semantics.regressors]; choose tiny, same-s or same-l")
    same, rate = pipeline.config.same, pipeline.config.sample_rate
    regressors = Regressors(semantics.regressors, rate, same.samples_per_latent, same.latent_channels)
    result = Probe(ClipSet(data), pipeline.encode, regressors, pan=pan).measure(count, seed)
    show(dict(result))
    about = {"model": pipeline.config.name, "backend": backend, "settings": settings, "pan": pan, "seed": seed}
    if out is not None:
        write_json(out, {**about, **result})
    click.echo(json.dumps({**about, **result}))
