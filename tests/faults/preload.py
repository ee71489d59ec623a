"""Import everything that the commands use, before processes are split off."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.util import find_spec

import click

from sa3_mlx.cli.app import COMMANDS
from sa3_mlx.common.model.presets import PRESETS

from .world import PRESET

_LIBRARIES = ("soxr", "tqdm", "matplotlib.figure", "matplotlib.backends.backend_agg", "tokenizers", "soundfile")
_TRAINING = ("torch.utils.tensorboard", "torch.distributed.checkpoint", "webdataset", "scipy.linalg", "scipy.stats")


def has_torch() -> bool:
    """Tell whether the commands of training can run."""
    return all(find_spec(name) is not None for name in ("torch", "scipy", "tensorboard", "webdataset"))


def preload(*, training: bool) -> None:
    """Import the commands and their libraries, those of ``training`` where asked; nothing is computed."""
    for name in _LIBRARIES:
        importlib.import_module(name)
    for module, _, _ in COMMANDS.values():
        importlib.import_module(f"sa3_mlx.cli.{module}")
    for name in ("sa3_convert", "sa3_mlx.pipeline", "sa3_mlx.quantize", "sa3_mlx.common.files.spectrogram"):
        importlib.import_module(name)
    for name in ("user_folder", "lint", "shards"):
        importlib.import_module(f"sa3_torch.train.data.{name}")
    if training:
        for name in _TRAINING:
            importlib.import_module(name)
        for name in ("autoencoder.stage", "flow.pretrain", "lora.stage"):
            importlib.import_module(f"sa3_torch.train.{name}")
        data = importlib.import_module("sa3_torch.train.data")
        for found in pkgutil.walk_packages(data.__path__, f"{data.__name__}."):
            importlib.import_module(found.name)
        for name in ("comparison", "real", "report", "run", "stored", "judge.judge", "measures.analysis"):
            importlib.import_module(f"sa3_torch.evaluate.{name}")
        _add_preset()


def _add_preset() -> None:
    """Give the stages a model that is small enough."""
    from sa3_torch.train.autoencoder.stage import autoencoder
    from sa3_torch.train.flow.pretrain import pretrain
    from tests.support.stages import MODEL

    PRESETS[PRESET] = MODEL
    for command in (autoencoder, pretrain):
        for option in command.params:
            if option.name == "size":
                option.type = click.Choice(sorted(PRESETS))
