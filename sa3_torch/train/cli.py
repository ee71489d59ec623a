"""The ``sa3 train`` commands."""

from __future__ import annotations

from pathlib import Path

import click
import torch

from sa3_mlx.spec.presets import PRESETS

from .autoencoder import AutoencoderConfig, AutoencoderStage
from .clips import ClipSet
from .loop import Trainer
from .settings import load_settings, to_json

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command("autoencoder")
@click.option("--data", type=FOLDER, required=True, help="Clip cache made by `sa3 data render` or `sa3 data import`.")
@click.option("--out", type=FOLDER, required=True, help="Run folder; an unfinished run in it goes on.")
@click.option("--model", default="demo", show_default=True, type=click.Choice(sorted(PRESETS)))
@click.option("--settings", default="demo", show_default=True, help="Preset name or .toml file.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one setting, e.g. train.steps=100.")
@click.option("--threads", type=click.IntRange(1), default=None, help="CPU threads.")
def autoencoder(
    data: Path, out: Path, model: str, settings: str, changes: tuple[str, ...], threads: int | None
) -> None:
    """Train a SAME autoencoder (stage 0)."""
    if threads is not None:
        torch.set_num_threads(threads)
    config = load_settings(AutoencoderConfig, "autoencoder", settings, changes)
    stage = AutoencoderStage(PRESETS[model], config, ClipSet(data))
    if Trainer(stage, config.train, out, to_json(config)).run():
        click.echo(f"autoencoder: {out / 'model'}; next: sa3 train encode --autoencoder {out / 'model'} --data {data}")


def commands() -> dict[str, click.Command]:
    """Name -> command, for the ``sa3 train`` group."""
    return {command.name or "": command for command in (autoencoder,)}
