"""Where models are: installed ones in $SA3_HOME/models, the demo inside the package, or any folder by its path."""

from __future__ import annotations

import os
from pathlib import Path

import click

from sa3_mlx.assets import DEMO as DEMO_FOLDER
from sa3_mlx.spec.checkpoint import CONFIG_FILE
from sa3_mlx.spec.config import ModelConfig
from sa3_mlx.spec.presets import PRESETS, REPOSITORIES
from sa3_mlx.spec.quantization import check_folder

DEMO = "demo"
DAMAGE = (ValueError, OSError, RecursionError)  # what ``open_model`` raises
PREFERENCE = ("small-music", "medium", "small-sfx", "small-music-base", "medium-base", "small-sfx-base")


def home() -> Path:
    """$SA3_HOME, by default ~/.cache/sa3."""
    return Path(os.environ.get("SA3_HOME") or "~/.cache/sa3").expanduser()


def models_folder() -> Path:
    return home() / "models"


def installed() -> dict[str, Path]:
    """Name -> folder of every installed model, preferred ones first, the embedded demo last."""
    folder = models_folder()
    found = {path.name: path for path in sorted(folder.iterdir())} if folder.is_dir() else {}
    found = {name: path for name, path in found.items() if (path / CONFIG_FILE).is_file() and not name.startswith(".")}
    names = [name for name in PREFERENCE if name in found] + [name for name in found if name not in PREFERENCE]
    result = {name: found[name] for name in names}
    if DEMO not in result and (DEMO_FOLDER / CONFIG_FILE).is_file():
        result[DEMO] = DEMO_FOLDER
    return result


def licence_page(name: str) -> str | None:
    """Where the licence of a released model is accepted."""
    return f"https://huggingface.co/{REPOSITORIES[name]}" if name in REPOSITORIES else None


def open_model(folder: Path) -> ModelConfig:
    """The configuration, once it and the header of the weights are known to fit. Raises what ``DAMAGE`` lists."""
    config = ModelConfig.load(folder)
    check_folder(folder, config)
    return config


def find_model(name: str | None, *, generates: bool) -> tuple[Path, ModelConfig]:
    """Folder and configuration of a model given by name or path, or of the default one.

    Raises FileNotFoundError for an unknown or uninstalled one, saying what there is and how to get it; ValueError for
    an autoencoder alone where ``generates`` asks for a diffusion model.
    """
    models = installed()
    if name is None:
        return _default(models, generates=generates)
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
    return folder, config


def _default(models: dict[str, Path], *, generates: bool) -> tuple[Path, ModelConfig]:
    """The first that is whole; damaged ones before it are named on stderr, and raised when there is no other."""
    damaged: dict[str, Exception] = {}
    for name, folder in models.items():
        try:
            config = open_model(folder)
        except DAMAGE as error:
            damaged[name] = error
            continue
        if config.diffusion is not None or not generates:
            for other, reason in damaged.items():
                click.echo(f"note: model {other} is damaged, {name} is used instead ({reason})", err=True)
            return folder, config
    if damaged:
        raise next(iter(damaged.values()))
    raise FileNotFoundError(
        "no model is installed; run 'sa3 convert small-music', or 'sa3 convert PATH OUT' for a checkpoint on this disk"
    )
