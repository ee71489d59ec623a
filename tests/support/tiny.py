"""Configurations of the tiny reference models, as in the golden folders ``tiny-s`` and ``tiny-l``."""

from __future__ import annotations

from dataclasses import replace

from sa3_mlx.common.model.config import (
    DiffusionConfig,
    DiTConfig,
    LatentClapConfig,
    ModelConfig,
    SAMEConfig,
    TextEncoderConfig,
    TowerConfig,
)
from sa3_mlx.common.model.presets import LOGSNR

SAME_TINY_S = SAMEConfig(
    patch_size=32,
    stride=16,
    latent_channels=16,
    width=128,
    encoder_depth=3,
    decoder_depth=3,
    attention="chunked",
    span=2,
    decoder_kernel=3,
    sine_gate_layers=0,
    token_noise=0.01,
)
SAME_TINY_L = SAMEConfig(
    patch_size=32,
    stride=16,
    latent_channels=16,
    width=128,
    encoder_depth=4,
    decoder_depth=4,
    attention="sliding",
    span=1,
    decoder_kernel=1,
    sine_gate_layers=2,
    token_noise=0.01,
)


def _tiny(name: str, same: SAMEConfig) -> ModelConfig:
    return ModelConfig(
        name=name,
        sample_rate=8000,
        audio_channels=2,
        same=same,
        diffusion=DiffusionConfig(
            objective="rf_denoiser",
            max_frames=1024,
            head_room_seconds=6.0,
            shift=LOGSNR,
            text_encoder=TextEncoderConfig(
                vocab_size=128,
                width=48,
                intermediate=96,
                depth=3,
                heads=3,
                max_length=12,
            ),
            dit=DiTConfig(width=128, depth=2, memory_tokens=8, differential=same.attention == "sliding"),
        ),
    )


def with_clap(config: ModelConfig) -> ModelConfig:
    """The same model with a small latent CLAP, which sees 24 frames at once."""
    about = LatentClapConfig(
        tower=TowerConfig(width=128, depth=2, frames_per_token=3, embedding=16),
        latent_channels=config.same.latent_channels,
        text=config.require_diffusion().text_encoder,
        autoencoder="sha256:a",
        text_encoder="sha256:b",
        max_frames=24,
    )
    return replace(config, clap=about)


TINY = {"tiny-s": _tiny("tiny-s", SAME_TINY_S), "tiny-l": _tiny("tiny-l", SAME_TINY_L)}
