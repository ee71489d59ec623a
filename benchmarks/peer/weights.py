"""Draw random weights under our names and rename them for the official MLX port. No code of the port is here.

Matrices keep the size of their input; gains are near 1; offsets and embeddings are small.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from sa3_mlx.common.model.checkpoint import expected_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.runtime import mx

Weights = dict[str, mx.array]

_COMMON = (
    (r"\.(pre|post)_attn_norm\.weight$", r".\1_self_attn_layernorm.weight"),
    (r"\.(pre|post)_ff_norm\.weight$", r".\1_feedforward_layernorm.weight"),
)
_DIT = (
    (r"^(to_timestep_embed|to_cond_embed|to_global_embed)\.fc1", r"\1.0"),
    (r"^(to_timestep_embed|to_cond_embed|to_global_embed)\.fc2", r"\1.2"),
    (r"^to_modulation\.fc1", "transformer.global_cond_embedder.0"),
    (r"^to_modulation\.fc2", "transformer.global_cond_embedder.2"),
    (r"^(preprocess|postprocess)\.weight", r"\1_conv.weight"),
    (r"^(project_in|project_out|memory_tokens|layers)\b", r"transformer.\1"),
    (r"\.scale_shift_gate$", ".to_scale_shift_gate"),
    (r"\.cross_attn_norm\.gamma$", ".cross_attend_norm.weight"),
    (r"\.gamma$", ".weight"),
    (r"\.ff\.proj_in\.", ".ff.ff.0.proj."),
    (r"\.ff\.proj_out\.", ".ff.ff.2."),
    (r"\.local_embed\.fc1\.", ".to_local_embed.seq.0."),
    (r"\.local_embed\.fc2\.", ".to_local_embed.seq.2."),
)
_SAME = (
    (r"^bottleneck\.scale$", "scaling_factor"),
    (r"^bottleneck\.", ""),
    (r"^new_token$", "new_tokens"),
    (r"^layers\.", "blocks."),
    (r"\.self_attn\.", ".attn."),
    (r"\.ff\.proj_in\.", ".ff.glu_proj."),
    (r"\.ff\.proj_out\.", ".ff.proj_out."),
)


def random_weights(config: ModelConfig, parts: Sequence[str], seed: int) -> Weights:
    """Draw weights by the names of a checkpoint, in fp32, evaluated."""
    keys = iter(mx.random.split(mx.random.key(seed), 4000))
    weights = {name: _random(name, shape, next(keys)) for name, shape in expected_tensors(config, parts).items()}
    mx.eval(list(weights.values()))
    return weights


def _random(name: str, shape: tuple[int, ...], key: mx.array) -> mx.array:
    values = mx.random.normal(shape, key=key)
    if name.endswith(("gamma", "alpha", "bottleneck.scale", "running_std")):
        return 1 + 0.1 * values
    if "embed_tokens" in name or "memory_tokens" in name or "padding_embedding" in name or "new_token" in name:
        return values
    return 0.02 * values if len(shape) == 1 else values * shape[-1] ** -0.5


def _rename(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def for_text(weights: Weights) -> Weights:
    """Rename those of the text encoder."""
    part = {n.removeprefix("text_encoder."): a for n, a in weights.items() if n.startswith("text_encoder.")}
    return {_rename(name, _COMMON): array for name, array in part.items()}


def for_dit(weights: Weights) -> Weights:
    """Rename those of the DiT."""
    part = {n.removeprefix("dit."): a for n, a in weights.items() if n.startswith("dit.")}
    renamed = {_rename(name, _DIT): array for name, array in part.items()}
    return {name: array[:, None] if "process_conv" in name else array for name, array in renamed.items()}


def for_conditioner(weights: Weights) -> Weights:
    """Rename those of the conditioner, as they stand in the port's file of the DiT."""
    return {
        "cond.padding_embedding": weights["conditioner.padding_embedding"],
        "cond.seconds_total_weight": weights["conditioner.seconds_embed.weight"],
        "cond.seconds_total_bias": weights["conditioner.seconds_embed.bias"],
    }


def for_same(weights: Weights, half: str, config: ModelConfig) -> Weights:
    """Rename those of SAME; ``half`` is "encoder" or "decoder"."""
    used = {n.removeprefix(f"same.{half}.") for n in weights if n.startswith(f"same.{half}.")}
    part = {name: weights[f"same.{half}.{name}"] for name in used}
    part["bottleneck.running_std"] = weights["same.bottleneck.running_std"]
    if half == "encoder":
        part |= {f"bottleneck.{name}": weights[f"same.bottleneck.{name}"][None, :, None] for name in ("scale", "bias")}
    elif config.same.decoder_kernel == 3:
        mapping = part["mapping.weight"]  # (out, 3 D)
        part["mapping.weight"] = mapping.reshape(len(mapping), 3, -1)
    part["new_token"] = part["new_token"][None, None]
    return {_rename(name, _SAME): array for name, array in part.items()}
