"""List what ``model.safetensors`` of a checkpoint folder holds: name and shape of every tensor, by configuration.

A folder of format "sa3/1" holds ``config.json``, ``model.safetensors`` and, with a text encoder, ``tokenizer.json``.
A latent CLAP lies beside them in ``clap.safetensors``: it makes no sound, so a model keeps its hash when it gets one.
Weights of linear maps are (out, in). Legend: D width, C latent channels, N layer number.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

from sa3_mlx.common.schema import listed

from .config import (
    HEAD_SIZE,
    TIMESTEP_FEATURES,
    DiffusionConfig,
    DiTConfig,
    LatentClapConfig,
    ModelConfig,
    SAMEConfig,
    TextEncoderConfig,
)

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
CLAP_FILE = "clap.safetensors"

Part = Literal["text_encoder", "conditioner", "dit", "same", "clap"]  # first component of every tensor name
PARTS: tuple[Part, ...] = ("text_encoder", "conditioner", "dit", "same")  # of model.safetensors

_LISTED = 6  # problems of a file
Shapes = dict[str, tuple[int, ...]]


def parts_of(config: ModelConfig) -> tuple[Part, ...]:
    """Return the parts that a complete ``model.safetensors`` of this configuration has."""
    return PARTS if config.diffusion is not None else ("same",)


def all_parts(config: ModelConfig) -> tuple[Part, ...]:
    """Return the same, and what a model has in files beside it."""
    return parts_of(config) if config.clap is None else (*parts_of(config), "clap")


def file_of(name: str) -> str:
    """Return the name of the file that holds a part, or a tensor, of this name."""
    return CLAP_FILE if name.split(".", 1)[0] == "clap" else WEIGHTS_FILE


def parts_in(names: Collection[str]) -> tuple[Part, ...]:
    """Return the parts that these tensor names belong to, in the order of ``PARTS``."""
    found = {name.split(".", 1)[0] for name in names}
    return tuple(part for part in PARTS if part in found)


def expected_tensors(config: ModelConfig, parts: Collection[str] | None = None) -> Shapes:
    """Return name and shape of every tensor of ``model.safetensors``, or of some parts (a DiT without its autoencoder).

    Raises ValueError for a part that the configuration does not have.
    """
    allowed = all_parts(config)
    for part in parts or ():
        if part not in allowed:
            raise ValueError(f"{config.name} has no part {part!r}; it has {', '.join(allowed)}")
    shapes: Shapes = {}
    for part in parts or parts_of(config):
        if part == "same":
            shapes |= _same(config.same, config.audio_channels)
        elif config.clap is not None and part == "clap":
            shapes |= _clap(config.clap)
        elif config.diffusion is not None and part == "text_encoder":
            shapes |= _text_encoder(config.diffusion.text_encoder)
        elif config.diffusion is not None and part == "conditioner":
            shapes |= _conditioner(config.diffusion.text_encoder.width)
        elif config.diffusion is not None:
            shapes |= _dit(config.diffusion, config.same.latent_channels)
    return shapes


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise ValueError that counts the missing, unexpected and mis-shaped tensors of ``where`` (a file) and lists the
    first of them."""
    problems = [f"missing: {name} {expected[name]}" for name in sorted(set(expected) - set(found))]
    problems += [f"unexpected: {listed([name])} {found[name]}" for name in sorted(set(found) - set(expected))]
    problems += [
        f"wrong shape: {name} is {tuple(found[name])}, must be {expected[name]}"
        for name in sorted(set(expected) & set(found))
        if tuple(found[name]) != expected[name]
    ]
    if problems:
        more = "; ..." if len(problems) > _LISTED else ""
        raise ValueError(
            f"{where}: {len(problems)} tensor(s) do not fit the configuration: {'; '.join(problems[:_LISTED])}{more}"
        )


def _linear(prefix: str, out_size: int, in_size: int, *, bias: bool) -> Shapes:
    shapes: Shapes = {f"{prefix}.weight": (out_size, in_size)}
    if bias:
        shapes[f"{prefix}.bias"] = (out_size,)
    return shapes


def _mlp(prefix: str, in_size: int, width: int, out_size: int, *, bias: bool) -> Shapes:
    return _linear(f"{prefix}.fc1", width, in_size, bias=bias) | _linear(f"{prefix}.fc2", out_size, width, bias=bias)


def _feed_forward(prefix: str, width: int, inner: int) -> Shapes:
    """List a gated feed-forward: proj_in gives value and gate [B14]."""
    return _linear(f"{prefix}.proj_in", 2 * inner, width, bias=True) | _linear(
        f"{prefix}.proj_out", width, inner, bias=True
    )


def _text_encoder(config: TextEncoderConfig) -> Shapes:
    width = config.width
    shapes: Shapes = {"text_encoder.embed_tokens.weight": (config.vocab_size, width)}
    for layer in range(config.depth):
        prefix = f"text_encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes |= _linear(f"{prefix}.self_attn.{name}", width, width, bias=False)
        for name in ("pre_attn_norm", "post_attn_norm", "pre_ff_norm", "post_ff_norm"):
            shapes[f"{prefix}.{name}.weight"] = (width,)
        shapes |= _linear(f"{prefix}.mlp.gate_proj", config.intermediate, width, bias=False)
        shapes |= _linear(f"{prefix}.mlp.up_proj", config.intermediate, width, bias=False)
        shapes |= _linear(f"{prefix}.mlp.down_proj", width, config.intermediate, bias=False)
    shapes["text_encoder.norm.weight"] = (width,)
    return shapes


