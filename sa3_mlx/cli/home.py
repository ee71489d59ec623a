"""Where models are: installed ones in $SA3_HOME/models, the demo inside the package, or any folder by its path."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from sa3_mlx.assets import DEMO as DEMO_FOLDER
from sa3_mlx.common.model.checkpoint import CONFIG_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS, REPOSITORIES
from sa3_mlx.common.quant.format import check_folder

DEMO = "demo"
DAMAGE = (ValueError, OSError, RecursionError)  # what ``open_model`` raises
# models that are used when none is given; a quantized or a user's own one has to be asked for
PREFERENCE = ("small-music", "medium", "small-sfx", "small-music-base", "medium-base", "small-sfx-base", DEMO)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model and what the user calls it: the name it is installed under, or the path that was given."""

    name: str
    folder: Path
    config: ModelConfig

    @property
    def label(self) -> str:
        """That name, and the configuration's own where it is another."""
        return self.name if self.name == self.config.name else f"{self.name} ({self.config.name})"

    @property
    def tag(self) -> str:
        """What goes into files: of an absolute path the name alone."""
        return Path(self.name).name if Path(self.name).is_absolute() else self.name


def home() -> Path:
    """$SA3_HOME, by default ~/.cache/sa3."""
    return Path(os.environ.get("SA3_HOME") or "~/.cache/sa3").expanduser()


def models_folder() -> Path:
    return home() / "models"


def installed() -> dict[str, Path]:
    """Name -> folder of every installed model: released ones, the embedded demo, then all others."""
    folder = models_folder()
    found = {path.name: path for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    found = {name: path for name, path in found.items() if (path / CONFIG_FILE).is_file() and not name.startswith(".")}
    if DEMO not in found and (DEMO_FOLDER / CONFIG_FILE).is_file():
        found[DEMO] = DEMO_FOLDER
    return {name: found[name] for name in dict.fromkeys((*PREFERENCE, *found)) if name in found}


def default_models() -> Iterator[tuple[str, Path]]:
    """Installed models that are used when none is given, in order of preference."""
    return ((name, folder) for name, folder in installed().items() if name in PREFERENCE)


def first_command(folder: Path) -> str:
    """What to do with a new model: its installed name, or else its folder, in a command."""
    name = next((name for name, path in installed().items() if path == folder), str(folder))
    what = "encode INPUT OUT.safetensors" if ModelConfig.load(folder).diffusion is None else "generate PROMPT"
    return f"sa3 {what} --model {shlex.quote(name)}"


def licence_page(name: str) -> str | None:
    """Where the licence of a released model is accepted."""
    return f"https://huggingface.co/{REPOSITORIES[name]}" if name in REPOSITORIES else None


def open_model(folder: Path) -> ModelConfig:
    """The configuration, once it and the header of the weights are known to fit. Raises what ``DAMAGE`` lists."""
    config = ModelConfig.load(folder)
    check_folder(folder, config)
    return config


def find_model(name: str | None, *, generates: bool) -> Model:
    """A model given by name or path, or the default one.

    Raises FileNotFoundError for an unknown or uninstalled one, saying what there is and how to get it; ValueError for
    an autoencoder alone where ``generates`` asks for a diffusion model.
    """
    if name is None:
        return _default(generates=generates)
    models = installed()
    if name in models:
        folder = models[name]
    elif Path(name).is_dir():
        folder = Path(name)
    elif name in REPOSITORIES:
        raise FileNotFoundError(f"{name} is not installed; run 'sa3 convert {name}' (licence: {licence_page(name)})")
    elif name in PRESETS:
        raise FileNotFoundError(f"{name}: there are no public weights of this model; convert your own checkpoint")
    else:
        raise FileNotFoundError(
            f"{name}: no such model or folder; installed: {', '.join(models) or 'none'}; "
            f"known: {', '.join(REPOSITORIES)}"
        )
    config = ModelConfig.load(folder)
    if generates and config.diffusion is None:
        raise ValueError(f"{name} is an autoencoder alone and cannot generate; choose a model with a DiT")
    return Model(name=name, folder=folder, config=config)


def _default(*, generates: bool) -> Model:
    """The first that is whole; damaged ones before it are named on stderr, and raised when there is no other."""
    damaged: dict[str, Exception] = {}
    for name, folder in default_models():
        try:
            config = open_model(folder)
        except DAMAGE as error:
            damaged[name] = error
            continue
        if config.diffusion is not None or not generates:
            for other, reason in damaged.items():
                click.echo(f"note: model {other} is damaged, {name} is used instead ({reason})", err=True)
            return Model(name=name, folder=folder, config=config)
    if damaged:
        raise next(iter(damaged.values()))
    raise FileNotFoundError(
        "no model is there to choose; give --model, run 'sa3 convert small-music', or 'sa3 convert PATH OUT' for a "
        "checkpoint on this disk"
    )
