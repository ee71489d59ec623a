"""Read and write the ``config.json`` of a T5Gemma text encoder [B2].

Unlike model_config.json this file is written by the transformers library, whose releases add fields that do not concern
the encoder's arithmetic. So every field that does is taken or checked, and the others are left out.
"""

from __future__ import annotations

from typing import Any

from sa3_mlx.common.model.config import TextEncoderConfig
from sa3_mlx.common.schema import ConfigError

from .fields import Fields

SOFT_CAP = 50.0
NORM_EPS = 1e-6
ROPE_BASE = 10_000.0
ACTIVATION = "gelu_pytorch_tanh"


def parse_text_config(data: object, *, max_length: int) -> TextEncoderConfig:
    """Read the parsed config.json of a text encoder. Raises ConfigError, naming the field."""
    root = Fields(data, "text encoder config")
    root.constant("model_type", "t5gemma", default="t5gemma")
    fields = root.child("encoder")
    width, heads = fields.take("hidden_size", int), fields.take("num_attention_heads", int)
    head_size = fields.take("head_dim", int)
    if head_size * heads != width:
        raise ConfigError(f"{fields.where}.head_dim: {heads} heads of {head_size} do not make the width {width}")
    fields.constant("num_key_value_heads", heads, default=heads)
    fields.constant("query_pre_attn_scalar", head_size)
    fields.constant("attn_logit_softcapping", SOFT_CAP)
    fields.constant("rms_norm_eps", NORM_EPS, default=NORM_EPS)
    fields.constant("attention_bias", False, default=False)
    fields.constant("is_decoder", False, default=False)
    if fields.optional("hidden_activation", str) is not None:
        fields.constant("hidden_activation", ACTIVATION)
    _rope(fields)
    window = fields.optional("sliding_window", int)
    if window is not None and window < max_length:
        raise ConfigError(
            f"{fields.where}.sliding_window: {window} is shorter than the {max_length} tokens of a prompt"
        )
    return TextEncoderConfig(
        vocab_size=fields.take("vocab_size", int),
        width=width,
        intermediate=fields.take("intermediate_size", int),
        depth=fields.take("num_hidden_layers", int),
        heads=heads,
        max_length=max_length,
    )


def _rope(fields: Fields) -> None:
    """Check the rotary base; transformers 5 writes rope_parameters, one set or one per kind of layer."""
    fields.constant("rope_theta", ROPE_BASE, default=ROPE_BASE)
    if fields.optional("rope_scaling", dict) is not None:
        raise ConfigError(f"{fields.where}.rope_scaling: not supported")
    parameters = fields.optional("rope_parameters", dict)
    if parameters is None:
        return
    nested = [name for name, value in parameters.items() if isinstance(value, dict)]
    outer = Fields(parameters, f"{fields.where}.rope_parameters")
    for part in [outer.child(name) for name in nested] or [outer]:
        part.constant("rope_theta", ROPE_BASE, default=ROPE_BASE)
        part.constant("rope_type", "default", default="default")


def official_text_config(config: TextEncoderConfig) -> dict[str, Any]:
    """Return the parsed config.json of a T5Gemma with this encoder; its decoder half is described, never stored."""
    half = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_logit_softcapping": SOFT_CAP,
        "dropout_rate": 0.0,
        "final_logit_softcapping": None,
        "head_dim": config.width // config.heads,
        "hidden_activation": ACTIVATION,
        "hidden_size": config.width,
        "intermediate_size": config.intermediate,
        "layer_types": [("sliding_attention", "full_attention")[layer % 2] for layer in range(config.depth)],
        "max_position_embeddings": 8192,
        "model_type": "t5_gemma_module",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.depth,
        "num_key_value_heads": config.heads,
        "query_pre_attn_scalar": config.width // config.heads,
        "rms_norm_eps": NORM_EPS,
        "rope_theta": ROPE_BASE,
        "sliding_window": max(4096, config.max_length),
        "vocab_size": config.vocab_size,
    }
    return {
        "architectures": ["T5GemmaEncoderModel"],
        "model_type": "t5gemma",
        "is_encoder_decoder": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "vocab_size": config.vocab_size,
        "encoder": {**half, "is_decoder": False},
        "decoder": {**half, "is_decoder": True, "cross_attention_hidden_size": config.width},
    }
