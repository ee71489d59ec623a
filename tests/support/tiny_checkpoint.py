"""Checkpoint folders made in a second, for tests that need no weight files: weights from their names, a tokenizer."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from sa3_mlx.common.files.safetensors import TensorEntry, write_tensors
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, expected_tensors
from sa3_mlx.common.model.config import FORMAT, ModelConfig

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


def write_checkpoint(folder: Path, config: ModelConfig, *, variant: str = "") -> Path:
    """A complete fp32 folder of format sa3/1; another ``variant`` has other weights (``weight`` makes those of "")."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    entries = [
        TensorEntry(name=name, dtype="F32", shape=shape, load=partial(weight, variant + name, shape))
        for name, shape in expected_tensors(config).items()
    ]
    write_tensors(folder / WEIGHTS_FILE, entries, {"format": FORMAT})
    if config.diffusion is not None:
        vocabulary = {"<pad>": 0, "<unk>": 1, **{word: 2 + i for i, word in enumerate(WORDS)}}
        tokenizer = tokenizers.Tokenizer(WordLevel(vocabulary, "<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(folder / TOKENIZER_FILE))
    return folder
