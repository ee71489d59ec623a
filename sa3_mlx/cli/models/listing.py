"""List what is installed and what can be had: ``sa3 models``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click

from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.installed import (
    DAMAGE,
    DEMO_FOLDER,
    default_models,
    installed,
    licence_page,
    models_folder,
    open_model,
    stored_in,
)
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE, expected_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import longest
from sa3_mlx.common.model.presets import PRESETS, REPOSITORIES
from sa3_mlx.common.terminal import one_line, show


def parameters(config: ModelConfig) -> int:
    """Return the number of weights."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values())


@click.command(cls=TypedCommand)
def models() -> None:
    """List installed models, and the released ones that 'sa3 get' can fetch.

    * marks the default: the first released one, or the demo that comes with sa3. Others are named with --model.
    """
    found = installed()
    rows = [("installed", "parameters", "on disk", "longest", "folder")]
    usual, default = dict(default_models()), ""
    for name, folder in found.items():
        try:
            place = stored_in(name, folder)
            config = open_model(folder) if place == folder else ModelConfig.load(place)
            size = f"{(place / WEIGHTS_FILE).stat().st_size / 1e6:,.0f} MB"
            where = "comes with sa3" if folder == DEMO_FOLDER or place != folder else str(folder)
            default = default or (name if name in usual and config.diffusion is not None else "")
            rows.append((f"{name} *" if name == default else name, _millions(config), size, _length(config), where))
        except DAMAGE as error:
            rows.append((name, "-", "damaged", "-", str(error)))
    if not found:
        rows.append(("none", "", "", "", f"they go to {models_folder()}"))
    show(table(rows))
    known = [("not installed", "parameters", "longest", "get it", "licence")]
    for name in REPOSITORIES:
        if name not in found:
            config = PRESETS[name]
            page = licence_page(name) or ""
            known.append((name, _millions(config), _length(config), f"sa3 get {name}", page))
    if len(known) > 1:
        show("\n" + table(known))


def _millions(config: ModelConfig) -> str:
    count = parameters(config) / 1e6
    return f"{count:,.0f} M" if count >= 10 else f"{count:.2f} M"


def _length(config: ModelConfig) -> str:
    return "autoencoder" if config.diffusion is None else longest(config)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text, in columns of equal width, two spaces apart."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
