"""Find models: installed ones in $SA3_HOME/models, those inside the package, or any folder by its path."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sa3_mlx import assets
from sa3_mlx.common.embedded import Shipped, unpack
from sa3_mlx.common.model.checkpoint import CONFIG_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS, REPOSITORIES
from sa3_mlx.common.quant.format import check_folder

DEMO = "demo"
DEMO_FOLDER = assets.DEMO
DEMO_BASE = "demo-base"
PACKED_BASE = assets.DEMO_BASE
HUB = "https://huggingface.co/"
_HUB_ID = re.compile(rf"(?:{re.escape(HUB)})?[\w.-]*\w/[\w.-]+/?")
DAMAGE = (ValueError, OSError, RecursionError)  # what ``open_model`` raises
# models that are used when none is given; a quantized or a user's own one has to be asked for
PREFERENCE = ("small-music", "medium", "small-sfx", "small-music-base", "medium-base", "small-sfx-base", DEMO)


@dataclass(frozen=True, kw_only=True)
class Model:
    """Hold a model and what the user calls it: the name it is installed under, or the path that was given."""

    name: str
    folder: Path
    config: ModelConfig

    @property
    def label(self) -> str:
        """Return the name, with the configuration's own where it is another."""
        return self.name if self.name == self.config.name else f"{self.name} ({self.config.name})"

    @property
    def tag(self) -> str:
        """Return the name that goes into files: of an absolute path its last part."""
        return Path(self.name).name if Path(self.name).is_absolute() else self.name


def home() -> Path:
    """Return $SA3_HOME, by default ~/.cache/sa3."""
    return Path(os.environ.get("SA3_HOME") or "~/.cache/sa3").expanduser()


def models_folder() -> Path:
    """Return the folder of installed models; it need not exist."""
    return home() / "models"


def installed() -> dict[str, Path]:
    """Return the folders of all installed models by name: released ones, the embedded demo, then all others.

    That of the demo's base is there from its first use on, see ``ready``.
    """
    try:
        paths = sorted(models_folder().iterdir())
    except OSError:  # there is none, or it cannot be read
        paths = []
    found = {path.name: path for path in paths if not path.name.startswith(".") and _holds_model(path)}
    if DEMO not in found and (DEMO_FOLDER / CONFIG_FILE).is_file():
        found[DEMO] = DEMO_FOLDER
    if DEMO_BASE not in found and (made := Shipped.read(PACKED_BASE)) is not None:
        found[DEMO_BASE] = home() / "unpacked" / f"{DEMO_BASE}-{made.weights.removeprefix('sha256:')[:12]}"
    return {name: found[name] for name in dict.fromkeys((*PREFERENCE, *found)) if name in found}


def stored_in(name: str, folder: Path) -> Path:
    """Return where an installed model lies now: the demo's base that was not unpacked yet, inside the package."""
    packed = name == DEMO_BASE and folder.parent.name == "unpacked" and not folder.is_dir()
    return PACKED_BASE if packed else folder


def may_hold(name: str, folder: Path, weights: str) -> bool:
    """Tell whether an installed model can have the weights of a hash, without unpacking the demo's base.

    Raises ConfigError for a damaged record of how that was made.
    """
    made = Shipped.read(PACKED_BASE) if stored_in(name, folder) != folder else None
    return made is None or made.weights == weights


def ready(name: str, folder: Path) -> Path:
    """Return the folder of an installed model; the demo's base is unpacked first, once for every version of it.

    Raises ValueError for a damaged package, OSError where the disk refuses.
    """
    if stored_in(name, folder) != folder:
        unpack(PACKED_BASE, DEMO_FOLDER, folder)
    return folder


def _holds_model(path: Path) -> bool:
    """Tell whether a model lies there; one that cannot be read counts, so that opening it says why."""
    try:
        return (path / CONFIG_FILE).is_file()
    except OSError:
        return True


def known_name(text: str) -> str:
    """Return the name of a released model that is given by its repository or page on the hub; other text as it is."""
    repository = text.removeprefix(HUB).strip("/").lower()
    return next((name for name, known in REPOSITORIES.items() if known.lower() == repository), text)


def default_models() -> Iterator[tuple[str, Path]]:
    """Yield names and folders of installed models that are used when none is given, in order of preference."""
    return ((name, folder) for name, folder in installed().items() if name in PREFERENCE)


def licence_page(name: str) -> str | None:
    """Return the page of a released model's original repository, on which its licence stands."""
    return HUB + REPOSITORIES[name] if name in REPOSITORIES else None


def open_model(folder: Path) -> ModelConfig:
    """Return the configuration, if it and the header of the weights fit. Raises what ``DAMAGE`` lists."""
    config = ModelConfig.load(folder)
    check_folder(folder, config)
    return config


def name_of(folder: Path) -> str:
    """Return the name of the installed model in a folder, or else its path."""
    return next((name for name, path in installed().items() if path == folder), str(folder))


def model_folder(model: str | Path) -> Path:
    """Return the folder of a model that is given by its path, or by name as text.

    Raises FileNotFoundError for a text that is neither a folder nor the name of an installed model.
    """
    return Path(model) if isinstance(model, Path) or Path(model).is_dir() else find_model_folder(model)[1]


def find_model_folder(name: str) -> tuple[str, Path]:
    """Return what an installed model is called and its folder, given by name, hub id or path.

    Raises FileNotFoundError for an unknown or uninstalled one, saying what there is and how to get it.
    """
    models = installed()
    if name not in models and Path(name).is_dir():
        return name, Path(name)
    if (name := known_name(name)) in models:
        return name, ready(name, models[name])
    if name in REPOSITORIES:
        raise FileNotFoundError(f"{name} is not installed; run 'sa3 get {name}' (licence: {licence_page(name)})")
    if name in PRESETS:
        raise FileNotFoundError(f"{name}: there are no public weights of this model; convert your own checkpoint")
    if _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name}: no such folder, and no model of the hub that sa3 knows; known: {', '.join(REPOSITORIES.values())}"
        )
    near = difflib.get_close_matches(name, [*models, *REPOSITORIES], n=1)
    raise FileNotFoundError(
        f"{name}: no such model or folder; {f'did you mean {near[0]}? ' if near else ''}"
        f"installed: {', '.join(models) or 'none'}; known: {', '.join(REPOSITORIES)}"
    )


def named_model(name: str, *, generates: bool) -> Model:
    """Return a model given by name, hub id or path.

    Raises FileNotFoundError as ``find_model_folder``; ValueError for an autoencoder alone where ``generates`` asks for
    a diffusion model.
    """
    name, folder = find_model_folder(name)
    config = ModelConfig.load(folder)
    if generates and config.diffusion is None:
        raise ValueError(f"{name} is an autoencoder alone and cannot generate; choose a model with a DiT")
    return Model(name=name, folder=folder, config=config)


def default_model(*, generates: bool) -> tuple[Model, dict[str, Exception]]:
    """Return the first default model that is whole, and what is wrong with those before it, by name.

    Raises that where there is no other model, and FileNotFoundError where there is none at all.
    """
    damaged: dict[str, Exception] = {}
    for name, folder in default_models():
        try:
            config = open_model(folder)
        except DAMAGE as error:
            damaged[name] = error
            continue
        if config.diffusion is not None or not generates:
            return Model(name=name, folder=folder, config=config), damaged
    if damaged:
        raise next(iter(damaged.values()))
    raise FileNotFoundError(
        "no model is there to choose; give --model, run 'sa3 get small-music', or 'sa3 convert PATH OUT' for a "
        "checkpoint on this disk"
    )
