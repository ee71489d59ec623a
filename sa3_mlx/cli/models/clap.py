"""Put a latent CLAP into a model: ``sa3 add-clap``."""

from __future__ import annotations

from pathlib import Path

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.installed import DEMO_FOLDER
from sa3_mlx.common.model.checkpoint import CLAP_FILE
from sa3_mlx.common.model.clap import add_clap as put
from sa3_mlx.common.terminal import report


@click.command(cls=TypedCommand)
@click.argument("model_name", metavar="MODEL")
@click.argument("clap", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--force", is_flag=True, help="Replace the latent CLAP that MODEL has.")
def add_clap(model_name: str, clap: Path, force: bool) -> None:
    """Put the latent CLAP of a folder into MODEL, which then ranks --best-of by its prompt.

    CLAP is what 'sa3 train clap' exported, the folder model of its run. It must have been trained on latents of MODEL's
    autoencoder and with its text encoder. MODEL's weights stay as they are, and so does their hash.

    \b
    sa3 add-clap my-model clap-run/model
    sa3 generate "snare drum" --model my-model --best-of 4 --out snare.wav
    """
    found = find_model(model_name, generates=True)
    if found.folder == DEMO_FOLDER:
        raise ValueError("the demo is part of the package; copy its folder, and give the copy")
    if found.config.clap is not None and not force:
        raise ValueError(f"{found.name}: has a latent CLAP already; --force replaces it")
    digest = put(found.folder, clap)
    report(f"file   {found.folder / CLAP_FILE}, {digest}")
    report(f'next   sa3 generate "PROMPT" --model {found.name} --best-of 4')
