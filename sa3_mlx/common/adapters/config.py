"""Describe adapters, small trained changes of the linear maps of the DiT and the conditioner, and choose layers [T8].

Every type makes of a weight W the weight ``rows * (W + s g B A) * cols`` with s the strength, g = alpha / rank, and row
and column factors that bring the norms of the sum to trained magnitudes (types without a norm have none). In the -xs
types B A = U M V^T with frozen singular vectors U, V of W. ``sa3_mlx/lora.py`` and its twin compute it.

Shapes: O outputs, I inputs of a layer, r rank.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sa3_mlx.common.model.checkpoint import Shapes, expected_tensors
from sa3_mlx.common.model.config import WIDTH_MAX, ModelConfig
from sa3_mlx.common.schema import Config, ConfigError, quoted

ADAPTED_PARTS = ("conditioner", "dit")
AdapterType = Literal["lora", "dora-rows", "dora-cols", "bora", "lora-xs", "dora-rows-xs", "dora-cols-xs", "bora-xs"]
ADAPTER_TYPES: tuple[AdapterType, ...] = get_args(AdapterType)
_MAX_EXPANDED = 10_000  # names that one pattern may stand for
_RANGE = re.compile(r"\[(\d+)-(\d+)\]")
_MAX_LETTERS = 1000  # of a pattern


def expand(pattern: str) -> list[str]:
    """Return the texts that a pattern stands for: three for "layers.[0-2].".

    Raises ConfigError for an empty and for a huge pattern.
    """
    if not pattern.strip():
        raise ConfigError(
            "a pattern is empty: expected a part of a layer's name, such as 'self_attn' or 'layers.[0-5].'"
        )
    if len(pattern) > _MAX_LETTERS:
        raise ConfigError(f"pattern {quoted(pattern)} is longer than {_MAX_LETTERS} characters")
    pieces = _RANGE.split(pattern.strip())
    ranges = [sorted((int(a), int(b))) for a, b in zip(pieces[1::3], pieces[2::3], strict=True)]
    if math.prod(b - a + 1 for a, b in ranges) > _MAX_EXPANDED:
        raise ConfigError(f"pattern {quoted(pattern)} stands for more than {_MAX_EXPANDED} names")
    texts = pieces[0::3]
    numbers = itertools.product(*(range(a, b + 1) for a, b in ranges))
    return ["".join(f"{text}{n}" for text, n in zip(texts, chosen, strict=False)) + texts[-1] for chosen in numbers]


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether the name holds one of the patterns, ranges expanded."""
    return any(text in name for pattern in patterns for text in expand(pattern))


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Config):
    """Say what is adapted and how.

    Patterns are parts of layer names such as "dit.layers.3.ff.proj_in", with ranges [i-j]; no ``include`` means all
    layers of DiT and conditioner.
    """

    type: AdapterType
    rank: int
    alpha: float
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= WIDTH_MAX:
            raise ConfigError(f"rank is {quoted(self.rank)}: allowed is at least 1 and at most {WIDTH_MAX}")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"alpha is {self.alpha:g}: allowed is above 0; the usual one is the rank, {self.rank}")
        for pattern in (*self.include, *self.exclude):
            expand(pattern)

    @property
    def scale(self) -> float:
        """Return g = alpha / rank."""
        return self.alpha / self.rank

    @property
    def frozen_bases(self) -> bool:
        """Tell whether it is an -xs type: a trained core between frozen singular vectors."""
        return self.type.endswith("-xs")

    @property
    def norms(self) -> tuple[str, ...]:
        """Return the magnitudes in the order in which they are applied: "rows" (O,), "cols" (I,)."""
        kind = self.type.removesuffix("-xs")
        return {"lora": (), "dora-rows": ("rows",), "dora-cols": ("cols",), "bora": ("rows", "cols")}[kind]

    @property
    def magnitudes(self) -> dict[str, str]:
        """Return names of their tensors: {"rows": "magnitude"}, {"rows": "magnitude_r", "cols": "magnitude_c"}, ..."""
        names = {"rows": "magnitude_r", "cols": "magnitude_c"}
        return {norm: names[norm] if len(self.norms) == 2 else "magnitude" for norm in self.norms}

    def selects(self, layer: str) -> bool:
        """Tell whether a layer is adapted."""
        return (not self.include or matches(layer, self.include)) and not matches(layer, self.exclude)

    def shapes(self, layer: tuple[int, ...]) -> Shapes:
        """Return kind and shape of the tensors of a layer (O, I); U and V may be missing in a file."""
        outputs, inputs = layer
        rank, sizes = self.rank, {"rows": outputs, "cols": inputs}
        shapes: Shapes = {"lora_A": (rank, inputs), "lora_B": (outputs, rank)}
        if self.frozen_bases:
            shapes = {"M_xs": (rank, rank), "U": (outputs, rank), "V": (inputs, rank)}
        return shapes | {name: (sizes[norm],) for norm, name in self.magnitudes.items()}


def adaptable_layers(config: ModelConfig) -> Shapes:
    """Return name and shape (O, I) of every linear map of the conditioner and the DiT."""
    shapes = expected_tensors(config, ADAPTED_PARTS)
    return {name.removesuffix(".weight"): s for name, s in shapes.items() if name.endswith(".weight") and len(s) == 2}


def selected_layers(adapter: AdapterConfig, config: ModelConfig) -> Shapes:
    """Return the layers that are adapted. Raises ValueError without any, and for a rank that a layer cannot have."""
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
    largest = max(max(shape) for shape in chosen.values())
    if adapter.rank > largest:
        raise ValueError(
            f"rank is {adapter.rank}: no layer has more than {largest} inputs or outputs; take a lower rank"
        )
    return chosen
