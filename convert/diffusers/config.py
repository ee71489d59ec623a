"""Read the configurations of a diffusers pipeline of Stable Audio 3 into a ModelConfig.

Its transformer, autoencoder, duration embedder and scheduler have a file each. The library knows SAME with a sliding
window only, so this is medium and medium-base. It keeps neither the longest length nor the shift of the schedule: they
are those of medium.
"""

from __future__ import annotations

from typing import Any

from sa3_mlx.common.model.config import (
    HEAD_SIZE,
    TIMESTEP_FEATURES,
    DiffusionConfig,
    DiTConfig,
    ModelConfig,
    SAMEConfig,
)
from sa3_mlx.common.model.presets import LOGSNR, PRESETS
from sa3_mlx.common.schema import ConfigError, is_finite

from ..fields import Fields
from ..model_config import HEAD_ROOM_SECONDS
from ..text_config import parse_text_config

_MEDIUM = PRESETS["medium"]
_TOKENS = 256  # of a prompt, a constant of the pipeline
_TOKEN_NOISE = 0.01  # [B47]; the library leaves it out


def parse_pipeline(configs: dict[str, Any], *, name: str | None, fallback: str) -> ModelConfig:
    """Return the configuration of the parsed files, by component; a ``name`` of None is found by the sizes.

    Raises ConfigError, which names component and field.
    """
    same, rate, audio_channels = _autoencoder(Fields(configs["vae"], "vae"))
    text = parse_text_config(configs["text_encoder"], max_length=_TOKENS)
    dit = _transformer(Fields(configs["transformer"], "transformer"), same.latent_channels, text.width)
    seconds_max = _duration(Fields(configs["duration_embedder"], "duration_embedder"), text.width)
    stochastic = _scheduler(Fields(configs["scheduler"], "scheduler"))
    assert _MEDIUM.diffusion is not None
    diffusion = DiffusionConfig(
        objective="rf_denoiser" if stochastic else "rectified_flow",
        max_frames=_MEDIUM.diffusion.max_frames,
        head_room_seconds=HEAD_ROOM_SECONDS,
        shift=LOGSNR,
        text_encoder=text,
        dit=dit,
        seconds_max=seconds_max,
    )
    if (dit, same) == (_MEDIUM.diffusion.dit, _MEDIUM.same):
        fallback = "medium" if stochastic else "medium-base"
    return ModelConfig(
        name=name or fallback, sample_rate=rate, audio_channels=audio_channels, same=same, diffusion=diffusion
    )


def _transformer(fields: Fields, channels: int, text_width: int) -> DiTConfig:
    width = fields.take("embed_dim", int, 1536)
    fields.constants(
        (
            ("io_channels", channels, 256),
            ("patch_size", 1, 1),
            ("num_heads", width // HEAD_SIZE, 24),
            ("cond_token_dim", text_width, 768),
            ("global_cond_dim", text_width, 768),
            ("local_add_cond_dim", channels + 1, 257),
            ("timestep_features_dim", TIMESTEP_FEATURES, 256),
        )
    )
    found = DiTConfig(
        width=width,
        depth=fields.take("depth", int, 24),
        memory_tokens=fields.take("num_memory_tokens", int, 64),
        differential=fields.take("use_differential_attention", bool, True),
        ff_mult=_whole(fields, "ff_mult", 4.0),
    )
    _done(fields)
    return found


def _whole(fields: Fields, name: str, default: float) -> int:
    value = fields.take(name, float, default)
    if not is_finite(value) or value != int(value):
        raise ConfigError(f"{fields.where}.{name}: got {value}, supported: whole numbers")
    return int(value)


def _autoencoder(fields: Fields) -> tuple[SAMEConfig, int, int]:
    """Return the sizes of SAME, the sample rate and the channels of audio."""
    fields.constants(
        (
            ("use_differential_attention", True, True),
            ("dim_heads", HEAD_SIZE, 64),
            ("sliding_window", 1, 1),
        )
    )
    blocks = fields.take("encoder_sinusoidal_blocks", list, [0])
    if not blocks or any(type(block) is not int or block for block in blocks):
        raise ConfigError(f"{fields.where}.encoder_sinusoidal_blocks: supported: [0]")
    depth = _one(fields, "encoder_transformer_depths", 6)
    sine = _one(fields, "decoder_sinusoidal_blocks", 0)
    same = SAMEConfig(
        patch_size=fields.take("patch_size", int, 256),
        stride=_one(fields, "encoder_strides", 16),
        latent_channels=fields.take("latent_dim", int, 256),
        width=fields.take("encoder_channels", int, 128) * _one(fields, "encoder_c_mults", 6),
        encoder_depth=depth,
        decoder_depth=depth,
        attention="sliding",
        span=1,
        decoder_kernel=1,
        sine_gate_layers=min(max(sine - 1, 0), depth),  # [B44]
        token_noise=_TOKEN_NOISE,
        ff_mult=fields.take("ff_mult", int, 3),
    )
    rate, channels = fields.take("sampling_rate", int, 44_100), fields.take("audio_channels", int, 2)
    _done(fields)
    return same, rate, channels


def _one(fields: Fields, name: str, default: int) -> int:
    """Take the entry of a list with one entry per resampling stage; all known models have one stage."""
    values = fields.take(name, list, [default])
    if len(values) != 1 or type(values[0]) is not int:
        raise ConfigError(f"{fields.where}.{name}: supported: a list of one whole number")
    return values[0]


def _duration(fields: Fields, width: int) -> float:
    fields.constants(
        (
            ("output_dim", width, 768),
            ("fourier_dim", TIMESTEP_FEATURES, 256),
            ("min_val", 0.0, 0.0),
            ("min_freq", 0.5, 0.5),
            ("max_freq", 10_000.0, 10_000.0),
        )
    )
    seconds: float = fields.take("max_val", float, 384.0)
    _done(fields)
    return seconds


def _scheduler(fields: Fields) -> bool:
    """Tell whether it draws new noise at every step, as the post-trained models want; most of its fields are idle when
    the pipeline hands it the noise levels."""
    fields.constant("_class_name", "FlowMatchEulerDiscreteScheduler")
    fields.constants((("shift", 1.0, 1.0), ("use_dynamic_shifting", False, False), ("shift_terminal", None, None)))
    for name in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"):
        if fields.optional(name, bool):
            raise ConfigError(f"{fields.where}.{name}: supported: false")
    stochastic: bool = fields.take("stochastic_sampling", bool, False)
    return stochastic


def _done(fields: Fields) -> None:
    fields.ignore("_class_name", "_diffusers_version", "_name_or_path")
    fields.done()
