"""Small official checkpoints with random weights, for tests that need one without the golden folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
from sa3_convert import Report, convert
from sa3_convert.export_config import official_model_config
from sa3_convert.keys import AUTOENCODER_PREFIX, buffers, pairs
from sa3_convert.text_config import official_text_config

from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.model.checkpoint import parts_of
from sa3_mlx.common.model.config import (
    DiffusionConfig,
    DiTConfig,
    ModelConfig,
    SAMEConfig,
    ShiftConfig,
    TextEncoderConfig,
)
from sa3_mlx.common.model.features import ROTARY_FREQUENCIES

TINY = ModelConfig(
    name="tiny",
    sample_rate=8000,
    audio_channels=2,
    same=SAMEConfig(
        patch_size=16,
        stride=4,
        latent_channels=6,
        width=64,
        encoder_depth=1,
        decoder_depth=3,
        attention="chunked",
        span=2,
        decoder_kernel=3,
        sine_gate_layers=2,
        token_noise=0.01,
    ),
    diffusion=DiffusionConfig(
        objective="rf_denoiser",
        max_frames=320,
        head_room_seconds=6.0,
        shift=ShiftConfig(type="full", start=0.4, end=1.2, rate=1.0),
        text_encoder=TextEncoderConfig(vocab_size=20, width=24, intermediate=40, depth=2, heads=2, max_length=10),
        dit=DiTConfig(width=128, depth=2, memory_tokens=3, differential=True),
    ),
)
TINY_VARIED = replace(  # sizes that no released model has
    TINY,
    name="tiny-varied",
    same=replace(TINY.same, ff_mult=2),
    diffusion=replace(TINY.diffusion, dit=replace(TINY.diffusion.dit, ff_mult=3), seconds_max=47.5),
)
TINY_AUTOENCODER = ModelConfig(name="tiny-ae", sample_rate=8000, audio_channels=2, same=TINY.same, diffusion=None)

TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<pad>": 0, "<unk>": 3}, "unk_token": "<unk>"}}


def write_official(
    folder: Path, config: ModelConfig, *, dtype: str = "F32", parts: Collection[str] | None = None, seed: int = 0
) -> Path:
    """A folder as the releases have it: model_config.json, model.safetensors, sub folder of the text encoder."""
    parts = parts_of(config) if parts is None else parts
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    write_json(folder / "model_config.json", official_model_config(config))
    model = [part for part in parts if part != "text_encoder"]
    arrays = _arrays(config, model, random)
    arrays |= {
        name: np.array(ROTARY_FREQUENCIES) if np.prod(shape) else np.zeros(shape, np.float32)
        for name, shape in buffers(config, model).items()
    }
    if config.diffusion is None:
        arrays = {name.removeprefix(AUTOENCODER_PREFIX): array for name, array in arrays.items()}
    write_arrays(folder / "model.safetensors", arrays, dtype)
    if config.diffusion is not None:
        text = folder / "t5gemma-b-b-ul2"
        text.mkdir()
        write_json(text / "config.json", official_text_config(config.diffusion.text_encoder))
        write_json(text / "tokenizer.json", TOKENIZER)
        write_arrays(text / "model.safetensors", _arrays(config, ["text_encoder"], random), "BF16")
    return folder


def _arrays(config: ModelConfig, parts: Collection[str], random: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        name: random.standard_normal(shape, dtype=np.float32)
        for pair in pairs(config, parts)
        for name, shape in zip(pair.official, pair.official_shapes, strict=True)
    }


def write_arrays(path: Path, arrays: dict[str, np.ndarray], dtype: str) -> None:
    write_tensors(path, [array_entry(name, array, dtype) for name, array in arrays.items()], {"format": "pt"})


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Stored type and values of every tensor."""
    with TensorFile.open(path) as file:
        return {name: (file.info(name)[0], file.raw(name)) for name in file.names()}


def run(
    source: str | Path,
    out: Path,
    *,
    name: str | None = None,
    force: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> Report:
    """``convert`` with nothing but what a test is about."""
    return convert(source, out, name=name, force=force, progress=progress)
