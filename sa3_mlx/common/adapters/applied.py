"""Put adapters to use on a model: check them, work out the bases that a file leaves out.

Shapes: O outputs, I inputs of a layer, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.quant.format import Quantization
from sa3_mlx.common.terminal import excerpt, one_line

from .config import adaptable_layers
from .format import Adapter, Float


@dataclass(frozen=True, kw_only=True, eq=False)
class Applied:
    """Use an adapter: how strongly, and at which times t (1 noise, 0 data) of sampling, both ends included.

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
        """Tell whether it is on at all times."""
        return self.interval == (0.0, 1.0)

    def on(self, t: float) -> bool:
        """Tell whether it is on at a time."""
        return self.interval[0] <= t <= self.interval[1]


def check_adapter(adapter: Adapter, config: ModelConfig) -> int:
    """Count the layers it changes. Raises ValueError where it does not fit a model: unknown layers, other shapes."""
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
        reason = excerpt(one_line(wrong[0]), 200) if wrong else "it is empty"
        base = excerpt(one_line(adapter.info.base))
        raise ValueError(
            f"adapter for {base}: {fitting} of its {len(adapter.layers)} layers fit {config.name} "
            f"({reason}); use the model that it was trained on, or one of its size"
        )
    return fitting


def _words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{kind} {shape}" for kind, shape in sorted(shapes.items()))


def singular_bases(weight: NDArray[np.floating], rank: int) -> tuple[Float, Float]:
    """Return the top singular vectors U (O, r), V (I, r) of (O, I); the largest entry of a column of U is positive."""
    u, _, vt = np.linalg.svd(weight.astype(np.float32), full_matrices=False)
    signs = np.sign(u[np.abs(u).argmax(0), np.arange(u.shape[1])])
    signs[signs == 0] = 1
    return np.ascontiguousarray((u * signs)[:, :rank]), np.ascontiguousarray((vt * signs[:, None])[:rank].T)


def with_bases(adapter: Adapter, folder: Path) -> Adapter:
    """Return the adapter with the singular vectors that its file left out, from the weights of the model in ``folder``.

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
    """Return adapters as a model uses them: checked, with their bases, those of strength 0 left out.

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
