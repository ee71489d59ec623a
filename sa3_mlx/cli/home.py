"""Find the model that a command uses, and say what to do with a new one."""

from __future__ import annotations

import shlex
from pathlib import Path

from sa3_mlx.common.installed import Model, default_model, name_of, named_model
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.terminal import say


def find_model(name: str | None, *, generates: bool) -> Model:
    """Return a model given by name or path, or the default one; damaged ones before that are named on stderr.

    Raises FileNotFoundError where it is not installed, saying how to get it; ValueError for an autoencoder alone where
    ``generates`` asks for a diffusion model.
    """
    if name is not None:
        return named_model(name, generates=generates)
    model, damaged = default_model(generates=generates)
    for other, reason in damaged.items():
        say(f"note: model {other} is damaged, {model.name} is used instead ({reason})")
    return model


def first_command(folder: Path) -> str:
    """Return a command for a new model, by its installed name, or else its folder."""
    what = "encode INPUT OUT.safetensors" if ModelConfig.load(folder).diffusion is None else "generate PROMPT"
    return f"sa3 {what} --model {shlex.quote(name_of(folder))}"
