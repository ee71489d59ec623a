"""List every known model on one screen [A1]. A new size is one entry here."""

from __future__ import annotations

from dataclasses import replace

from .config import DiffusionConfig, DiTConfig, ModelConfig, SAMEConfig, ShiftConfig, TextEncoderConfig
from .sampling import Sampling

LOGSNR = ShiftConfig(type="logsnr", start=-6.2, end=2.0, rate=0.0)  # default of the released models [B22]

T5GEMMA = TextEncoderConfig(vocab_size=256_000, width=768, intermediate=2048, depth=12, heads=12, max_length=256)

SAME_S = SAMEConfig(
    patch_size=256,
    stride=16,
    latent_channels=256,
    width=768,
    encoder_depth=6,
    decoder_depth=6,
    attention="chunked",
    span=2,
    decoder_kernel=3,
    sine_gate_layers=0,
    token_noise=0.01,
)
SAME_L = SAMEConfig(
    patch_size=256,
    stride=16,
    latent_channels=256,
    width=1536,
    encoder_depth=12,
    decoder_depth=12,
    attention="sliding",
    span=1,
    decoder_kernel=1,
    sine_gate_layers=7,
    token_noise=0.01,
)
SAME_FIRST = SAMEConfig(
    patch_size=256,
    stride=4,
    latent_channels=64,
    width=128,
    encoder_depth=2,
    decoder_depth=3,
    attention="chunked",
    span=2,
    decoder_kernel=3,
    sine_gate_layers=0,
    token_noise=0.01,
)
SAME_FIRST_S = replace(SAME_FIRST, decoder_depth=2)  # for the latents of that one, by distillation
SAME_MUSIC = replace(  # docs/records/music.md 4
    SAME_FIRST, width=256, latent_channels=128, encoder_depth=3, decoder_depth=4
)

DIT_SMALL = DiTConfig(width=1024, depth=20, memory_tokens=64, differential=False)
DIT_MEDIUM = DiTConfig(width=1536, depth=24, memory_tokens=64, differential=True)
DIT_LARGE = DiTConfig(width=2048, depth=26, memory_tokens=64, differential=True)
DIT_FIRST = DiTConfig(width=192, depth=5, memory_tokens=8, differential=False)
DIT_MUSIC = DiTConfig(width=256, depth=6, memory_tokens=16, differential=False)


def _released(name: str, same: SAMEConfig, dit: DiTConfig, max_frames: int, *, base: bool) -> ModelConfig:
    return ModelConfig(
        name=name + ("-base" if base else ""),
        sample_rate=44_100,
        audio_channels=2,
        same=same,
        diffusion=DiffusionConfig(
            objective="rectified_flow" if base else "rf_denoiser",
            max_frames=max_frames,
            head_room_seconds=6.0,
            shift=LOGSNR,
            text_encoder=T5GEMMA,
            dit=dit,
        ),
    )


def _autoencoder(name: str, same: SAMEConfig) -> ModelConfig:
    return ModelConfig(name=name, sample_rate=44_100, audio_channels=2, same=same, diffusion=None)


_ALL = [
    _released("small-music", SAME_S, DIT_SMALL, 1292, base=False),
    _released("small-sfx", SAME_S, DIT_SMALL, 1292, base=False),
    _released("medium", SAME_L, DIT_MEDIUM, 4096, base=False),
    _released("large", SAME_L, DIT_LARGE, 4096, base=False),  # architecture only: no public weights
    _released("small-music", SAME_S, DIT_SMALL, 1300, base=True),
    _released("small-sfx", SAME_S, DIT_SMALL, 1300, base=True),
    _released("medium", SAME_L, DIT_MEDIUM, 4096, base=True),
    _released("large", SAME_L, DIT_LARGE, 4096, base=True),  # architecture only: no public weights
    _autoencoder("same-s", SAME_S),
    _autoencoder("same-l", SAME_L),
    _autoencoder("same-first-s", SAME_FIRST_S),
    ModelConfig(  # for the set "first": clips of 4.4 s
        name="first",
        sample_rate=44_100,
        audio_channels=2,
        same=SAME_FIRST,
        diffusion=DiffusionConfig(
            objective="rectified_flow",
            max_frames=192,
            head_room_seconds=0.5,
            shift=LOGSNR,
            text_encoder=TextEncoderConfig(
                vocab_size=72,
                width=48,
                intermediate=96,
                depth=1,
                heads=1,
                max_length=12,
            ),
            dit=DIT_FIRST,
        ),
        sampling=Sampling(sampler="euler", steps=8),  # docs/records/training.md: of its front, the least distance
    ),
    ModelConfig(  # for the set "music": clips of 12 s
        name="music",
        sample_rate=44_100,
        audio_channels=2,
        same=SAME_MUSIC,
        diffusion=DiffusionConfig(
            objective="rectified_flow",
            max_frames=544,
            head_room_seconds=0.5,
            shift=LOGSNR,
            text_encoder=TextEncoderConfig(
                vocab_size=320,
                width=96,
                intermediate=192,
                depth=2,
                heads=2,
                max_length=32,
            ),
            dit=DIT_MUSIC,
        ),
        sampling=Sampling(sampler="euler", steps=8),
    ),
]

PRESETS: dict[str, ModelConfig] = {config.name: config for config in _ALL}

# Hugging Face repositories of the released weights (gated: their licence must be accepted on the model page).
REPOSITORIES: dict[str, str] = {
    "small-music": "stabilityai/stable-audio-3-small-music",
    "small-music-base": "stabilityai/stable-audio-3-small-music-base",
    "small-sfx": "stabilityai/stable-audio-3-small-sfx",
    "small-sfx-base": "stabilityai/stable-audio-3-small-sfx-base",
    "medium": "stabilityai/stable-audio-3-medium",
    "medium-base": "stabilityai/stable-audio-3-medium-base",
    "same-s": "stabilityai/SAME-S",
    "same-l": "stabilityai/SAME-L",
}
