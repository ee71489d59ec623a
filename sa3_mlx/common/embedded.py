"""Bring out the models that come inside of the package: ``demo``, and ``demo-base``, from which it was made.

``assets/demo`` is a checkpoint folder like any other. ``assets/demo-base`` lacks what is the demo's byte for byte, the
autoencoder above all, and may be quantized, so that both fit into a package. At its first use it is unpacked to a plain
checkpoint in half precision, which can be adapted, merged, quantized and converted like any other.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import TensorEntry, TensorFile, write_tensors
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, check_tensors, expected_tensors
from sa3_mlx.common.model.config import FORMAT, ModelConfig
from sa3_mlx.common.quant.affine import dequantize
from sa3_mlx.common.quant.format import Grid, Quantization, check_file, read_packed, stored_tensors
from sa3_mlx.common.schema import Config, require

MADE_FILE = "made.json"
_FORMAT = "sa3-made/1"
_BESIDE = (TOKENIZER_FILE, "parents.json")


@dataclass(frozen=True, kw_only=True)
class ShippedStage(Config):
    """Name a training that a model went through, by the hashes of its settings, its log and its weights."""

    name: str  # of its folder
    settings: str
    log: str
    weights: str


@dataclass(frozen=True, kw_only=True)
class Shipped(Config):
    """Say how a model of the package was made; ``made.json`` beside it."""

    weights: str  # hash of model.safetensors, in demo-base of the unpacked one
    source: str  # hash of the weights that it was made of
    stages: tuple[ShippedStage, ...]

    def write(self, folder: Path) -> None:
        """Write the file. Raises OSError where the disk refuses."""
        write_json(folder / MADE_FILE, {"format": _FORMAT, **self.to_dict()})

    @classmethod
    def read(cls, folder: Path) -> Shipped | None:
        """Read the file of a folder, None where there is none. Raises ConfigError for a damaged one."""
        path = folder / MADE_FILE
        if not path.is_file():
            return None
        data = read_object(path)
        require(data.pop("format", None) == _FORMAT, f"{path}: its format is not {_FORMAT!r}")
        return cls.from_dict(data, where=str(path))


def pack(base: Path, demo: Path, out: Path) -> None:
    """Write the checkpoint ``base`` to ``out`` without what is the demo's byte for byte.

    Raises FileNotFoundError, ValueError for tensors that do not fit, OSError where the disk refuses.
    """
    config = ModelConfig.load(base)
    with TensorFile.open(base / WEIGHTS_FILE) as own, TensorFile.open(demo / WEIGHTS_FILE) as shared:
        grids = check_file(own, config)
        names = (name for group in _groups(config, grids) if not _alike(own, shared, group) for name in group)
        quantization = Quantization.read(own)
        metadata = {} if quantization is None else quantization.to_metadata()
        with new_folder(out) as folder:
            entries = [TensorEntry(name, *own.info(name), partial(own.raw, name)) for name in names]
            write_tensors(folder / WEIGHTS_FILE, entries, {"format": FORMAT, **metadata})
            shutil.copyfile(base / CONFIG_FILE, folder / CONFIG_FILE)
            for name in _BESIDE:
                if (base / name).is_file() and not _same_file(base / name, demo / name):
                    shutil.copyfile(base / name, folder / name)


def unpack(packed: Path, demo: Path, out: Path) -> str:
    """Write a whole checkpoint in half precision to ``out`` from what ``pack`` wrote; return the hash of its weights.

    Raises FileNotFoundError, ValueError for files that do not fit, OSError where the disk refuses.
    """
    config = ModelConfig.load(packed)
    with TensorFile.open(packed / WEIGHTS_FILE) as own, TensorFile.open(demo / WEIGHTS_FILE) as shared:
        quantization = Quantization.read(own)
        grids = {} if quantization is None else quantization.grids()
        shapes, stored = expected_tensors(config), stored_tensors(expected_tensors(config), grids)
        files = {name: file for file in (shared, own) for name in file.names() if name in stored}
        check_tensors(stored, {name: file.info(name)[1] for name, file in files.items()}, str(packed))
        with new_folder(out) as folder:
            entries = [TensorEntry(n, "F16", shape, partial(_half, files[n], n, grids)) for n, shape in shapes.items()]
            digest = write_tensors(folder / WEIGHTS_FILE, entries, {"format": FORMAT})
            shutil.copyfile(packed / CONFIG_FILE, folder / CONFIG_FILE)
            for name in _BESIDE:
                source = packed / name if (packed / name).is_file() else demo / name
                if source.is_file():
                    shutil.copyfile(source, folder / name)
    return digest


def _groups(config: ModelConfig, grids: Mapping[str, Grid]) -> Iterator[tuple[str, ...]]:
    """Yield names of tensors that are of no use without each other."""
    for name in expected_tensors(config):
        layer = name.removesuffix(".weight")
        yield tuple(f"{layer}.{kind}" for kind in ("weight", "scales", "biases")) if layer in grids else (name,)


def _alike(own: TensorFile, shared: TensorFile, names: tuple[str, ...]) -> bool:
    """Tell whether two files hold the same bytes under these names."""
    there = set(shared.names())
    return all(
        name in there and own.info(name) == shared.info(name) and np.array_equal(own.raw(name), shared.raw(name))
        for name in names
    )


def _same_file(path: Path, other: Path) -> bool:
    return other.is_file() and other.read_bytes() == path.read_bytes()


def _half(file: TensorFile, name: str, grids: Mapping[str, Grid]) -> NDArray[np.float16]:
    layer = name.removesuffix(".weight")
    values = dequantize(read_packed(file, layer, grids[layer]), "F16") if layer in grids else file.read(name)
    return values.astype(np.float16)
