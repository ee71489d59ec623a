"""Loading of checkpoint folders, strictly: missing, unexpected and mis-shaped tensors are errors."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from . import blas  # noqa: F401 (before mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn

from .conditioner import Conditioner
from .dit import DiT
from .same import SAME
from .spec.checkpoint import WEIGHTS_FILE, Part, check_tensors, expected_tensors
from .spec.config import ModelConfig
from .spec.tensorfile import TensorFile
from .t5gemma import T5GemmaEncoder


def build_part(config: ModelConfig, part: Part) -> nn.Module:
    """One part with random weights, which cost nothing before they are used: arrays are lazy."""
    if part == "same":
        return SAME(config.same, config.audio_channels)
    if config.diffusion is None:
        raise ValueError(f"{config.name} is an autoencoder alone; it has no {part}")
    text = config.diffusion.text_encoder
    if part == "text_encoder":
        return T5GemmaEncoder(text)
    if part == "conditioner":
        return Conditioner(text.width)
    return DiT(config.diffusion.dit, config.same.latent_channels, text.width)


def load_part(folder: str | Path, config: ModelConfig, part: Part, dtype: mx.Dtype | None) -> nn.Module:
    """One part of a checkpoint; ``dtype`` None keeps the file's. A tensor is read from disk when it is first used.

    Raises FileNotFoundError without a model.safetensors, ValueError for tensors that do not fit.
    """
    path = Path(folder) / WEIGHTS_FILE
    module = build_part(config, part)
    with TensorFile.open(path) as file:
        found = {name: file.info(name)[1] for name in file.names() if name.startswith(part + ".")}
        check_tensors(expected_tensors(config, [part]), found, str(path))
    arrays = cast(dict[str, mx.array], mx.load(str(path)))
    state = [(name.removeprefix(part + "."), arrays[name]) for name in found]
    if dtype is not None:
        state = [(name, array.astype(dtype)) for name, array in state]
    module.load_weights(state, strict=True)
    module.freeze()
    return module.eval()
