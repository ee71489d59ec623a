"""Map every tensor of our checkpoints to its name in the official ones, and back: the one table of names.

Layouts (ours <- official):

    copy          the same shape
    unit_kernel   (out, in) <- (out, in, 1), a convolution of kernel 1
    channels      (C,) <- (1, C, 1)
    token         (D,) <- (1, 1, D)
    weight_norm   the folded kernel w = g v / ||v||, (out, kernel * in) with the kernel tap outermost
                  <- weight_g (out, 1, 1) and weight_v (out, in, kernel) [B45]
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sa3_mlx.common.model.checkpoint import expected_tensors
from sa3_mlx.common.model.config import ROTARY_SIZE, ModelConfig

Layout = Literal["copy", "unit_kernel", "channels", "token", "weight_norm"]
Shape = tuple[int, ...]

AUTOENCODER_PREFIX = "pretransform.model."  # in a full file; a file of an autoencoder alone has bare names
TEXT_PREFIXES = ("model.encoder.", "encoder.")  # whole T5Gemma file, file of its encoder alone
TEXT_UNUSED = ("model.decoder.", "decoder.", "lm_head.")  # the half of T5Gemma that is not needed

# {n} is the number of a layer. Order as in the networks.
_COPIED: dict[str, str] = {
    # text encoder
    "text_encoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
    **{
        f"text_encoder.layers.{{n}}.{ours}.weight": f"model.encoder.layers.{{n}}.{official}.weight"
        for ours, official in {
            "self_attn.q_proj": "self_attn.q_proj",
            "self_attn.k_proj": "self_attn.k_proj",
            "self_attn.v_proj": "self_attn.v_proj",
            "self_attn.o_proj": "self_attn.o_proj",
            "pre_attn_norm": "pre_self_attn_layernorm",
            "post_attn_norm": "post_self_attn_layernorm",
            "pre_ff_norm": "pre_feedforward_layernorm",
            "post_ff_norm": "post_feedforward_layernorm",
            "mlp.gate_proj": "mlp.gate_proj",
            "mlp.up_proj": "mlp.up_proj",
            "mlp.down_proj": "mlp.down_proj",
        }.items()
    },
    "text_encoder.norm.weight": "model.encoder.norm.weight",
    # conditioner
    "conditioner.padding_embedding": "conditioner.conditioners.prompt.padding_embedding",
    **{
        f"conditioner.seconds_embed.{kind}": f"conditioner.conditioners.seconds_total.embedder.embedding.1.{kind}"
        for kind in ("weight", "bias")
    },
    # diffusion transformer
    **{
        f"dit.{ours}.{ours_map}.{kind}": f"model.model.{official}.{official_map}.{kind}"
        for ours, official in {
            "to_timestep_embed": "to_timestep_embed",
            "to_cond_embed": "to_cond_embed",
            "to_global_embed": "to_global_embed",
            "to_modulation": "transformer.global_cond_embedder",
            "layers.{n}.local_embed": "transformer.layers.{n}.to_local_embed",
        }.items()
        for ours_map, official_map in (("fc1", "0"), ("fc2", "2"))
        for kind in ("weight", "bias")
    },
    **{
        f"dit.{name}": f"model.model.transformer.{name}"
        for name in ("memory_tokens", "project_in.weight", "project_out.weight")
    },
    "dit.layers.{n}.scale_shift_gate": "model.model.transformer.layers.{n}.to_scale_shift_gate",
    "dit.layers.{n}.cross_attn_norm.gamma": "model.model.transformer.layers.{n}.cross_attend_norm.gamma",
    **{
        f"dit.layers.{{n}}.{name}": f"model.model.transformer.layers.{{n}}.{name}"
        for name in (
            "pre_norm.gamma",
            "self_attn.to_qkv.weight",
            "self_attn.to_out.weight",
            "self_attn.q_norm.gamma",
            "self_attn.k_norm.gamma",
            "cross_attn.to_q.weight",
            "cross_attn.to_kv.weight",
            "cross_attn.to_out.weight",
            "cross_attn.q_norm.gamma",
            "cross_attn.k_norm.gamma",
            "ff_norm.gamma",
        )
    },
    **{
        f"dit.layers.{{n}}.ff.{ours}.{kind}": f"model.model.transformer.layers.{{n}}.ff.ff.{official}.{kind}"
        for ours, official in (("proj_in", "0.proj"), ("proj_out", "2"))
        for kind in ("weight", "bias")
    },
    # autoencoder
    "same.bottleneck.running_std": f"{AUTOENCODER_PREFIX}bottleneck.running_std",
    **{
        f"same.{ours}.{kind}": f"{AUTOENCODER_PREFIX}{official}.{kind}"
        for ours, official in (("encoder.project_out", "encoder.layers.2"), ("decoder.project_in", "decoder.layers.1"))
        for kind in ("weight", "bias")
    },
    **{
        f"same.{half}.layers.{{n}}.{ours}": f"{AUTOENCODER_PREFIX}{half}.layers.{block}.transformers.{{n}}.{official}"
        for half, block in (("encoder", 0), ("decoder", 3))
        for ours, official in {
            **{
                f"{norm}.{kind}": f"{norm}.{kind}"
                for norm in ("pre_norm", "ff_norm", "self_attn.q_norm", "self_attn.k_norm")
                for kind in ("alpha", "gamma", "beta")
            },
            "self_attn.to_qkv.weight": "self_attn.to_qkv.weight",
            "self_attn.to_out.weight": "self_attn.to_out.weight",
            "ff.proj_in.weight": "ff.ff.0.proj.weight",
            "ff.proj_in.bias": "ff.ff.0.proj.bias",
            "ff.proj_out.weight": "ff.ff.2.weight",
            "ff.proj_out.bias": "ff.ff.2.bias",
        }.items()
    },
    "same.encoder.mapping.bias": f"{AUTOENCODER_PREFIX}encoder.layers.0.mapping.bias",
    "same.decoder.mapping.bias": f"{AUTOENCODER_PREFIX}decoder.layers.3.mapping.bias",
}

_RESHAPED: dict[str, tuple[Layout, tuple[str, ...]]] = {
    "dit.preprocess.weight": ("unit_kernel", ("model.model.preprocess_conv.weight",)),
    "dit.postprocess.weight": ("unit_kernel", ("model.model.postprocess_conv.weight",)),
    "same.bottleneck.scale": ("channels", (f"{AUTOENCODER_PREFIX}bottleneck.scaling_factor",)),
    "same.bottleneck.bias": ("channels", (f"{AUTOENCODER_PREFIX}bottleneck.bias",)),
    **{
        f"same.{half}.new_token": ("token", (f"{AUTOENCODER_PREFIX}{half}.layers.{block}.new_tokens",))
        for half, block in (("encoder", 0), ("decoder", 3))
    },
    **{
        f"same.{half}.mapping.weight": (
            "weight_norm",
            tuple(f"{AUTOENCODER_PREFIX}{half}.layers.{block}.mapping.weight_{kind}" for kind in "gv"),
        )
        for half, block in (("encoder", 0), ("decoder", 3))
    },
}

TABLE: dict[str, tuple[Layout, tuple[str, ...]]] = {
    **{ours: ("copy", (official,)) for ours, official in _COPIED.items()},
    **_RESHAPED,
}


@dataclass(frozen=True)
class TensorPair:
    """Pair one of our tensors with the official tensor or tensors (weight norm: g, v) that hold it."""

    ours: str
    shape: Shape
    layout: Layout
    official: tuple[str, ...]
    official_shapes: tuple[Shape, ...]


def pairs(config: ModelConfig, parts: Collection[str]) -> list[TensorPair]:
    """List every tensor of these parts with its official counterpart, by full-file names."""
    return [_pair(config, name, shape) for name, shape in expected_tensors(config, parts).items()]


def _pair(config: ModelConfig, name: str, shape: Shape) -> TensorPair:
    number = re.search(r"\.layers\.(\d+)\.", name)
    layout, templates = TABLE[re.sub(r"\.layers\.\d+\.", ".layers.{n}.", name)]
    official = tuple(template.replace("{n}", number.group(1)) if number else template for template in templates)
    shapes: tuple[Shape, ...]
    match layout:
        case "copy":
            shapes = (shape,)
        case "unit_kernel":
            shapes = ((*shape, 1),)
        case "channels":
            shapes = ((1, *shape, 1),)
        case "token":
            shapes = ((1, 1, *shape),)
        case "weight_norm":
            kernel = config.same.decoder_kernel if ".decoder." in name else 1
            shapes = ((shape[0], 1, 1), (shape[0], shape[1] // kernel, kernel))
    return TensorPair(name, shape, layout, official, shapes)


def buffers(config: ModelConfig, parts: Collection[str]) -> dict[str, Shape]:
    """Return name and shape of the tensors of official files that carry no information: RoPE frequencies and an empty
    noise scale."""
    rotary = (ROTARY_SIZE // 2,)
    found: dict[str, Shape] = {}
    if "dit" in parts:
        found["model.model.transformer.rotary_pos_emb.inv_freq"] = rotary
    if "same" in parts:
        found[f"{AUTOENCODER_PREFIX}bottleneck.noise_scaling_factor"] = (1, 0, 1)
        for half, block, depth in (
            ("encoder", 0, config.same.encoder_depth),
            ("decoder", 3, config.same.decoder_depth),
        ):
            for layer in range(depth):
                found[f"{AUTOENCODER_PREFIX}{half}.layers.{block}.transformers.{layer}.rope.inv_freq"] = rotary
    return found


def fold_weight_norm(g: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Fold g (out, 1, 1) and v (out, in, kernel) to (out, kernel * in), float64 [B45]. A zero v gives NaN.

    A g that is the norm of v, but for rounding to float32, leaves v as it is: so ``unfold_weight_norm`` has an inverse.
    """
    v = v.astype(np.float64)
    norm = np.sqrt((v * v).sum(axis=(1, 2), keepdims=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = v * np.where((norm > 0) & (norm.astype(np.float32) == g), 1.0, g.astype(np.float64) / norm)
    folded: np.ndarray = weight.transpose(0, 2, 1).reshape(v.shape[0], -1)
    return folded


def unfold_weight_norm(weight: np.ndarray, kernel: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn a kernel (out, kernel * in) into its norms g (out, 1, 1), float64, and v (out, in, kernel), itself."""
    out_size, columns = weight.shape
    v = np.ascontiguousarray(weight.reshape(out_size, kernel, columns // kernel).transpose(0, 2, 1))
    wide = v.astype(np.float64)
    return np.sqrt((wide * wide).sum(axis=(1, 2), keepdims=True)), v


def elements(shape: Shape) -> int:
    """Count the elements of a tensor."""
    return math.prod(shape)
