"""Quantization in the forward pass: the values that packed weights will have, bit for bit, with a straight gradient.

The arithmetic is that of ``sa3_mlx.spec.affine``. Run it eagerly and outside autocast: generated kernels may divide
otherwise.

Shapes: O outputs, I inputs, G = I / group groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sa3_mlx.spec.affine import SMALLEST_SCALE, check_grid

STORAGES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and bias of fp32 groups (..., group), both (..., 1); see ``affine.grid``."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    low_side = low.abs() > high.abs()
    steps = torch.tensor(2.0**bits - 1, device=groups.device)  # CUDA multiplies by the reciprocal of a Python number
    scale = ((high - low) / steps).clamp_min(float(SMALLEST_SCALE))
    scale = torch.where(low_side, scale, -scale)
    edge = torch.where(low_side, low, high)
    zero = torch.round(edge / scale)  # half to even
    on_grid = zero != 0
    scale = torch.where(on_grid, edge / torch.where(on_grid, zero, 1.0), scale)
    return scale, torch.where(on_grid, edge, 0.0)


def codes(weight: Tensor, *, bits: int, group: int, storage: str) -> tuple[Tensor, Tensor, Tensor]:
    """(O, I) -> codes (O, I) uint8, scales and biases (O, G) fp32 with values of the storage type.

    The weight is first rounded to the storage type, as it would be in a file.
    """
    check_grid(bits, group, weight.shape[1])
    dtype = STORAGES[storage]
    groups = weight.detach().to(dtype).float().unflatten(1, (-1, group))  # (O, G, group)
    scale, bias = grid(groups, bits)
    found = torch.round((groups - bias) / scale).clamp(0, 2**bits - 1).to(torch.uint8)
    return found.flatten(1), scale[..., 0].to(dtype).float(), bias[..., 0].to(dtype).float()


class _StraightThrough(torch.autograd.Function):
    """The quantized values forward, the gradient unchanged backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, group: int, storage: str) -> Tensor:  # noqa: ARG004
        found, scales, biases = codes(weight, bits=bits, group=group, storage=storage)
        values = scales.repeat_interleave(group, 1) * found.float() + biases.repeat_interleave(group, 1)
        return values.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ARG004
        return gradients[0], None, None, None


def fake_quantize(weight: Tensor, *, bits: int, group: int, storage: str) -> Tensor:
    """(O, I) -> the values of ``affine.dequantize(affine.quantize(...), "F32")``, differentiable as the identity.

    No value of a group lies outside its range, so nothing is clamped away from the gradient.
    """
    result = _StraightThrough.apply(weight, bits, group, storage)
    assert isinstance(result, Tensor)
    return result


class FakeQuant(nn.Module):
    """A parametrization: the weight of a layer reads as its quantized values, wherever it is used."""

    def __init__(self, *, bits: int, group: int, storage: str) -> None:
        super().__init__()
        self.bits, self.group, self.storage = bits, group, storage

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quantize(weight, bits=self.bits, group=self.group, storage=self.storage)


def add_fake_quant(layer: nn.Linear, *, bits: int, group: int, storage: str) -> None:
    """From now on ``layer`` computes with quantized weights; ``latent_weight`` is what an optimizer changes.

    Raises ValueError for a grid that does not fit.
    """
    check_grid(bits, group, layer.in_features)
    parametrize.register_parametrization(layer, "weight", FakeQuant(bits=bits, group=group, storage=storage))


def latent_weight(layer: nn.Linear) -> Tensor:
    """The weight behind the quantized values of a layer with ``add_fake_quant``."""
    return layer.get_submodule("parametrizations.weight").get_parameter("original")
