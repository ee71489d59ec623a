"""Write a checkpoint folder with quantized layers, one tensor at a time, and the report that stays beside it."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.atomic import new_folder
from sa3_mlx.common.files.safetensors import STORAGE, TensorEntry, TensorFile, array_entry, file_hash, write_tensors
from sa3_mlx.common.model.checkpoint import CLAP_FILE, CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, parts_of
from sa3_mlx.common.model.config import FORMAT, ModelConfig
from sa3_mlx.common.origin import ORIGIN_FILE
from sa3_mlx.common.version import version

from .affine import Float, Packed, Storage, dequantize, quantize, round_to
from .format import Grid, Quantization, QuantizedLayer, check_file
from .recipes import layer_class

REPORT_FILE = "quantization.json"

Quantizer = Callable[[Float, Storage], Packed]  # weights (O, I) with values of the storage type -> packed


@dataclass(frozen=True, kw_only=True)
class PartReport:
    """Hold the sizes of one part, in bytes of its tensors."""

    bytes_before: int
    bytes_after: int
    parameters: int
    quantized_parameters: int


@dataclass(frozen=True, kw_only=True)
class ClassReport:
    """Describe the layers that do the same thing in every block."""

    layers: int
    parameters: int
    bits_per_weight: float  # mean, scales and biases included
    weight_error: float  # |Q(W) - W| / |W|


@dataclass(frozen=True, kw_only=True)
class VelocityReport:
    """Hold relative L2 errors of the DiT's velocity on runs that served no calibration, teacher-forced."""

    prompts: int
    error: float
    error_per_step: tuple[float, ...]
    nearest_error: float | None  # of rounding to nearest on the same grids; None where that is the method


@dataclass(frozen=True, kw_only=True)
class QuantizeReport:
    """Say what a quantization did; also stored as ``quantization.json`` in the new folder."""

    model: str
    recipe: str
    source: str  # hash
    hash: str
    version: str
    bits_per_weight: float  # of the quantized layers, scales and biases included
    parts: dict[str, PartReport]
    classes: dict[str, ClassReport]
    velocity: VelocityReport | None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def __str__(self) -> str:
        before, after = (sum(getattr(part, name) for part in self.parts.values()) for name in _SIZES)
        lines = [f"{self.model}: {self.recipe}, {self.bits_per_weight:.2f} bits per weight in the quantized layers"]
        lines += [f"  {'size':24} {before / 1e6:10.2f} -> {after / 1e6:.2f} MB"]
        for name, part in self.parts.items():
            share = part.quantized_parameters / part.parameters
            text = f"{part.bytes_before / 1e6:10.2f} -> {part.bytes_after / 1e6:.2f} MB, {share:.0%} quantized"
            lines.append(f"    {name:22} {text}")
        lines.append(f"  {'class':24} {'layers':>6} {'bits':>6} {'weight error':>13}")
        for name, row in self.classes.items():
            lines.append(f"    {name:22} {row.layers:6} {row.bits_per_weight:6.2f} {row.weight_error:13.4f}")
        if self.velocity is not None:
            lines.append(
                f"  velocity error {self.velocity.error:.4f} on {self.velocity.prompts} prompts not calibrated on"
            )
            if self.velocity.nearest_error is not None:
                lines.append(f"  rounding to nearest on the same grids {self.velocity.nearest_error:.4f}")
        return "\n".join([*lines, f"  hash {self.hash}"])


_SIZES = ("bytes_before", "bytes_after")


