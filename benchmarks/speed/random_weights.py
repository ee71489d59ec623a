"""Folders with random weights of a preset, for speed where the released weights are not installed.

Speed does not depend on the values, as long as no denormal or NaN is among them: matrices keep the size of their input.
Types are those of the released files: the text encoder bfloat16, the rest float32.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from sa3_mlx.common.files.safetensors import TensorEntry, to_bf16_bits, write_tensors
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, expected_tensors
from sa3_mlx.common.model.config import FORMAT, ModelConfig

# 24 words, each a token of the tokenizer made here; about the length of a usual prompt.
PROMPT = (
    "slow warm piano in a large hall with soft strings and distant rain at dusk then a bright bell "
    "and steady drum beneath it"
)
_POOL = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)


def make_random_model(folder: Path, config: ModelConfig) -> Path:
    """A folder of format sa3/1, made if it is not there yet -> the folder."""
    if (folder / CONFIG_FILE).is_file() and ModelConfig.load(folder) == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_entry(name, shape) for name, shape in expected_tensors(config).items()]
    write_tensors(folder / WEIGHTS_FILE, entries, {"format": FORMAT})
    if config.diffusion is not None:
        write_tokenizer(folder / TOKENIZER_FILE)
    (folder / CONFIG_FILE).write_text(config.to_json(), encoding="utf-8")
    return folder


def write_tokenizer(path: Path) -> None:
    """One that knows the words of ``PROMPT``: ids 2, 3, 4 and so on."""
    words = {"<pad>": 0, "<unk>": 1, **{word: 2 + i for i, word in enumerate(dict.fromkeys(PROMPT.split()))}}
    tokenizer = tokenizers.Tokenizer(WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path))


def _entry(name: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(name, "BF16" if name.startswith("text_encoder.") else "F32", shape, partial(_load, name, shape))


def _load(name: str, shape: tuple[int, ...]) -> np.ndarray:
    scale = 0.02 if len(shape) == 1 else shape[-1] ** -0.5
    values = np.resize(_POOL * np.float32(scale), math.prod(shape)).reshape(shape)
    if name.endswith(("gamma", "alpha", "scale", "running_std")):
        values += 1
    return to_bf16_bits(values) if name.startswith("text_encoder.") else values