def _conditioner(width: int) -> Shapes:
    seconds = _linear("conditioner.seconds_embed", width, TIMESTEP_FEATURES, bias=True)
    return {"conditioner.padding_embedding": (width,)} | seconds


def _dit(config: DiffusionConfig, channels: int) -> Shapes:
    width, text_width = config.dit.width, config.text_encoder.width
    shapes: Shapes = {"dit.memory_tokens": (config.dit.memory_tokens, width)}
    shapes |= _mlp("dit.to_timestep_embed", TIMESTEP_FEATURES, width, width, bias=True)
    shapes |= _mlp("dit.to_cond_embed", text_width, width, width, bias=False)
    shapes |= _mlp("dit.to_global_embed", text_width, width, width, bias=False)
    shapes |= _mlp("dit.to_modulation", width, width, 6 * width, bias=True)
    shapes |= _linear("dit.preprocess", channels, channels, bias=False)
    shapes |= _linear("dit.postprocess", channels, channels, bias=False)
    shapes |= _linear("dit.project_in", width, channels, bias=False)
    shapes |= _linear("dit.project_out", channels, width, bias=False)
    for layer in range(config.dit.depth):
        shapes |= _dit_layer(f"dit.layers.{layer}", config.dit, channels)
    return shapes


def _dit_layer(prefix: str, config: DiTConfig, channels: int) -> Shapes:
    width = config.width
    shapes: Shapes = {f"{prefix}.scale_shift_gate": (6 * width,)}
    for name in ("pre_norm", "cross_attn_norm", "ff_norm"):
        shapes[f"{prefix}.{name}.gamma"] = (width,)
    for attention in ("self_attn", "cross_attn"):
        shapes[f"{prefix}.{attention}.q_norm.gamma"] = (HEAD_SIZE,)
        shapes[f"{prefix}.{attention}.k_norm.gamma"] = (HEAD_SIZE,)
        shapes |= _linear(f"{prefix}.{attention}.to_out", width, width, bias=False)
    rows = (5, 2, 3) if config.differential else (3, 1, 2)  # fused projections, in widths [B13]
    shapes |= _linear(f"{prefix}.self_attn.to_qkv", rows[0] * width, width, bias=False)
    shapes |= _linear(f"{prefix}.cross_attn.to_q", rows[1] * width, width, bias=False)
    shapes |= _linear(f"{prefix}.cross_attn.to_kv", rows[2] * width, width, bias=False)
    shapes |= _feed_forward(f"{prefix}.ff", width, config.ff_mult * width)
    return shapes | _mlp(f"{prefix}.local_embed", channels + 1, width, width, bias=True)


def _same(config: SAMEConfig, audio_channels: int) -> Shapes:
    width, channels = config.width, config.latent_channels
    patch = audio_channels * config.patch_size
    shapes: Shapes = {
        "same.bottleneck.scale": (channels,),
        "same.bottleneck.bias": (channels,),
        "same.bottleneck.running_std": (1,),
        "same.encoder.new_token": (width,),
        "same.decoder.new_token": (width,),
    }
    shapes |= _linear("same.encoder.mapping", width, patch, bias=True)
    shapes |= _linear("same.encoder.project_out", channels, width, bias=True)
    shapes |= _linear("same.decoder.project_in", width, channels, bias=True)
    shapes |= _linear("same.decoder.mapping", patch, config.decoder_kernel * width, bias=True)
    for half, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        for layer in range(depth):
            shapes |= _same_layer(f"same.{half}.layers.{layer}", config)
    return shapes


def _same_layer(prefix: str, config: SAMEConfig) -> Shapes:
    width = config.width
    norms = {"pre_norm": width, "ff_norm": width, "self_attn.q_norm": HEAD_SIZE, "self_attn.k_norm": HEAD_SIZE}
    shapes: Shapes = {}
    for name, size in norms.items():
        shapes |= {f"{prefix}.{name}.alpha": (1,), f"{prefix}.{name}.gamma": (size,), f"{prefix}.{name}.beta": (size,)}
    shapes |= _linear(f"{prefix}.self_attn.to_qkv", 5 * width, width, bias=False)
    shapes |= _linear(f"{prefix}.self_attn.to_out", width, width, bias=False)
    return shapes | _feed_forward(f"{prefix}.ff", width, config.ff_mult * width)


def _clap(config: LatentClapConfig) -> Shapes:
    tower, audio = config.tower, "clap.audio"
    width, size = tower.width, tower.embedding
    shapes = _mlp(f"{audio}.to_timestep_embed", TIMESTEP_FEATURES, width, width, bias=True)
    shapes |= _mlp(f"{audio}.to_modulation", width, width, 6 * width, bias=True)
    shapes |= _linear(f"{audio}.project_in", width, tower.frames_per_token * config.latent_channels, bias=True)
    for layer in range(tower.depth):
        prefix = f"{audio}.layers.{layer}"
        shapes |= {f"{prefix}.scale_shift_gate": (6 * width,)}
        norms = {"pre_norm": width, "ff_norm": width, "self_attn.q_norm": HEAD_SIZE, "self_attn.k_norm": HEAD_SIZE}
        shapes |= {f"{prefix}.{name}.gamma": (rows,) for name, rows in norms.items()}
        shapes |= _linear(f"{prefix}.self_attn.to_qkv", 3 * width, width, bias=False)
        shapes |= _linear(f"{prefix}.self_attn.to_out", width, width, bias=False)
        shapes |= _feed_forward(f"{prefix}.ff", width, DiTConfig.ff_mult * width)
    shapes |= {f"{audio}.norm.gamma": (width,)} | _mlp(f"{audio}.projection", width, width, size, bias=True)
    return shapes | _mlp("clap.text", config.text.width, width, size, bias=True)
