"""Diffusion models as they are trained: without the autoencoder, which is frozen, in fp32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import torch

from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.config import DiffusionConfig, ModelConfig
from sa3_torch.same import SAME
from sa3_torch.train.data.pre_encode import load_autoencoder
from sa3_torch.weights import StableAudio, load_model

PARENTS_FILE, AUTOENCODER = "parents.json", "autoencoder"  # in the folder of an exported model


def diffusion_of(config: ModelConfig) -> DiffusionConfig:
    """Raises ValueError for an autoencoder alone."""
    if config.diffusion is None:
        raise ValueError(f"{config.name} has no diffusion model to train")
    return config.diffusion


def new_model(config: ModelConfig) -> StableAudio:
    """Text encoder, conditioner and DiT, weights not set yet."""
    diffusion_of(config)
    model = StableAudio(config)
    del model.same  # frozen, not trained and not averaged
    return model


def open_model(folder: Path) -> tuple[StableAudio, ModelConfig, SAME]:
    """A checkpoint as the start of a later stage, in fp32 on the CPU: what is trained, and its autoencoder.

    Raises FileNotFoundError for a missing file, ValueError for one that does not fit and for an autoencoder alone.
    """
    model = load_model(folder, torch.device("cpu"))
    diffusion_of(model.config)
    same = cast(SAME, model.get_submodule("same"))
    del model.same
    return model, model.config, same.eval().requires_grad_(False)


def autoencoder_of(folder: Path, same: SAME, autoencoder: Path | None) -> str:
    """Hash of the autoencoder that a model was trained with: that of ``autoencoder``, or the one recorded with the
    model; a checkpoint without a record is its own.

    Raises ValueError when ``autoencoder`` has other weights than ``same``, which is stored in 16 bits.
    """
    record = folder / PARENTS_FILE
    if autoencoder is None:
        if record.is_file():
            return str(json.loads(record.read_text(encoding="utf-8"))[AUTOENCODER])
        return file_hash(folder / WEIGHTS_FILE)
    given, digest = load_autoencoder(autoencoder)
    own = same.state_dict()
    other = given.state_dict()
    if given.config != same.config or any(not torch.equal(own[k].half(), other[k].half()) for k in own):
        raise ValueError(f"{autoencoder}: not the autoencoder in {folder}; give the one that this model was trained on")
    return digest
