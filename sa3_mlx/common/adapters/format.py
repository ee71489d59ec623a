"""Adapters: small trained changes of the linear maps of the DiT and the conditioner [T8].

Every type makes of a weight W the weight ``rows * (W + s g B A) * cols`` with s the strength, g = alpha / rank, and row
and column factors that bring the norms of the sum to trained magnitudes (types without a norm have none). In the -xs
types B A = U M V^T with frozen singular vectors U, V of W. ``sa3_mlx/lora.py`` and its twin compute it.

A file is one safetensors file: tensors ``<layer>.<kind>`` in fp32, such as "dit.layers.0.ff.proj_in.lora_A", and an
entry "adapter" in its metadata. The official layout is read and written in ``convert/adapters.py``.

Shapes: O outputs, I inputs of a layer, r rank.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.safetensors import TensorFile, all_finite, array_entry, write_tensors
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE, Shapes, expected_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.quant.format import Quantization
from sa3_mlx.common.schema import Config, ConfigError

ADAPTER_FORMAT = "sa3-adapter/1"
ADAPTER_FILE = "adapter.safetensors"
METADATA_KEY = "adapter"
ADAPTED_PARTS = ("conditioner", "dit")
AdapterType = Literal["lora", "dora-rows", "dora-cols", "bora", "lora-xs", "dora-rows-xs", "dora-cols-xs", "bora-xs"]
ADAPTER_TYPES: tuple[AdapterType, ...] = get_args(AdapterType)
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_MAX_EXPANDED = 10_000  # names that one pattern may stand for
_RANGE = re.compile(r"\[(\d+)-(\d+)\]")

Float = NDArray[np.float32]
Tensors = Mapping[str, Float]  # kind -> values, of one layer


def expand(pattern: str) -> list[str]:
    """ "layers.[0-2]." -> the three texts it stands for. Raises ConfigError for an empty and for a huge pattern."""
    if not pattern.strip():
        raise ConfigError(
            "a pattern is empty: expected a part of a layer's name, such as 'self_attn' or 'layers.[0-5].'"
        )
    pieces = _RANGE.split(pattern.strip())
    ranges = [sorted((int(a), int(b))) for a, b in zip(pieces[1::3], pieces[2::3], strict=True)]
    if math.prod(b - a + 1 for a, b in ranges) > _MAX_EXPANDED:
        raise ConfigError(f"pattern {pattern!r} stands for more than {_MAX_EXPANDED} names")
    texts = pieces[0::3]
    numbers = itertools.product(*(range(a, b + 1) for a, b in ranges))
    return ["".join(f"{text}{n}" for text, n in zip(texts, chosen, strict=False)) + texts[-1] for chosen in numbers]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether the name holds one of the patterns, ranges expanded."""
    return any(text in name for pattern in patterns for text in expand(pattern))


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Config):
    """What is adapted and how. Patterns are parts of layer names such as "dit.layers.3.ff.proj_in", with ranges [i-j];
    no ``include`` means all layers of DiT and conditioner."""

    type: AdapterType
    rank: int
    alpha: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank is {self.rank}: allowed is at least 1")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha is {self.alpha:g}: allowed is above 0; the usual one is the rank, {self.rank}")
        for pattern in (*self.include, *self.exclude):
            expand(pattern)

    @property
    def scale(self) -> float:
        """g = alpha / rank."""
        return self.alpha / self.rank

    @property
    def frozen_bases(self) -> bool:
        """An -xs type: a trained core between frozen singular vectors."""
        return self.type.endswith("-xs")

    @property
    def norms(self) -> tuple[str, ...]:
        """Magnitudes in the order in which they are applied: of "rows" (O,), of "cols" (I,)."""
        kind = self.type.removesuffix("-xs")
        return {"lora": (), "dora-rows": ("rows",), "dora-cols": ("cols",), "bora": ("rows", "cols")}[kind]

    @property
    def magnitudes(self) -> dict[str, str]:
        """Names of their tensors: {"rows": "magnitude"}, {"rows": "magnitude_r", "cols": "magnitude_c"}, ..."""
        names = {"rows": "magnitude_r", "cols": "magnitude_c"}
        return {norm: names[norm] if len(self.norms) == 2 else "magnitude" for norm in self.norms}

    def selects(self, layer: str) -> bool:
        return (not self.include or matches(layer, self.include)) and not matches(layer, self.exclude)

    def shapes(self, layer: tuple[int, ...]) -> Shapes:
        """Kind and shape of the tensors of a layer (O, I); U and V may be missing in a file."""
        outputs, inputs = layer
        rank, sizes = self.rank, {"rows": outputs, "cols": inputs}
        shapes: Shapes = {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}
        if self.frozen_bases:
            shapes = {"M_xs": (rank, rank), "U": (outputs, rank), "V": (inputs, rank)}
        return shapes | {name: (sizes[norm],) for norm, name in self.magnitudes.items()}


