"""Quantize in the forward pass: the values that packed weights will have, bit for bit, with a straight gradient.

The arithmetic is that of ``sa3_mlx.common.quant.affine``. Run it eagerly and outside autocast: generated
kernels may divide otherwise. Scales and biases follow the weights until they are frozen; from then on weights that a
grid cannot reach are clamped and get no gradient.

Shapes: O outputs, I inputs, G = I / group groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sa3_mlx.common.quant.affine import SMALLEST_SCALE, Packed, Storage, check_grid, pack

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


class FakeQuant(nn.Module):
    """Parametrize a layer: its weight reads as its quantized values, wherever it is used.

    ``scales`` and ``biases`` (O, G) fp32 are those of the grid once it is frozen, and zero before, which no scale is.
    """

    scales: Tensor
    biases: Tensor

    def __init__(self, *, bits: int, group: int, storage: Storage, shape: tuple[int, int]) -> None:
        super().__init__()
        rows, inputs = shape
        check_grid(bits, group, inputs)
        self.bits, self.group, self.storage = bits, group, storage
        for name in ("scales", "biases"):
            self.register_buffer(name, torch.zeros(rows, inputs // group))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the values of ``affine.dequantize(affine.quantize(...), "F32")``, differentiable as the identity
        but for what a frozen grid clamps."""
        result = _StraightThrough.apply(weight, self)
        assert isinstance(result, Tensor)
        return result

    @torch.no_grad()
    def freeze(self, weight: Tensor) -> None:
        """Keep the grid that this weight (O, I) has now."""
        scale, bias = grid(self._groups(weight), self.bits)
        self.scales.copy_(scale[..., 0])
        self.biases.copy_(bias[..., 0])

    @torch.no_grad()
    def hold(self, packed: Packed) -> None:
        """Keep the grid of packed weights."""
        self.scales.copy_(torch.from_numpy(packed.scales))
        self.biases.copy_(torch.from_numpy(packed.biases))

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return codes (O, I) uint8 of (O, I), scales and biases (O, G) fp32 with values of the storage type, and which
        weights (O, I) a frozen grid clamps.

        The weight is first rounded to the storage type, as it would be in a file.
        """
        dtype, groups = STORAGES[self.storage], self._groups(weight)
        scale, bias = grid(groups, self.bits)
        frozen = self.scales[..., None] != 0
        scale = torch.where(frozen, self.scales[..., None], scale)
        bias = torch.where(frozen, self.biases[..., None], bias)
        steps = torch.round((groups - bias) / scale)
        found = steps.clamp(0, 2**self.bits - 1)
        clamped = (steps != found) & frozen
        scale, bias = (value[..., 0].to(dtype).float() for value in (scale, bias))
        return found.to(torch.uint8).flatten(1), scale, bias, clamped.flatten(1)

    def packed(self, weight: Tensor) -> Packed:
        """Return what a file holds: the codes and the grid of ``forward``."""
        found, scales, biases, _ = (tensor.cpu().numpy() for tensor in self.codes(weight))
        return Packed(
            bits=self.bits,
            group=self.group,
            storage=self.storage,
            words=pack(found, self.bits),
            scales=scales,
            biases=biases,
        )

    def _groups(self, weight: Tensor) -> Tensor:
        """Return (O, G, group), rounded to the storage type."""
        return weight.detach().to(STORAGES[self.storage]).float().unflatten(1, (-1, self.group))


class _StraightThrough(torch.autograd.Function):
    """Pass the quantized values forward, and the gradient backward unchanged where nothing is clamped."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quant: FakeQuant) -> Tensor:
        found, scales, biases, clamped = quant.codes(weight)
        ctx.save_for_backward(clamped)
        values = scales.repeat_interleave(quant.group, 1) * found.float() + biases.repeat_interleave(quant.group, 1)
        return values.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].masked_fill(ctx.saved_tensors[0], 0.0), None


def add_fake_quant(layer: nn.Linear, *, bits: int, group: int, storage: Storage) -> None:
    """Let ``layer`` compute with quantized weights from now on; an optimizer changes its ``latent_weight``.

    Raises ValueError for a grid that does not fit.
    """
    shape = (layer.out_features, layer.in_features)
    quant = FakeQuant(bits=bits, group=group, storage=storage, shape=shape).to(layer.weight.device)
    parametrize.register_parametrization(layer, "weight", quant)


def fake_quant(layer: nn.Linear) -> FakeQuant:
    """Return the parametrization of a layer with ``add_fake_quant``."""
    found = layer.get_submodule("parametrizations.weight.0")
    assert isinstance(found, FakeQuant)
    return found


def latent_weight(layer: nn.Linear) -> Tensor:
    """Return the weight under the quantized values of a layer with ``add_fake_quant``."""
    return layer.get_submodule("parametrizations.weight").get_parameter("original")
