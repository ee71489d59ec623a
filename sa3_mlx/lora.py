"""Put adapters on the linear maps of a model: unmerged beside any base, or merged [T8].

Every type is ``rows * (W + B A) * cols``; see ``sa3_mlx.common.adapters.config``. Stacked adapters change, one
after the other, the weight that the ones before them made.

Shapes: O outputs, I inputs of a layer, r rank, B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from sa3_mlx.common.adapters.applied import Applied
from sa3_mlx.common.adapters.format import Adapter
from sa3_mlx.runtime import mx, nn

from .dit import DiT
from .weights import BLOCKS

Product = Callable[[mx.array], mx.array]  # inputs (..., I) -> outputs (..., O)
Velocity = Callable[[mx.array, np.ndarray], mx.array]  # x (B, T, C), t (B,) -> (B, T, C)
NORM_FLOOR = 1e-12


def scales(weight: mx.array, magnitudes: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Return factors of rows (O,) and columns (I,) that bring norms of a weight (O, I) to magnitudes, in order.

    The columns are those of the weight whose rows are scaled already.
    """
    found: dict[str, mx.array] = {}
    for norm, magnitude in magnitudes.items():
        if norm == "cols" and found:
            weight = weight * found["rows"][:, None]
        found[norm] = magnitude / (mx.linalg.norm(weight, axis=1 if norm == "rows" else 0) + NORM_FLOOR)
    return found


def scaled(weight: mx.array, factors: Mapping[str, mx.array]) -> mx.array:
    """Return (O, I) times its factors."""
    if "rows" in factors:
        weight = weight * factors["rows"][:, None]
    return weight * factors["cols"] if "cols" in factors else weight


class Update(nn.Module):
    """Apply one adapter to one layer: W -> rows * (W + b a) * cols. Factors stay fp32: they are close to 1."""

    def __init__(self, a: mx.array, b: mx.array, factors: Mapping[str, mx.array]) -> None:
        super().__init__()
        self.a = a  # (r, I)
        self.b = b  # (O, r), with strength and alpha / rank
        self.rows = factors.get("rows")  # (O,)
        self.cols = factors.get("cols")  # (I,)

    def __call__(self, x: mx.array, product: Product) -> mx.array:
        """Return the product (..., O) of inputs (..., I) with the changed weight, from the product with W."""
        if self.cols is not None:
            x = (x * self.cols).astype(x.dtype)
        y = mx.addmm(product(x), x @ self.a.T, self.b.T)
        return y if self.rows is None else (y * self.rows).astype(y.dtype)


class AdaptedLinear(nn.Module):
    """Keep a linear map, quantized or not, with its weight as it is, and updates beside it."""

    def __init__(self, base: nn.Module, updates: list[Update]) -> None:
        super().__init__()
        self.base = copy.copy(base)
        scaled = any(update.rows is not None for update in updates)  # all but the bias, which comes last then
        self.bias = self.base.pop("bias", None) if scaled else None
        self.updates = updates

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., I) to (..., O)."""
        product: Product = self.base
        for update in self.updates:
            product = _after(update, product)
        y = product(x)
        return y if self.bias is None else y + self.bias


def _after(update: Update, product: Product) -> Product:
    return lambda x: update(x, product)


def updates_of(layer: str, weight: mx.array, adapters: Sequence[Applied]) -> tuple[list[Update], mx.array]:
    """Return what adapters do to a layer with this weight (O, I) fp32, and the weight that they all make."""
    updates = []
    for applied in adapters:
        adapter = applied.adapter
        if layer not in adapter.layers or applied.strength == 0:
            continue
        a, b = (mx.array(values) for values in adapter.low_rank(layer))
        b = applied.strength * b
        weight = weight + b @ a
        names = adapter.config.magnitudes.items()
        magnitudes = {norm: mx.array(adapter.layers[layer][name]) for norm, name in names}
        factors = scales(weight, magnitudes)
        weight = scaled(weight, factors)
        updates.append(Update(a, b, factors))
    return updates, weight


def merged_weight(layer: str, weight: np.ndarray, adapters: Sequence[Applied]) -> np.ndarray:
    """Return the weight (O, I) fp32 of a layer with the adapters in it."""
    return np.array(updates_of(layer, mx.array(weight), adapters)[1])


def adapt(module: nn.Module, part: str, adapters: Sequence[Applied]) -> nn.Module:
    """Return a copy of a part with adapters beside its weights, which it shares with the original.

    Of a streamed DiT every block is adapted when it is read.
    """
    adapted, prefix = _copied(module), part + "."
    if isinstance(module, DiT) and module.streamed:
        adapted.layers = _AdaptedBlocks(module.layers, adapters)
        adapters = [replace(applied, adapter=_outside(applied.adapter)) for applied in adapters]
    _insert(adapted, _updates(adapted, prefix, adapters))
    return cast(nn.Module, adapted.eval())


def _outside(adapter: Adapter) -> Adapter:
    """Return what it does outside of the blocks of the DiT."""
    layers = {name: tensors for name, tensors in adapter.layers.items() if not name.startswith(BLOCKS)}
    return replace(adapter, layers=layers)


class _AdaptedBlocks:
    """Give the blocks of a streamed DiT with adapters; what these do to a block is worked out once and kept."""

    def __init__(self, blocks: Sequence[nn.Module], adapters: Sequence[Applied]) -> None:
        self._blocks, self._adapters = blocks, adapters
        self._known: dict[int, dict[str, list[Update]]] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> nn.Module:
        block = self._blocks[index]
        if index not in self._known:
            self._known[index] = _updates(block, f"{BLOCKS}{index}.", self._adapters)
        _insert(block, self._known[index])
        return block


def _updates(module: nn.Module, prefix: str, adapters: Sequence[Applied]) -> dict[str, list[Update]]:
    """Return updates by path in a module whose layers' names begin with ``prefix``."""
    found, layers = {}, _linears(module)
    for path in layers_of(prefix, adapters):
        base = layers[path]
        found[path], _ = updates_of(prefix + path, _weight(base), adapters)
        for update in found[path]:
            update.a, update.b = update.a.astype(_dtype(base)), update.b.astype(_dtype(base))
            mx.eval(update.parameters())  # before the next one: the weight in fp32 is large
    return found


