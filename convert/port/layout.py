"""Say which array of which .npz file of the official MLX port holds each of our tensors.

A model is four files: the DiT with the conditioner, encoder and decoder of SAME, and the text encoder, which holds
its tokenizer too. Arrays are named after the official checkpoint with the prefix of the part removed; gains of norms
are ``.weight``, layers of SAME are ``blocks``, weight norm is folded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import DIT_MEDIUM, DIT_SMALL, SAME_L, SAME_S, T5GEMMA

from ..keys import AUTOENCODER_PREFIX, Shape, TensorPair, pairs

Role = Literal["dit", "encoder", "decoder", "text"]
ROLES: tuple[Role, ...] = ("dit", "encoder", "decoder", "text")
PARTS = ("text_encoder", "conditioner", "dit", "same")
META, TOKENIZER = "META", "TOKENIZER_MODEL"  # of the text encoder's file: its sizes, a SentencePiece model
STORED: dict[Role, str] = {"dit": "F16", "encoder": "F32", "decoder": "F32", "text": "F16"}  # as its files are named
SIZES = ((DIT_SMALL, SAME_S, T5GEMMA), (DIT_MEDIUM, SAME_L, T5GEMMA))  # for which the port has modules

_CONDITIONER = {
    "padding_embedding": "cond.padding_embedding",
    "seconds_embed.weight": "cond.seconds_total_weight",
    "seconds_embed.bias": "cond.seconds_total_bias",
}
_DIT = (("model.model.", ""), (r"\.gamma$", ".weight"), (r"\.to_local_embed\.", ".to_local_embed.seq."))
_SAME = (
    (r"\.layers\.\d+\.transformers\.", ".blocks."),
    (r"\.self_attn\.", ".attn."),
    (r"\.ff\.ff\.0\.proj\.", ".ff.glu_proj."),
    (r"\.ff\.ff\.2\.", ".ff.proj_out."),
    (r"^encoder\.layers\.2\.", "encoder.project_out."),
    (r"^decoder\.layers\.1\.", "decoder.project_in."),
    (r"\.layers\.\d+\.", "."),
    (r"\.weight_[gv]$", ".weight"),
)


@dataclass(frozen=True)
class ArrayPlace:
    """Say where the port keeps one of our tensors, and in which shape its own files have it."""

    pair: TensorPair
    role: Role
    name: str
    shape: Shape


def is_known(config: ModelConfig) -> bool:
    """Tell whether the port has modules of this architecture."""
    diffusion = config.diffusion
    return diffusion is not None and (diffusion.dit, config.same, diffusion.text_encoder) in SIZES


def kind_of(config: ModelConfig) -> str:
    """Return the letter in the names of the autoencoder's files: s or l."""
    return "s" if config.same.attention == "chunked" else "l"


def file_names(config: ModelConfig) -> dict[Role, str]:
    """Return the names under which the port looks for the files of a model."""
    name = re.sub(r"[^\w.-]", "-", re.sub(r"^small\b", "sm", config.name))
    same = f"same_{kind_of(config)}"
    return {
        "dit": f"dit_{name}_f16.npz",
        "encoder": f"{same}_encoder_f32.npz",
        "decoder": f"{same}_decoder_f32.npz",
        "text": "t5gemma_f16.npz",
    }


def places(config: ModelConfig) -> list[ArrayPlace]:
    """List every tensor of a complete model, with the place where it is read; see ``also_in``."""
    return [_place(pair) for pair in pairs(config, PARTS)]


def also_in(place: ArrayPlace) -> Role | None:
    """Return the other file that holds the same array: the scale of the latents is in both halves of SAME."""
    return "decoder" if place.pair.ours == "same.bottleneck.running_std" else None


def _place(pair: TensorPair) -> ArrayPlace:
    part, _, own = pair.ours.partition(".")
    official = pair.official[-1]
    if part == "conditioner":
        return ArrayPlace(pair, "dit", _CONDITIONER[own], pair.shape)
    if part == "text_encoder":
        return ArrayPlace(pair, "text", official.removeprefix("model.encoder."), pair.shape)
    if part == "dit":
        for pattern, words in _DIT:
            official = re.sub(pattern, words, official)
        shape = (pair.shape[0], 1, pair.shape[1]) if pair.layout == "unit_kernel" else pair.shape
        return ArrayPlace(pair, "dit", official, shape)
    name = official.removeprefix(AUTOENCODER_PREFIX)
    if name.startswith("bottleneck."):
        return ArrayPlace(pair, "encoder", name.removeprefix("bottleneck."), pair.official_shapes[0])
    for pattern, words in _SAME:
        name = re.sub(pattern, words, name)
    half, _, name = name.partition(".")
    return ArrayPlace(pair, "encoder" if half == "encoder" else "decoder", name, pair.official_shapes[-1])