@dataclass
class _Layer:
    """Quantize one layer on its way into the file: words are asked for first, scales and biases later."""

    path: str
    grid: Grid
    quantizer: Quantizer
    file: TensorFile
    kept: dict[str, Float] = field(default_factory=dict)
    errors: tuple[float, float] = (0.0, 0.0)  # squared, of the error and of the weights

    def entries(self) -> list[TensorEntry]:
        dtype, (rows, inputs) = self.file.info(f"{self.path}.weight")
        storage = storage_of(dtype)
        words = (rows, inputs * self.grid.bits // 32)
        name, groups = self.path, (rows, inputs // self.grid.group)
        return [
            TensorEntry(f"{name}.weight", "U32", words, lambda: self._words(storage)),
            TensorEntry(f"{name}.scales", storage, groups, lambda: self._half("scales", storage)),
            TensorEntry(f"{name}.biases", storage, groups, lambda: self._half("biases", storage)),
        ]

    def _words(self, storage: Storage) -> NDArray[np.uint32]:
        weight = self.file.read(f"{self.path}.weight")
        packed = self.quantizer(weight, storage)
        self.kept = {"scales": packed.scales, "biases": packed.biases}
        difference = dequantize(packed, "F32") - weight
        self.errors = (float(np.square(difference).sum()), float(np.square(weight).sum()))
        return packed.words

    def _half(self, name: str, storage: Storage) -> np.ndarray:
        return array_entry(name, self.kept.pop(name), storage).load()


def storage_of(dtype: str) -> Storage:
    """Return the type of the scales, and of the weights just before they are quantized: BF16 for BF16, else F16."""
    return "BF16" if dtype == "BF16" else "F16"


def nearest(weight: Float, storage: Storage, *, grid: Grid) -> Packed:
    """Round a matrix to nearest, which needs no data."""
    return quantize(round_to(weight, storage), bits=grid.bits, group=grid.group, storage=storage)


def packed_before(_weight: Float, _storage: Storage, *, packed: Packed) -> Packed:
    """Return what a method packed before the file is written."""
    return packed


def check_target(out: Path, *, force: bool) -> None:
    """Raise ValueError for an ``out`` that is in the way: anything, and with ``force`` anything but a model."""
    if out.exists() and not (force and (out / CONFIG_FILE).is_file()):
        raise ValueError(f"{out}: exists already; give another folder, or --force to replace a model")


def check_source(source: Path) -> dict[str, Storage]:
    """Return the type of the scales that each layer will have, by path.

    Raises FileNotFoundError, and ValueError for tensors that do not fit and for a source that is quantized.
    """
    with TensorFile.open(source / WEIGHTS_FILE) as file:
        if check_file(file, ModelConfig.load(source)):
            raise ValueError(f"{source}: is quantized already; start from the model that it was made from")
        names = [name for name, shape in file.shapes().items() if name.endswith(".weight") and len(shape) == 2]
        return {name.removesuffix(".weight"): storage_of(file.info(name)[0]) for name in names}


def write_quantized(
    source: Path,
    out: Path,
    *,
    recipe: str,
    grids: Mapping[str, Grid],
    quantizers: Mapping[str, Quantizer],
    velocity: VelocityReport | None,
    force: bool,
) -> QuantizeReport:
    """Copy the checkpoint ``source`` to ``out`` with quantized layers.

    Everything else keeps its bytes, but for matrices beside quantized layers of the DiT and the text encoder, which are
    stored in half precision where they were in single. Nothing is left at ``out`` when this fails. Raises as
    ``check_source`` and ``check_target`` do.
    """
    config = ModelConfig.load(source)
    check_target(out, force=force)
    check_source(source)
    with TensorFile.open(source / WEIGHTS_FILE) as file, new_folder(out) as folder:
        digest = file_hash(source / WEIGHTS_FILE)
        layers = [_Layer(path, grid, quantizers[path], file) for path, grid in sorted(grids.items())]
        narrow = {path.split(".", 1)[0] for path in grids} - {"same"}
        entries = [entry for layer in layers for entry in layer.entries()]
        for name in file.names():
            if name.removesuffix(".weight") not in grids:
                entries.append(_kept(file, name, narrow=name.split(".", 1)[0] in narrow))
        rows = tuple(QuantizedLayer(path=path, grid=grid) for path, grid in sorted(grids.items()))
        entry = Quantization(recipe=recipe, source=digest, layers=rows)
        new = write_tensors(folder / WEIGHTS_FILE, entries, {"format": FORMAT, **entry.to_metadata()})
        for name in (CONFIG_FILE, TOKENIZER_FILE, CLAP_FILE, ORIGIN_FILE):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        report = QuantizeReport(
            model=config.name,
            recipe=recipe,
            source=digest,
            hash=new,
            version=version(),
            bits_per_weight=_mean_bits(layers),
            parts=_parts(config, file, entries, grids),
            classes=_classes(layers),
            velocity=velocity,
        )
        (folder / REPORT_FILE).write_text(report.to_json(), encoding="utf-8")
        with TensorFile.open(folder / WEIGHTS_FILE) as written:
            check_file(written, config)
    return report


def _kept(file: TensorFile, name: str, *, narrow: bool) -> TensorEntry:
    dtype, shape = file.info(name)
    matrix = len(shape) == 2 and name.endswith(".weight")
    stored = "F16" if dtype == "F32" and matrix and narrow else dtype
    if stored == dtype:
        return TensorEntry(name, dtype, shape, lambda: file.raw(name))
    return TensorEntry(name, stored, shape, lambda: file.read(name).astype(np.float16))


def _size(layer: _Layer) -> int:
    return math.prod(layer.file.info(f"{layer.path}.weight")[1])


def _mean_bits(layers: list[_Layer]) -> float:
    total = sum(map(_size, layers))
    return sum(layer.grid.bits_per_weight * _size(layer) for layer in layers) / max(1, total)


def _parts(
    config: ModelConfig, file: TensorFile, entries: list[TensorEntry], grids: Mapping[str, Grid]
) -> dict[str, PartReport]:
    shapes, found = file.shapes(), dict[str, PartReport]()
    for part in parts_of(config):
        names = [name for name in shapes if name.startswith(f"{part}.")]
        found[part] = PartReport(
            bytes_before=sum(math.prod(shapes[name]) * STORAGE[file.info(name)[0]].itemsize for name in names),
            bytes_after=sum(entry.nbytes for entry in entries if entry.name.startswith(f"{part}.")),
            parameters=sum(math.prod(shapes[name]) for name in names),
            quantized_parameters=sum(math.prod(shapes[n]) for n in names if n.removesuffix(".weight") in grids),
        )
    return found


def _classes(layers: list[_Layer]) -> dict[str, ClassReport]:
    groups: dict[str, list[_Layer]] = {}
    for layer in layers:
        groups.setdefault(layer_class(layer.path), []).append(layer)
    return {
        name: ClassReport(
            layers=len(rows),
            parameters=sum(map(_size, rows)),
            bits_per_weight=_mean_bits(rows),
            weight_error=math.sqrt(sum(r.errors[0] for r in rows) / max(1e-30, sum(r.errors[1] for r in rows))),
        )
        for name, rows in sorted(groups.items())
    }
