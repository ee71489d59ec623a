"""Checkpoint folders with random weights and a tokenizer, made in a second, for tests that need no reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from sa3_mlx.spec.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, expected_tensors
from sa3_mlx.spec.config import FORMAT, ModelConfig
from sa3_mlx.spec.tensorfile import array_entry, write_tensors

WORDS = ("kick", "snare", "hat", "bell", "rain", "drone", "low", "high", "soft", "hard")


def write_checkpoint(folder: Path, config: ModelConfig, *, seed: int = 0) -> Path:
    """A folder of format sa3/1 whose every parameter matters; the audio is noise of about full scale."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    arrays = {name: _values(name, shape, rng) for name, shape in sorted(expected_tensors(config).items())}
    write_tensors(folder / WEIGHTS_FILE, [array_entry(name, a) for name, a in arrays.items()], {"format": FORMAT})
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    if config.diffusion is not None:
        vocabulary = {"<pad>": 0, "<unk>": 1, **{word: 2 + i for i, word in enumerate(WORDS)}}
        tokenizer = tokenizers.Tokenizer(WordLevel(vocabulary, "<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        tokenizer.save(str(folder / TOKENIZER_FILE))
    return folder


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Around 1 for gains, small for biases, and such that a layer keeps the size of its input for matrices."""
    normal = rng.standard_normal(shape).astype(np.float32)
    if name.endswith(("gamma", "alpha", "scale", "running_std")):
        return 1 + 0.1 * normal
    if len(shape) == 1:
        return 0.2 * normal
    return normal / np.float32(shape[-1] ** 0.5)