def adaptable_layers(config: ModelConfig) -> Shapes:
    """Name and shape (O, I) of every linear map of the conditioner and the DiT."""
    shapes = expected_tensors(config, ADAPTED_PARTS)
    return {name.removesuffix(".weight"): s for name, s in shapes.items() if name.endswith(".weight") and len(s) == 2}


def selected_layers(adapter: AdapterConfig, config: ModelConfig) -> Shapes:
    """Those that are adapted. Raises ValueError when there are none, and for a rank that a layer cannot have."""
    layers = adaptable_layers(config)
    chosen = {name: shape for name, shape in layers.items() if adapter.selects(name)}
    if not chosen:
        raise ValueError(
            f"include {list(adapter.include)} and exclude {list(adapter.exclude)} leave none of the {len(layers)} "
            f"layers of {config.name}, such as {next(iter(layers))}"
        )
    small = [name for name, shape in chosen.items() if adapter.frozen_bases and min(shape) < adapter.rank]
    if small:
        raise ValueError(
            f"rank is {adapter.rank}: {small[0]} has {min(chosen[small[0]])} singular vectors; take a lower rank, or "
            "exclude this layer"
        )
    return chosen


@dataclass(frozen=True, kw_only=True)
class AdapterInfo(Config):
    """The "adapter" entry of a file."""

    adapter: AdapterConfig
    base: str  # name of the model it was trained on
    base_hash: str | None
    step: int | None
    licence: str | None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A file in memory: tensors (fp32) by layer and kind."""

    info: AdapterInfo
    layers: Mapping[str, Tensors]

    @property
    def config(self) -> AdapterConfig:
        return self.info.adapter

    @property
    def bytes(self) -> int:
        return sum(values.nbytes for tensors in self.layers.values() for values in tensors.values())

    def low_rank(self, layer: str) -> tuple[Float, Float]:
        """A (r, I) and B (O, r) of a layer, g in B. Bases of an -xs type must be known (``with_bases``)."""
        tensors, scale = self.layers[layer], np.float32(self.config.scale)
        if self.config.frozen_bases:
            return np.ascontiguousarray(tensors["V"].T), scale * (tensors["U"] @ tensors["M_xs"])
        return tensors["lora_A"], scale * tensors["lora_B"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Applied:
    """An adapter in use: how strongly, and at which times t (1 noise, 0 data) of sampling, both ends included.

    The interval is that of the DiT: the conditioner runs before sampling, with every adapter on.
    """

    adapter: Adapter
    strength: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not math.isfinite(self.strength):
            raise ValueError(f"adapter strength is {self.strength}: allowed is a number, 1 as trained, 0 off")
        if not 0 <= low <= high <= 1:
            raise ValueError(
                f"adapter interval is {low:g}-{high:g}: allowed are times FROM-TO with 0 <= FROM <= TO <= 1"
            )

    @property
    def always(self) -> bool:
        return self.interval == (0.0, 1.0)

    def on(self, t: float) -> bool:
        return self.interval[0] <= t <= self.interval[1]


def check_adapter(adapter: Adapter, config: ModelConfig) -> int:
    """Number of layers it changes. Raises ValueError where it does not fit a model: unknown layers, other shapes."""
    layers = adaptable_layers(config)
    fitting, wrong = 0, []
    for name, tensors in adapter.layers.items():
        if name not in layers:
            wrong.append(f"the model has no layer {name}")
            continue
        expected = adapter.config.shapes(layers[name])
        if adapter.config.frozen_bases and "U" not in tensors and "V" not in tensors:
            expected = {kind: shape for kind, shape in expected.items() if kind not in ("U", "V")}
        found = {kind: values.shape for kind, values in tensors.items()}
        if found == expected:
            fitting += 1
        else:
            wrong.append(f"{name} has {_words(found)}, {adapter.config.type} of it needs {_words(expected)}")
    if wrong or not fitting:
        reason = wrong[0] if wrong else "it is empty"
        raise ValueError(
            f"adapter for {adapter.info.base}: {fitting} of its {len(adapter.layers)} layers fit {config.name} "
            f"({reason}); use the model that it was trained on, or one of its size"
        )
    return fitting


def _words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{kind} {shape}" for kind, shape in sorted(shapes.items()))


# --- files ------------------------------------------------------------------------------------------------------------


def open_adapter_file(path: Path) -> TensorFile:
    """Raises FileNotFoundError, and ValueError for a file that is not safetensors; pickles are never opened."""
    if path.suffix.lower() in PICKLES:
        raise ValueError(f"{path}: only .safetensors files can be read (pickled adapters can run code)")
    return TensorFile.open(path)


def read_finite(file: TensorFile, name: str) -> Float:
    """One tensor as fp32. Raises ValueError for one that is no float, or not finite."""
    dtype, _ = file.info(name)
    if dtype not in ("F32", "F16", "BF16"):
        raise ValueError(f"{file.path}: tensor {name} has dtype {dtype}; supported: F32, F16, BF16")
    values = file.read(name)
    if not all_finite(values, "F32"):
        raise ValueError(f"{file.path}: tensor {name} has NaN or infinite values")
    return values


def write_adapter(path: Path, adapter: Adapter) -> str:
    """Write a file; returns its hash."""
    entries = [
        array_entry(f"{layer}.{kind}", values, "F32")
        for layer, tensors in adapter.layers.items()
        for kind, values in tensors.items()
    ]
    metadata = json.dumps(adapter.info.to_dict(), separators=(",", ":"))
    return write_tensors(path, entries, {"format": ADAPTER_FORMAT, METADATA_KEY: metadata})


def read_adapter(path: str | Path) -> Adapter:
    """Raises FileNotFoundError, and ValueError for a file that is no adapter of this format."""
    path = Path(path)
    with open_adapter_file(path) as file:
        if file.metadata.get("format") != ADAPTER_FORMAT:
            raise ValueError(
                f"{path}: format is {file.metadata.get('format')!r}, expected {ADAPTER_FORMAT!r}; 'sa3 lora convert' "
                "reads the official layout"
            )
        try:
            data = json.loads(file.metadata[METADATA_KEY])
        except (KeyError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: its adapter entry is missing or not valid JSON ({error})") from error
        info = AdapterInfo.from_dict(data, where=f"{path}: {METADATA_KEY}")
        layers: dict[str, dict[str, Float]] = {}
        for name in file.names():
            layer, _, kind = name.rpartition(".")
            layers.setdefault(layer, {})[kind] = read_finite(file, name)
    if not layers:
        raise ValueError(f"{path}: holds no tensor")
    return Adapter(info=info, layers=layers)


# --- singular vectors of the -xs types --------------------------------------------------------------------------------


def singular_bases(weight: NDArray[np.floating], rank: int) -> tuple[Float, Float]:
    """(O, I) -> U (O, r), V (I, r), the top singular vectors; the largest entry of each column of U is positive."""
    u, _, vt = np.linalg.svd(weight.astype(np.float32), full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    signs[signs == 0] = 1
    return np.ascontiguousarray((u * signs)[:, :rank]), np.ascontiguousarray((vt * signs[:, None])[:rank].T)


def with_bases(adapter: Adapter, folder: Path) -> Adapter:
    """The adapter with the singular vectors that its file left out, from the weights of the model in ``folder``.

    Raises ValueError for a quantized model, whose singular vectors are others.
    """
    missing = [name for name, tensors in adapter.layers.items() if "U" not in tensors]
    if not adapter.config.frozen_bases or not missing:
        return adapter
    layers = dict(adapter.layers)
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        quantization = Quantization.read(file)
        if quantization is not None and set(quantization.grids()) & set(missing):
            raise ValueError(
                f"adapter of type {adapter.config.type}: needs singular vectors of the weights that {folder} was "
                "quantized from; 'sa3 lora convert ADAPTER OUT --model UNQUANTIZED' writes them into it"
            )
        for name in missing:
            u, v = singular_bases(file.read(f"{name}.weight"), adapter.config.rank)
            layers[name] = {**layers[name], "U": u, "V": v}
    return replace(adapter, layers=layers)


def prepare_adapters(
    adapters: Collection[Applied], folder: Path, config: ModelConfig, *, merged: bool
) -> tuple[Applied, ...]:
    """As a model uses them: checked, with their bases, those of strength 0 left out.

    Raises ValueError for one that does not fit, and for one to be ``merged`` that is not always on.
    """
    part_time = [applied for applied in adapters if not applied.always]
    if merged and part_time:
        low, high = part_time[0].interval
        raise ValueError(
            f"adapter interval is {low:g}-{high:g}: a merged adapter is on at all times; leave one of the two"
        )

    def prepared() -> Iterator[Applied]:
        for applied in adapters:
            check_adapter(applied.adapter, config)
            if applied.strength != 0:
                yield replace(applied, adapter=with_bases(applied.adapter, folder))

    return tuple(prepared())
