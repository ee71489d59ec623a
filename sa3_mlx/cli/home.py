"""Find the model that a command uses; offer a released one that is missing."""

from __future__ import annotations

import sys

import click

from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.common.installed import Model, default_model, known_name, named_model
from sa3_mlx.common.model.presets import REPOSITORIES
from sa3_mlx.common.terminal import say


def find_model(name: str | None, *, generates: bool) -> Model:
    """Return a model given by name or path, or the default one; damaged ones before that are named on stderr.

    In a terminal a released one that is missing is offered. Raises FileNotFoundError where it is not installed, saying
    how to get it; ValueError for an autoencoder alone where ``generates`` asks for a diffusion model.
    """
    if name is not None:
        try:
            return named_model(name, generates=generates)
        except FileNotFoundError:
            if not _offer(known_name(name)):
                raise
        return named_model(name, generates=generates)
    model, damaged = default_model(generates=generates)
    for other, reason in damaged.items():
        say(f"note: model {other} is damaged, {model.name} is used instead ({reason})")
    return model


def _offer(name: str) -> bool:
    """Ask whether a released model that is not installed shall be downloaded, and do it; False where it was not."""
    if name not in REPOSITORIES or not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    if not click.confirm(f"{name} is not installed; look for it on the hub now (sa3 get {name})?", err=True):
        return False
    from sa3_mlx.cli.models.get import install

    install(name, Progress(quiet=False))
    return True
