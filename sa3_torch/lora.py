"""Put adapters on the linear maps of a model: trained, unmerged beside any base, or merged [T8].

Every type is ``rows * (W + B A) * cols``; see ``sa3_mlx.common.adapters.config``. Stacked adapters change, one
after the other, the weight that the ones before them made.

Shapes: O outputs, I inputs of a layer, r rank, B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sa3_mlx.common.adapters.applied import Applied, singular_bases
from sa3_mlx.common.adapters.config import AdapterConfig
from sa3_mlx.common.adapters.format import Adapter

from .dit import DiT
from .weights import BLOCKS

Product = Callable[[Tensor], Tensor]  # inputs (..., I) -> outputs (..., O)
Velocity = Callable[[Tensor, np.ndarray], Tensor]  # x (B, T, C), t (B,) -> (B, T, C)
NORM_FLOOR = 1e-12


def scales(weight: Tensor, magnitudes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return factors of rows (O,) and columns (I,) that bring norms of a weight (O, I) to magnitudes, in order.

    The columns are those of the weight whose rows are scaled already.
    """
    found: dict[str, Tensor] = {}
    for norm, magnitude in magnitudes.items():
        if norm == "cols" and found:
            weight = weight * found["rows"][:, None]
        found[norm] = magnitude / (weight.norm(dim=1 if norm == "rows" else 0) + NORM_FLOOR)
    return found


def scaled(weight: Tensor, factors: Mapping[str, Tensor]) -> Tensor:
    """Return (O, I) times its factors."""
    if "rows" in factors:
        weight = weight * factors["rows"][:, None]
    return weight * factors["cols"] if "cols" in factors else weight


