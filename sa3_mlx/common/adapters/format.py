"""Read and write adapter files: safetensors with tensors in fp32 and an entry "adapter" in the metadata [T8].

Tensors are called ``<layer>.<kind>``, such as "dit.layers.0.ff.proj_in.lora_A". The official layout is read and written
in ``convert/adapters.py``.

Shapes: O outputs, I inputs of a layer, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.objects import parse_object
from sa3_mlx.common.files.safetensors import TensorFile, all_finite, array_entry, write_tensors
from sa3_mlx.common.schema import Config, listed, quoted

from .config import AdapterConfig

ADAPTER_FORMAT = "sa3-adapter/1"
ADAPTER_FILE = "adapter.safetensors"
METADATA_KEY = "adapter"
PEFT_FILE = "adapter_model.safetensors"  # in a folder of the PEFT library
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

Float = NDArray[np.float32]
LayerTensors = Mapping[str, Float]  # kind -> values, of one layer


@dataclass(frozen=True, kw_only=True)
class AdapterInfo(Config):
    """Describe an adapter: the "adapter" entry of a file."""

    adapter: AdapterConfig
    base: str  # name of the model it was trained on
    base_hash: str | None
    step: int | None
    licence: str | None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Hold a file in memory: tensors (fp32) by layer and kind."""

    info: AdapterInfo
    layers: Mapping[str, LayerTensors]

    @property
    def config(self) -> AdapterConfig:
        """Return what is adapted and how."""
        return self.info.adapter

    @property
    def bytes(self) -> int:
        """Count the bytes of all tensors."""
        return sum(values.nbytes for tensors in self.layers.values() for values in tensors.values())

    def low_rank(self, layer: str) -> tuple[Float, Float]:
        """Return A (r, I) and B (O, r) of a layer, g in B. Bases of an -xs type must be known: see ``with_bases``."""
        tensors, scale = self.layers[layer], np.float32(self.config.scale)
        if self.config.frozen_bases:
            return np.ascontiguousarray(tensors["V"].T), scale * (tensors["U"] @ tensors["M_xs"])
        return tensors["lora_A"], scale * tensors["lora_B"]


def open_adapter_file(path: Path) -> TensorFile:
    """Open a file. Raises FileNotFoundError, and ValueError for anything but safetensors; pickles are never opened."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(f"{path}: only .safetensors files can be read (pickled adapters can run code)")
    return TensorFile.open(path)


def read_finite(file: TensorFile, name: str) -> Float:
    """Read one tensor as fp32. Raises ValueError for one that is no float, or not finite."""
    dtype, _ = file.info(name)
    if dtype not in ("F32", "F16", "BF16"):
        raise ValueError(f"{file.path}: tensor {listed([name])} has dtype {dtype}; supported: F32, F16, BF16")
    values = file.read(name)
    if not all_finite(values, "F32"):
        raise ValueError(f"{file.path}: tensor {listed([name])} has NaN or infinite values")
    return values


def write_adapter(path: Path, adapter: Adapter) -> str:
    """Write a file and return its hash."""
    entries = [
        array_entry(f"{layer}.{kind}", values, "F32")
        for layer, tensors in adapter.layers.items()
        for kind, values in tensors.items()
    ]
    metadata = json.dumps(adapter.info.to_dict(), separators=(",", ":"))
    return write_tensors(path, entries, {"format": ADAPTER_FORMAT, METADATA_KEY: metadata})


def read_adapter(path: str | Path) -> Adapter:
    """Read a file. Raises FileNotFoundError, and ValueError for a file that is no adapter of this format."""
    path = Path(path)
    with open_adapter_file(path) as file:
        if file.metadata.get("format") != ADAPTER_FORMAT:
            raise ValueError(
                f"{path}: format is {quoted(file.metadata.get('format'))}, expected {ADAPTER_FORMAT!r}; "
                "'sa3 lora convert' reads the official layout"
            )
        where = f"{path}: {METADATA_KEY}"
        info = AdapterInfo.from_dict(parse_object(file.metadata.get(METADATA_KEY, ""), where), where=where)
        layers: dict[str, dict[str, Float]] = {}
        for name in file.names():
            layer, _, kind = name.rpartition(".")
            layers.setdefault(layer, {})[kind] = read_finite(file, name)
    if not layers:
        raise ValueError(f"{path}: holds no tensor")
    return Adapter(info=info, layers=layers)
