"""Types and options of commands that several share; importable without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sa3_mlx.common.installed import named_model

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


class _ModelFolder(click.ParamType):
    """Turn the name of an installed model, or a path, into a folder."""

    name = "NAME|PATH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ARG002
        return named_model(str(value), generates=False).folder


MODEL = _ModelFolder()
AUDIO = click.option(
    "--data",
    metavar="FOLDER|URL",
    required=True,
    help=(
        "Clip cache made by `sa3 data render` or `sa3 data import`, or shards: a folder, an index, a URL, {0..9}.tar."
    ),
)
LATENTS = click.option(
    "--latents",
    type=FOLDER,
    multiple=True,
    required=True,
    help="Folder made by `sa3 pre-encode`; repeatable, then mixed by the kinds in the table of shares.",
)
UNGATED = click.option("--ungated", is_flag=True, help="Take latents, too, that have not passed `sa3 data gate`.")
AUTOENCODER = click.option(
    "--autoencoder",
    type=MODEL,
    default=None,
    help="The autoencoder that made the latents, where the model does not record it.",
)
