"""A tiny checkpoint in our own format with random weights that are calm enough for every sampler."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from sa3_mlx.spec.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, expected_tensors
from sa3_mlx.spec.config import (
    FORMAT,
    DiffusionConfig,
    DiTConfig,
    ModelConfig,
    SAMEConfig,
    TextEncoderConfig,
)
from sa3_mlx.spec.presets import LOGSNR
from sa3_mlx.spec.tensorfile import array_entry, write_tensors

SMALL = ModelConfig(
    name="small-random", sample_rate=8000, audio_channels=2,
    same=SAMEConfig(
        patch_size=16, stride=4, latent_channels=8, width=64, encoder_depth=1, decoder_depth=2, attention="chunked",
        span=2, decoder_kernel=3, sine_gate_layers=0, token_noise=0.01,
    ),
    diffusion=DiffusionConfig(
        objective="rf_denoiser", max_frames=400, head_room_seconds=0.1, shift=LOGSNR,
        text_encoder=TextEncoderConfig(vocab_size=32, width=32, intermediate=48, depth=1, heads=1, max_length=8),
        dit=DiTConfig(width=64, depth=1, memory_tokens=2, differential=False),
    ),
)  # fmt: skip
AUTOENCODER = replace(SMALL, name="small-autoencoder", diffusion=None)
_ONES = ("gamma", "alpha", "scale", "running_std")
_WORDS = ["<pad>", "<unk>", "rain", "on", "a", "tin", "roof", "piano", "drum", "warm"]


def write_random(folder: Path, config: ModelConfig = SMALL, seed: int = 0) -> Path:
    """Write config.json, model.safetensors and tokenizer.json; -> the folder."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    entries = [array_entry(name, _array(name, shape, random)) for name, shape in expected_tensors(config).items()]
    write_tensors(folder / WEIGHTS_FILE, entries, {"format": FORMAT})
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    if config.diffusion is not None:
        vocabulary = {word: number for number, word in enumerate(_WORDS)}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
        tokenizer = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}
        (folder / TOKENIZER_FILE).write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def _array(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    values = random.standard_normal(shape, dtype=np.float32)
    if len(shape) == 2:
        return values / np.float32(math.sqrt(shape[1]))
    return np.float32(name.endswith(_ONES)) + np.float32(0.1) * values
