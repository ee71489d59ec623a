"""Define how a weight file stores quantized layers and says which they are.

The metadata of ``model.safetensors`` has an entry "quantization": the recipe, the hash of the file it was made from and
the grid of every quantized layer. Such a layer has ``<path>.weight`` (uint32 words), ``<path>.scales`` and
``<path>.biases`` in place of its matrix. Files without the entry hold no quantized layer.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from sa3_mlx.common.files.objects import parse_object
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.checkpoint import CLAP_FILE, WEIGHTS_FILE, Shapes, check_tensors, expected_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import Config, quoted

from .affine import Packed, Storage, check_grid

METADATA_KEY = "quantization"
STORAGES = ("F16", "BF16")  # of scales and biases


@dataclass(frozen=True, kw_only=True)
class Grid(Config):
    """Say how many bits a code has, and how many values share a scale and a bias."""

    bits: int
    group: int

    @property
    def bits_per_weight(self) -> float:
        """Return the bits of a weight with its share of a scale and a bias of 16 bits each."""
        return self.bits + 32 / self.group


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer(Config):
    """Name one quantized linear map; ``path`` is the name of its matrix without ".weight"."""

    path: str
    grid: Grid


@dataclass(frozen=True, kw_only=True)
class Quantization(Config):
    """Hold the "quantization" entry of a weight file."""

    recipe: str
    source: str  # hash of the weights that were quantized
    layers: tuple[QuantizedLayer, ...]

    def grids(self) -> dict[str, Grid]:
        """Return the grid of every quantized layer, by path."""
        return {layer.path: layer.grid for layer in self.layers}

    def to_metadata(self) -> dict[str, str]:
        """Return the entry for the metadata of a weight file."""
        return {METADATA_KEY: json.dumps(self.to_dict(), separators=(",", ":"))}

    @classmethod
    def read(cls, file: TensorFile) -> Quantization | None:
        """Return the entry of a file, or None. Raises ConfigError for one that cannot be read."""
        if METADATA_KEY not in file.metadata:
            return None
        where = f"{file.path}: {METADATA_KEY}"
        return cls.from_dict(parse_object(file.metadata[METADATA_KEY], where), where=where)


def stored_tensors(shapes: Shapes, grids: Mapping[str, Grid]) -> Shapes:
    """Return names and shapes in a file: words, scales and biases in place of the matrices with a grid.

    Raises ValueError for a grid of something that is no matrix of the model, and for one that does not fit its rows.
    """
    stored = dict(shapes)
    for path, grid in grids.items():
        shape = shapes.get(f"{path}.weight", ())
        if len(shape) != 2:
            raise ValueError(f"quantization: the model has no linear map {quoted(path)}")
        check_grid(grid.bits, grid.group, shape[1])
        stored[f"{path}.weight"] = (shape[0], shape[1] * grid.bits // 32)
        stored[f"{path}.scales"] = stored[f"{path}.biases"] = (shape[0], shape[1] // grid.group)
    return stored


def check_file(file: TensorFile, config: ModelConfig, parts: Collection[str] | None = None) -> dict[str, Grid]:
    """Check a weight file, or some of its parts, strictly; return the grids of its quantized layers by path.

    Raises ValueError for tensors that do not fit the configuration.
    """
    quantization = Quantization.read(file)
    grids = {} if quantization is None else quantization.grids()
    found = file.shapes()
    if parts is not None:
        prefixes = tuple(f"{part}." for part in parts)
        grids = {path: grid for path, grid in grids.items() if path.startswith(prefixes)}
        found = {name: shape for name, shape in found.items() if name.startswith(prefixes)}
    try:
        stored = stored_tensors(expected_tensors(config, parts), grids)
    except ValueError as error:
        raise ValueError(f"{file.path}: {error}") from error
    check_tensors(stored, found, str(file.path))
    for path in grids:
        kinds = [file.info(f"{path}.{name}")[0] for name in ("weight", "scales", "biases")]
        if kinds[0] != "U32" or kinds[1] != kinds[2] or kinds[1] not in STORAGES:
            raise ValueError(f"{file.path}: {path} is stored as {', '.join(kinds)}, must be U32 and twice F16 or BF16")
    return grids


def check_folder(folder: Path, config: ModelConfig) -> None:
    """Check ``folder/model.safetensors``, and the latent CLAP of a model that has one.

    Raises FileNotFoundError for a missing file, ValueError for tensors that do not fit the configuration.
    """
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        check_file(file, config)
    if config.clap is not None:
        with TensorFile.open(folder / CLAP_FILE) as file:
            check_tensors(expected_tensors(config, ["clap"]), file.shapes(), str(file.path))


def read_packed(file: TensorFile, path: str, grid: Grid) -> Packed:
    """Read one quantized matrix of a checked file."""
    return Packed(
        bits=grid.bits,
        group=grid.group,
        storage=cast(Storage, file.info(f"{path}.scales")[0]),
        words=file.read(f"{path}.weight"),
        scales=file.read(f"{path}.scales"),
        biases=file.read(f"{path}.biases"),
    )
