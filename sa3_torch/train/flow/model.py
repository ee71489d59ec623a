"""Diffusion models as they are trained: without the autoencoder, which is frozen, in fp32 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import torch
from torch import Tensor

from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.config import DiffusionConfig, ModelConfig
from sa3_mlx.common.schema import quoted
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_torch.same import SAME
from sa3_torch.train.data.encode.pre_encode import load_autoencoder
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.weights import StableAudio, load_model, save_checkpoint

PARENTS_FILE, AUTOENCODER = "parents.json", "autoencoder"  # in the folder of an exported model


def diffusion_of(config: ModelConfig) -> DiffusionConfig:
    """Return the part of the diffusion model. Raises ValueError for a model that is only an autoencoder."""
    if config.diffusion is None:
        raise ValueError(f"{config.name} has no diffusion model to train")
    return config.diffusion


def new_model(config: ModelConfig) -> StableAudio:
    """Make text encoder, conditioner and DiT, whose weights are not set yet."""
    diffusion_of(config)
    model = StableAudio(config)
    del model.same  # frozen, not trained and not averaged
    return model


def open_model(folder: Path) -> tuple[StableAudio, ModelConfig, SAME]:
    """Open a checkpoint as the start of a later stage, in fp32 on the CPU: what is trained, and its autoencoder.

    Raises FileNotFoundError for a missing file, ValueError for one that does not fit or is only an autoencoder.
    """
    model = load_model(folder, torch.device("cpu"))
    diffusion_of(model.config)
    same = cast(SAME, model.get_submodule("same"))
    del model.same
    return model, model.config, same.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class StartModel:
    """Hold a checkpoint folder that a stage begins with, and latents that its autoencoder has made."""

    model: StableAudio
    config: ModelConfig
    same: SAME
    latents: LatentSet
    tokenizer_file: Path
    weights_hash: str

    @classmethod
    def open(cls, folder: Path, latents: Sequence[Path], autoencoder: Path | None) -> Self:
        """Open all of it; ``autoencoder`` is the folder of the one that made the latents, where the model does not say.

        Raises FileNotFoundError or ValueError for what is missing or does not belong together.
        """
        model, config, same = open_model(folder)
        return cls(
            model=model,
            config=config,
            same=same,
            latents=LatentSet(*latents, autoencoder=autoencoder_of(folder, same, autoencoder)),
            tokenizer_file=folder / TOKENIZER_FILE,
            weights_hash=file_hash(folder / WEIGHTS_FILE),
        )

    def parents(self) -> dict[str, str]:
        """Return the hashes of the models that the trained one is made with: role -> "sha256:..."."""
        return {AUTOENCODER: self.latents.autoencoder, "start": self.weights_hash}


def autoencoder_of(folder: Path, same: SAME, autoencoder: Path | None) -> str:
    """Return the hash of the autoencoder that a model was trained with: that of ``autoencoder``, or the one recorded
    with the model; a checkpoint without a record is its own.

    Raises ValueError when ``autoencoder`` has other weights than ``same``, which is stored in 16 bits.
    """
    record = folder / PARENTS_FILE
    if autoencoder is None:
        if record.is_file():
            made = read_object(record).get(AUTOENCODER)
            if not isinstance(made, str):
                raise ValueError(f"{record}: {AUTOENCODER} is {quoted(made)}; expected a hash, or give --autoencoder")
            return made
        return file_hash(folder / WEIGHTS_FILE)
    given, digest = load_autoencoder(autoencoder)
    own, other = same.state_dict(), given.state_dict()
    if given.config != same.config or any(not torch.equal(own[k].half(), other[k].half()) for k in own):
        raise ValueError(f"{autoencoder}: not the autoencoder in {folder}; give the one that this model was trained on")
    return digest


def open_text(file: Path, config: ModelConfig) -> Tokenizer:
    """Open the tokenizer of a model. Raises ValueError when it has ids that the text encoder does not know."""
    encoder = diffusion_of(config).text_encoder
    tokenizer = Tokenizer(file, encoder.max_length)
    if tokenizer.vocab_size > encoder.vocab_size:
        raise ValueError(
            f"{file}: has {tokenizer.vocab_size} ids, the text encoder of {config.name} {encoder.vocab_size}"
        )
    return tokenizer


def export_model(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, Tensor],
    same: SAME,
    tokenizer_file: Path,
    parents: dict[str, str],
) -> None:
    """Write the whole model: text encoder, conditioner, DiT and the frozen autoencoder, in fp16, with the tokenizer."""
    state = {**weights, **{f"same.{k}": v for k, v in same.state_dict().items()}}
    with new_folder(folder) as made:
        save_checkpoint(made, config, state, "F16")
        (made / TOKENIZER_FILE).write_bytes(tokenizer_file.read_bytes())
        write_json(made / PARENTS_FILE, parents)
