"""Find the model to measure; where a known one is not installed, make a folder with random weights of its size.

Speed does not depend on the values, as long as no denormal or NaN is among them: matrices keep the size of their input.
Types are those of the released files: the text encoder bfloat16, the rest float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import numpy as np
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.common.files.atomic import write_text
from sa3_mlx.common.files.safetensors import TensorEntry, TensorFile, to_bf16_bits, write_tensors
from sa3_mlx.common.installed import home, installed
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, expected_tensors
from sa3_mlx.common.model.config import FORMAT, ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.quant.format import Quantization

# 24 words, each a token of the tokenizer made here; about the length of a usual prompt.
PROMPT = (
    "slow warm piano in a large hall with soft strings and distant rain at dusk then a bright bell "
    "and steady drum beneath it"
)
_POOL = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """Name what is measured, as results keep it."""

    name: str
    folder: Path
    weights: str  # "random", or the hash of the file
    recipe: str | None  # of a quantized model

    def weights_text(self) -> str:
        """Name the weights in a few words."""
        return "random weights" if self.weights == "random" else f"weights {self.weights[:19]}"


def find(name: str) -> tuple[MeasuredModel, ModelConfig]:
    """Find an installed model, a folder or a known name. Raises click.UsageError for an autoencoder alone."""
    if name in PRESETS and name not in installed() and not Path(name).is_dir():
        config = PRESETS[name]
        if config.diffusion is None:
            raise click.UsageError(f"{name} is an autoencoder alone; choose a model with a DiT")
        folder = home() / "benchmarks" / name
        click.echo(f"{name} is not installed: random weights in {folder}", err=True)
        folder = make_random_model(folder, config)
        return MeasuredModel(name=name, folder=folder, weights="random", recipe=None), config
    found = find_model(name, generates=True)
    with TensorFile.open(found.folder / WEIGHTS_FILE) as file:
        quantization = Quantization.read(file)
    recipe = None if quantization is None else quantization.recipe
    weights = fingerprint(found.folder, found.config)
    return MeasuredModel(name=found.config.name, folder=found.folder, weights=weights, recipe=recipe), found.config


def make_random_model(folder: Path, config: ModelConfig) -> Path:
    """Make a folder of format sa3/1, if it is not there yet, and return it."""
    if (folder / CONFIG_FILE).is_file() and ModelConfig.load(folder) == config:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    entries = [_entry(name, shape) for name, shape in expected_tensors(config).items()]
    write_tensors(folder / WEIGHTS_FILE, entries, {"format": FORMAT})
    if config.diffusion is not None:
        write_tokenizer(folder / TOKENIZER_FILE)
    write_text(folder / CONFIG_FILE, config.to_json())
    return folder


def write_tokenizer(path: Path) -> None:
    """Write a tokenizer that knows the words of ``PROMPT``: ids 2, 3, 4 and so on."""
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