def _insert(module: nn.Module, updates: Mapping[str, list[Update]]) -> None:
    layers = _linears(module)
    adapted = [(path, AdaptedLinear(layers[path], own)) for path, own in updates.items()]
    module.update_modules(tree_unflatten(adapted))


def merge(module: nn.Module, part: str, adapters: Sequence[Applied]) -> nn.Module:
    """Return the part itself, adapters in its weights, which keep their type; quantized layers become plain ones."""
    layers = _linears(module)
    for path in layers_of(part + ".", adapters):
        base = layers.pop(path)  # one layer after the other, so that only one has two weights
        _, weight = updates_of(f"{part}.{path}", _weight(base), adapters)
        merged = nn.Linear(1, 1, bias=False)
        merged.weight = weight.astype(_dtype(base))
        if "bias" in base:
            merged.bias = base.bias
        mx.eval(merged.parameters())
        module.update_modules(tree_unflatten([(path, merged.eval())]))
    return module


def layers_of(prefix: str, adapters: Sequence[Applied]) -> list[str]:
    """Return layers whose names begin so and that any adapter changes, by the rest of their names."""
    names = {layer for applied in adapters for layer in applied.adapter.layers}
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def _copied(value: Any) -> Any:
    """Copy modules and share their arrays."""
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if not isinstance(value, nn.Module):
        return value
    new = copy.copy(value)
    for name, item in value.items():
        new[name] = _copied(item)
    return new


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    """Return the layers of a part that hold weights, by their paths such as "layers.0.ff.proj_in"."""
    return dict(tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module))


def _weight(layer: nn.Module) -> mx.array:
    """Return (O, I) fp32, of a quantized layer what its packed words stand for."""
    if isinstance(layer, nn.QuantizedLinear):
        scales, biases = (array.astype(mx.float32) for array in (layer.scales, cast(mx.array, layer.biases)))
        return mx.dequantize(layer.weight, scales, biases, group_size=layer.group_size, bits=layer.bits)
    return layer.weight.astype(mx.float32)


def _dtype(layer: nn.Module) -> mx.Dtype:
    return layer.scales.dtype if isinstance(layer, nn.QuantizedLinear) else layer.weight.dtype


class GatedVelocity:
    """Return velocity(x, t) of a model whose adapters are on in parts of the times; every item's own t decides.

    ``make`` gives the velocity with some of the adapters on, in their order.
    """

    def __init__(self, adapters: Sequence[Applied], make: Callable[[tuple[Applied, ...]], Velocity]) -> None:
        self.adapters = adapters
        self.make = make
        self._made: dict[tuple[Applied, ...], Velocity] = {}

    def _velocity(self, on: tuple[Applied, ...]) -> Velocity:
        if on not in self._made:
            self._made[on] = self.make(on)
        return self._made[on]

    def __call__(self, x: mx.array, t: np.ndarray) -> mx.array:
        """Return (B, T, C) for x (B, T, C), t (B,) fp32."""
        active = [tuple(applied for applied in self.adapters if applied.on(time)) for time in t.tolist()]
        first, *others = dict.fromkeys(active)
        velocity = self._velocity(first)(x, t)
        for other in others:
            rows = mx.array([on == other for on in active])
            velocity = mx.where(rows[:, None, None], self._velocity(other)(x, t), velocity)
        return velocity
