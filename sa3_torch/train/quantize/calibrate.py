"""Find what quantization needs to know from runs of a DiT: errors, sensitivities and Hessians of its layers.

It is the twin of what ``sa3_mlx.quantize`` does inside, for tuning to start from the same weights.

Shapes: B batch, T latent frames, C latent channels, O outputs, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sa3_mlx.common.quant.affine import Float, Packed, Storage
from sa3_mlx.common.quant.calibration import SENSITIVITY_STATES
from sa3_mlx.common.quant.format import Grid
from sa3_mlx.common.quant.gptq import compensate, passes
from sa3_mlx.common.quant.recipes import GROUP, MIXED_BITS, choose_bits
from sa3_torch.dit import DiT
from sa3_torch.fake_quant import FakeQuant
from sa3_torch.trajectory import State

Storages = Mapping[str, Storage]  # of scales and biases, by path


def velocity_at(dit: DiT, state: State) -> Tensor:
    """Return the velocity (B, T, C) fp32 that this DiT gives at a state of another one."""
    velocity: Tensor = dit(state.x, torch.from_numpy(state.t).to(state.x.device), dit.prepare(state.cond))
    return velocity.float()


@torch.no_grad()
def velocity_error(dit: DiT, states: Sequence[State]) -> float:
    """Return the relative L2 error of the velocities over all states."""
    wrong = sum(float((velocity_at(dit, state) - state.velocity).square().sum()) for state in states)
    return math.sqrt(wrong / sum(float(state.velocity.square().sum()) for state in states))


def layer_at(dit: nn.Module, path: str) -> nn.Linear:
    """Return the layer of a checkpoint path such as "dit.layers.0.ff.proj_in"."""
    return cast(nn.Linear, dit.get_submodule(path.removeprefix("dit.")))


@torch.no_grad()
def sensitive_grids(
    dit: DiT, states: Sequence[State], paths: Sequence[str], storages: Storages, target: float
) -> dict[str, Grid]:
    """Choose bits for each layer by what its rounding by itself does to the velocity; see ``choose_bits``."""
    chosen = states[:: max(1, len(states) // SENSITIVITY_STATES)]
    damage: dict[str, dict[int, float]] = {}
    for path in paths:
        weight = layer_at(dit, path).weight
        kept = weight.clone()
        damage[path] = {}
        for bits in MIXED_BITS:
            shape = (len(weight), weight.shape[1])
            rounded = FakeQuant(bits=bits, group=GROUP, storage=storages[path], shape=shape).to(weight.device)
            weight.copy_(rounded(kept))
            damage[path][bits] = velocity_error(dit, chosen) ** 2
        weight.copy_(kept)
    return choose_bits(damage, {path: layer_at(dit, path).weight.numel() for path in paths}, target)


def gptq_starts(
    dit: DiT, states: Sequence[State], grids: Mapping[str, Grid], storages: Storages
) -> Iterator[tuple[str, Packed, Float]]:
    """Yield path, GPTQ's packed weights and the (O, I) values that it rounded to them, for every layer with a grid."""
    for paths in passes({path: layer_at(dit, path).in_features for path in grids}):
        for path, hessian in hessians(dit, states, paths).items():
            grid, storage = grids[path], storages[path]
            weight = layer_at(dit, path).weight.detach().float().cpu().numpy()
            packed, values = compensate(weight, hessian, bits=grid.bits, group=grid.group, storage=storage)
            yield path, packed, values


@torch.no_grad()
def hessians(dit: DiT, states: Sequence[State], paths: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return the sum of x x^T over the inputs x of each layer, in all states: (I, I) by path."""
    with _watched(dit, paths) as watches:
        for state in states:
            velocity_at(dit, state)
    return {path: watch.total.cpu().numpy().astype(np.float64) for path, watch in watches.items()}


class InputProducts(nn.Module):
    """Sum the outer products of the inputs of a linear map.

    The last block asks some of its layers for some tokens twice, as it takes rows of a matrix past the others.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.total = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).float()
        self.total += flat.T @ flat
        result: Tensor = self.layer(x)
        return result


@contextmanager
def _watched(dit: DiT, paths: Sequence[str]) -> Iterator[dict[str, InputProducts]]:
    """Put ``InputProducts`` in place of some layers."""
    watches = {path: InputProducts(layer_at(dit, path)) for path in paths}
    try:
        for path, watch in watches.items():
            dit.set_submodule(path.removeprefix("dit."), watch)
        yield watches
    finally:
        for path, watch in watches.items():
            dit.set_submodule(path.removeprefix("dit."), watch.layer)
