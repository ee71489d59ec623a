"""Checkpoint folders made in a second, for tests that need no weight files: weights from their names, a tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.safetensors import TensorEntry, array_entry, tensors_hash, write_tensors
from sa3_mlx.common.model.checkpoint import (
    CLAP_FILE,
    CONFIG_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    Shapes,
    expected_tensors,
)
from sa3_mlx.common.model.clap import CLAP_FORMAT
from sa3_mlx.common.model.config import FORMAT, ModelConfig
from tests.support.tiny import with_clap

WORDS = ("kick", "snare", "hat", "bell", "rain", "drone", "low", "high", "soft", "hard")
_ONES = (".gamma", ".alpha", ".scale")  # multiply: mean 1, scale 0.1


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 standard normals that depend on the name alone."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Matrices with variance 1 / fan in, gains around 1, the rest small; no parameter is trivial."""
    if name.endswith("running_std"):
        return np.full(shape, 1.3, np.float32)
    if name.endswith(_ONES):
        return np.float32(1) + np.float32(0.1) * normal(name, shape)
    scale = shape[-1] ** -0.5 if len(shape) == 2 and "memory_tokens" not in name else 0.1
    return np.float32(scale) * normal(name, shape)


def _entries(shapes: Shapes, variant: str) -> list[TensorEntry]:
    return [
        TensorEntry(name=name, dtype="F32", shape=shape, load=partial(weight, variant + name, shape))
        for name, shape in shapes.items()
    ]


def write_trained_clap(folder: Path, model: Path) -> Path:
    """A folder as 'sa3 train clap' exports it, of a CLAP that belongs to the model."""
    config = with_clap(ModelConfig.load(model))
    assert config.clap is not None
    path = model / WEIGHTS_FILE
    hashes = {role: tensors_hash(path, f"{part}.") for role, part in (("autoencoder", "same"), ("text_encoder",) * 2)}
    about = replace(config.clap, **hashes)
    folder.mkdir()
    write_json(folder / CONFIG_FILE, {"format": CLAP_FORMAT, **about.to_dict()})
    (folder / TOKENIZER_FILE).write_bytes((model / TOKENIZER_FILE).read_bytes())
    shapes = expected_tensors(config, ["clap", "text_encoder"])
    arrays = {name.removeprefix("clap."): weight(name, shape) for name, shape in shapes.items()}
    arrays["log_scale"] = np.ones(1, np.float32)
    write_tensors(folder / WEIGHTS_FILE, [array_entry(*pair) for pair in arrays.items()], {"format": CLAP_FORMAT})
    return folder


def write_checkpoint(folder: Path, config: ModelConfig, *, variant: str = "") -> Path:
    """A complete fp32 folder of format sa3/1; another ``variant`` has other weights (``weight`` makes those of "")."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    write_tensors(folder / WEIGHTS_FILE, _entries(expected_tensors(config), variant), {"format": FORMAT})
    if config.clap is not None:
        write_tensors(folder / CLAP_FILE, _entries(expected_tensors(config, ["clap"]), variant), {"format": FORMAT})
    if config.diffusion is not None:
        vocabulary = {"<pad>": 0, "<unk>": 1, **{word: 2 + i for i, word in enumerate(WORDS)}}
        tokenizer = tokenizers.Tokenizer(WordLevel(vocabulary, "<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(folder / TOKENIZER_FILE))
    return folder
