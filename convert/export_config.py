"""Write a ModelConfig as the official ``model_config.json``: the inverse of ``parse_model_config``."""

from __future__ import annotations

from typing import Any

from sa3_mlx.common.model.config import (
    HEAD_SIZE,
    DiffusionConfig,
    ModelConfig,
    SAMEConfig,
    ShiftConfig,
)
from sa3_mlx.common.model.presets import REPOSITORIES

from .model_config import AUTOENCODER_TYPE, DIFFUSION_TYPE, OFFICIAL_FF_MULT_SAME, TEXT_SUBFOLDER

_SHIFT_FIELDS = {
    "logsnr": ("anchor_logsnr", "logsnr_end", "rate"),
    "full": ("base_shift", "max_shift", "use_sine"),
    "flux": ("alpha_min", "alpha_max"),
    "none": (),
}


def official_model_config(config: ModelConfig) -> dict[str, Any]:
    """Return the parsed file. Fields that the released files leave out are there where they differ from the default:
    ``sampling_distribution_shift_options`` [B22] and ``ff_mult`` of SAME.

    The head-room is not in it, as the official code has it as a constant, nor is the usual sampling (``write_beside``).
    """
    if config.diffusion is None:
        return _root(config, AUTOENCODER_TYPE, config.same.samples_per_latent, _autoencoder(config))
    model = {
        "pretransform": {"type": "autoencoder", "iterate_batch": True, "chunked": True, "config": _autoencoder(config)},
        "conditioning": _conditioning(config.name, config.diffusion),
        "diffusion": _diffusion(config.same, config.diffusion),
        "io_channels": config.same.latent_channels,
    }
    return _root(config, DIFFUSION_TYPE, config.diffusion.max_frames * config.same.samples_per_latent, model)


def _root(config: ModelConfig, model_type: str, sample_size: int, model: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "sample_size": sample_size,
        "sample_rate": config.sample_rate,
        "audio_channels": config.audio_channels,
        "model": model,
    }


def _autoencoder(config: ModelConfig) -> dict[str, Any]:
    same = config.same
    patch_width = same.patch_size * config.audio_channels
    return {
        "pretransform": {
            "type": "patched",
            "config": {"patch_size": same.patch_size, "channels": config.audio_channels},
        },
        "encoder": {
            "type": "same",
            "config": {
                "in_channels": patch_width,
                **_half(same, same.encoder_depth),
                "conv_mapping": False,
                "mask_noise": 0.0,
            },
        },
        "decoder": {
            "type": "same",
            "config": {
                "out_channels": patch_width,
                **_half(same, same.decoder_depth),
                "sinusoidal_blocks": [same.sine_gate_layers + 1 if same.sine_gate_layers else 0],  # [B44]
                "conv_mapping": same.decoder_kernel == 3,
                "mask_noise": same.token_noise,
            },
        },
        "bottleneck": {
            "type": "softnorm",
            "config": {
                "dim": same.latent_channels,
                "noise_augment_dim": 0,
                "noise_regularize": True,
                "auto_scale": True,
                "freeze": True,
            },
        },
        "latent_dim": same.latent_channels,
        "downsampling_ratio": same.samples_per_latent,
        "io_channels": config.audio_channels,
    }


def _half(same: SAMEConfig, depth: int) -> dict[str, Any]:
    attention: dict[str, Any] = {"chunk_size": same.span * same.stride, "chunk_midpoint_shift": True}
    if same.attention == "sliding":
        attention = {"sliding_window": [same.span, same.span]}
    multiple = {} if same.ff_mult == OFFICIAL_FF_MULT_SAME else {"ff_mult": same.ff_mult}
    return {
        "channels": same.width,
        "c_mults": [1],
        "strides": [same.stride],
        "latent_dim": same.latent_channels,
        "transformer_depths": [depth],
        "differential": True,
        "dim_heads": HEAD_SIZE,
        "variable_stride": True,
        "dyt": True,
        **multiple,
        **attention,
    }


def _conditioning(name: str, diffusion: DiffusionConfig) -> dict[str, Any]:
    place = {"model_path": TEXT_SUBFOLDER}
    if name in REPOSITORIES:
        place = {"repo_id": REPOSITORIES[name], "subfolder": TEXT_SUBFOLDER}
    prompt = {"max_length": diffusion.text_encoder.max_length, "padding_mode": "learned", **place}
    seconds = {"min_val": 0, "max_val": diffusion.seconds_max, "fourier_features_type": "expo"}
    return {
        "configs": [
            {"id": "prompt", "type": "t5gemma", "config": prompt},
            {"id": "seconds_total", "type": "number", "config": seconds},
        ],
        "cond_dim": diffusion.text_encoder.width,
    }


def _diffusion(same: SAMEConfig, diffusion: DiffusionConfig) -> dict[str, Any]:
    dit = diffusion.dit
    attention: dict[str, Any] = {"qk_norm": "rms"}
    if dit.differential:
        attention["differential"] = True
    return {
        "type": "dit",
        "cross_attention_cond_ids": ["prompt", "seconds_total"],
        "global_cond_ids": ["seconds_total"],
        "local_add_cond_ids": ["inpaint_mask", "inpaint_masked_input"],
        "diffusion_objective": diffusion.objective,
        "mask_padding_attention": True,
        "use_effective_length_for_schedule": True,
        **_shift(diffusion.shift),
        "config": {
            "io_channels": same.latent_channels,
            "embed_dim": dit.width,
            "depth": dit.depth,
            "num_heads": dit.heads,
            "cond_token_dim": diffusion.text_encoder.width,
            "global_cond_dim": diffusion.text_encoder.width,
            "local_add_cond_dim": same.latent_channels + 1,
            "transformer_type": "continuous_transformer",
            "global_cond_type": "adaLN",
            "timestep_features_type": "expo",
            "timestep_features_logsnr": False,
            "attn_kwargs": attention,
            "norm_type": "rms_norm",
            "norm_kwargs": {"force_fp32": True},
            "ff_kwargs": {"mult": float(dit.ff_mult)},
            "num_memory_tokens": dit.memory_tokens,
        },
    }


def _shift(shift: ShiftConfig) -> dict[str, Any]:
    if shift == ShiftConfig(type="logsnr", start=-6.2, end=2.0, rate=0.0):
        return {}
    values: tuple[float | bool, ...] = (shift.start, shift.end, shift.rate)
    if shift.type == "full":
        values = (shift.start, shift.end, shift.rate == 1.0)
    options = dict(zip(_SHIFT_FIELDS[shift.type], values, strict=False))
    return {"sampling_distribution_shift_options": {"type": shift.type, **options}}