class Update(nn.Module):
    """Apply one adapter to one layer: W -> rows * (W + b a) * cols. Factors stay fp32: they are close to 1."""

    a: Tensor
    b: Tensor
    rows: Tensor | None
    cols: Tensor | None

    def __init__(self, a: Tensor, b: Tensor, factors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("a", a)  # (r, I)
        self.register_buffer("b", b)  # (O, r), with strength and alpha / rank
        self.register_buffer("rows", factors.get("rows"))  # (O,)
        self.register_buffer("cols", factors.get("cols"))  # (I,)

    def forward(self, x: Tensor, product: Product) -> Tensor:
        """Return the product (..., O) of inputs (..., I) with the changed weight, from the product with W."""
        if self.cols is not None:
            x = (x * self.cols).to(x.dtype)
        y = product(x) + F.linear(F.linear(x, self.a), self.b)
        return y if self.rows is None else (y * self.rows).to(y.dtype)


class AdaptedLinear(nn.Module):
    """Keep a linear map with its weight as it is, and updates beside it."""

    def __init__(self, base: nn.Linear, updates: list[Update]) -> None:
        super().__init__()
        self.base = base
        self.bias = base.bias  # comes last
        self.updates = nn.ModuleList(updates)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""

        product: Product = partial(F.linear, weight=self.base.weight)
        for update in self.updates:
            product = _after(update, product)
        y = product(x)
        return y if self.bias is None else y + self.bias


def _after(update: nn.Module, product: Product) -> Product:
    return lambda x: update(x, product)


@torch.no_grad()
def updates_of(layer: str, weight: Tensor, adapters: Sequence[Applied]) -> tuple[list[Update], Tensor]:
    """Return what adapters do to a layer with this weight (O, I) fp32, and the weight that they all make."""
    updates = []
    for applied in adapters:
        adapter = applied.adapter
        if layer not in adapter.layers or applied.strength == 0:
            continue
        a, b = (torch.from_numpy(values).to(weight.device) for values in adapter.low_rank(layer))
        b = applied.strength * b
        weight = weight + b @ a
        names = adapter.config.magnitudes.items()
        magnitudes = {norm: torch.from_numpy(adapter.layers[layer][name]).to(weight.device) for norm, name in names}
        factors = scales(weight, magnitudes)
        weight = scaled(weight, factors)
        updates.append(Update(a, b, factors))
    return updates, weight


def merged_weight(layer: str, weight: np.ndarray, adapters: Sequence[Applied]) -> np.ndarray:
    """Return the weight (O, I) fp32 of a layer with the adapters in it."""
    return updates_of(layer, torch.from_numpy(weight), adapters)[1].numpy()


def adapt(module: nn.Module, part: str, adapters: Sequence[Applied]) -> nn.Module:
    """Return a copy of a part with adapters beside its weights, which it shares with the original.

    Of a streamed DiT every block is adapted when it is read.
    """
    shared = {id(tensor): tensor for tensor in itertools.chain(module.parameters(), module.buffers())}
    adapted = copy.deepcopy(module, shared)
    if isinstance(adapted, DiT) and adapted.streamed:
        adapted.layers = cast(nn.ModuleList, _AdaptedBlocks(adapted.layers, adapters))
        adapters = [replace(applied, adapter=_outside(applied.adapter)) for applied in adapters]
    _insert(adapted, _updates(adapted, part + ".", adapters))
    return adapted.eval()


def _outside(adapter: Adapter) -> Adapter:
    """Return what it does outside of the blocks of the DiT."""
    layers = {name: tensors for name, tensors in adapter.layers.items() if not name.startswith(BLOCKS)}
    return replace(adapter, layers=layers)


class _AdaptedBlocks:
    """Give the blocks of a streamed DiT with adapters; what these do to a block is worked out once and kept."""

    def __init__(self, blocks: nn.ModuleList, adapters: Sequence[Applied]) -> None:
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
    found = {}
    for path in layers_of(prefix, adapters):
        weight = module.get_submodule(path).get_parameter("weight")
        found[path], _ = updates_of(prefix + path, weight.float(), adapters)
        for update in found[path]:
            update.a, update.b = update.a.to(weight.dtype), update.b.to(weight.dtype)
    return found


def _insert(module: nn.Module, updates: Mapping[str, list[Update]]) -> None:
    for path, own in updates.items():
        parent, _, name = path.rpartition(".")
        base = module.get_submodule(path)
        assert isinstance(base, nn.Linear)
        setattr(module.get_submodule(parent), name, AdaptedLinear(base, own))


@torch.no_grad()
def merge(module: nn.Module, part: str, adapters: Sequence[Applied]) -> nn.Module:
    """Return the part itself, adapters in its weights, which keep their number type."""
    for path in layers_of(part + ".", adapters):
        base = module.get_submodule(path)
        assert isinstance(base, nn.Linear)
        _, weight = updates_of(f"{part}.{path}", base.weight.float(), adapters)
        base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
    return module


def layers_of(prefix: str, adapters: Sequence[Applied]) -> list[str]:
    """Return layers whose names begin so and that any adapter changes, by the rest of their names."""
    names = {layer for applied in adapters for layer in applied.adapter.layers}
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


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

    def __call__(self, x: Tensor, t: np.ndarray) -> Tensor:
        """Return (B, T, C) for x (B, T, C), t (B,) fp32."""
        active = [tuple(applied for applied in self.adapters if applied.on(time)) for time in t.tolist()]
        first, *others = dict.fromkeys(active)
        velocity = self._velocity(first)(x, t)
        if others:
            velocity = velocity.clone()  # one graph of kernels may write where another one did
        for other in others:
            rows = torch.tensor([on == other for on in active], device=x.device)
            velocity = torch.where(rows[:, None, None], self._velocity(other)(x, t), velocity)
        return velocity


class TrainedAdapter(nn.Module):
    """Parametrize a layer: its weight reads as its adapted one; norms are differentiated.

    It changes nothing at the start. The -xs types keep their singular vectors as buffers.
    """

    U: Tensor
    V: Tensor

    def __init__(self, weight: Tensor, config: AdapterConfig, random: torch.Generator) -> None:
        super().__init__()
        weight = weight.detach().float()
        outputs, inputs = weight.shape
        self.scale, self.magnitudes = config.scale, config.magnitudes
        if config.frozen_bases:
            u, v = singular_bases(weight.cpu().numpy(), config.rank)
            self.register_buffer("U", torch.from_numpy(u).to(weight.device))
            self.register_buffer("V", torch.from_numpy(v).to(weight.device))
            self.M_xs = nn.Parameter(torch.zeros(config.rank, config.rank, device=weight.device))
        else:
            bound = 1 / math.sqrt(inputs)  # Kaiming-uniform with a = sqrt 5
            start = (2 * torch.rand(config.rank, inputs, generator=random) - 1) * bound
            self.lora_A = nn.Parameter(start.to(weight.device))
            self.lora_B = nn.Parameter(torch.zeros(outputs, config.rank, device=weight.device))
        norms = {norm: weight.norm(dim=1 if norm == "rows" else 0) for norm in config.norms}
        for norm, name in config.magnitudes.items():
            self.register_parameter(name, nn.Parameter(norms[norm]))
        self.frozen_bases = config.frozen_bases
        self.on = True  # off, the weight reads as it is

    def forward(self, weight: Tensor) -> Tensor:
        """Return the changed weight (O, I) fp32."""
        if not self.on:
            return weight.float()
        with torch.autocast(weight.device.type, enabled=False):
            delta = self.U @ self.M_xs @ self.V.T if self.frozen_bases else self.lora_B @ self.lora_A
            changed = weight.float() + self.scale * delta
            magnitudes = {norm: self.get_parameter(name) for norm, name in self.magnitudes.items()}
            return scaled(changed, scales(changed, magnitudes))


def add_adapter(layer: nn.Linear, config: AdapterConfig, random: torch.Generator) -> TrainedAdapter:
    """Let the layer compute with an adapted weight from now on; return the adapter, freeze the weight itself."""
    adapter = TrainedAdapter(layer.weight, config, random)
    parametrize.register_parametrization(layer, "weight", adapter, unsafe=True)
    layer.requires_grad_(False)
    return adapter.requires_grad_(True)
