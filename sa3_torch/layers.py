"""Share small layers between the diffusion transformer and the SAME autoencoder.

Shapes: B batch, N tokens, D width, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.common.model.features import rope_table

from .choices import way
from .cuda.graphs import graphs_of
from .cuda.transfer import upload

Function = Callable[..., Tensor]


def compiled_block(block: nn.Module, choice: str) -> Function:
    """Return a block, compiled where that choice says so: once for all blocks of its kind, and for every length."""
    if way(choice) == "compiled" and not torch.compiler.is_compiling():
        return partial(_generated(type(block).forward), block)
    return block


@cache
def _generated(function: Function) -> Function:
    return torch.compile(function, dynamic=True)


def graphed(network: nn.Module, function: Function, *inputs: Any) -> Tensor:
    """Return the result of a function of a network, on CUDA by a graph of kernels where the choice says so."""
    return graphs_of(network)(function, *inputs) if way("graphs") == "captured" else function(*inputs)


def gate_silu(value: Tensor, gate: Tensor) -> Tensor:
    """Return value * silu(gate) [B14]."""
    return value * F.silu(gate)


def gate_sine(value: Tensor, gate: Tensor) -> Tensor:
    """Return value * sin(pi gate) [B44]."""
    return (value * torch.sin(3.14159265359 * gate.float())).to(value.dtype)


def scale_tanh(x: Tensor, alpha: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Return gamma * tanh(alpha * x) + beta [B43]."""
    return torch.addcmul(beta, gamma, torch.tanh(alpha * x))


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return x * scale + shift."""
    return torch.addcmul(shift, x, scale)


def add_gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Return x + branch * gate."""
    return torch.addcmul(x, branch, gate)


def split_modulation(values: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Return scales, shifts and gates, (B, 1, D) each, of attention and of feed-forward, as ``modulate`` and
    ``add_gated`` take them, of (B, 6 D): 1 + scale, shift and sigmoid(1 - gate) [B10]."""
    scale, shift, gate = values.unflatten(-1, (2, 3, 1, -1)).unbind(2)  # (B, 2, 1, D) each
    return (1 + scale).unbind(1), shift.unbind(1), torch.sigmoid(1 - gate).unbind(1)


class RMSNorm(nn.Module):
    """Return x / rms(x) * gamma over the last axis, statistics in fp32 [B11]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.gamma.dtype:  # one kernel of a GPU, which sums in fp32 too
            return F.rms_norm(x, self.gamma.shape, self.gamma, self.eps)
        return F.rms_norm(x.float(), self.gamma.shape, self.gamma.float(), self.eps).to(x.dtype)


class DynamicTanh(nn.Module):
    """Return gamma * tanh(alpha * x) + beta with a scalar alpha, no statistics [B43]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.gamma = nn.Parameter(torch.ones(size))
        self.beta = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return scale_tanh(x, self.alpha, self.gamma, self.beta)


class MLP(nn.Module):
    """Apply Linear, SiLU, Linear: (..., size_in) -> (..., size_out)."""

    def __init__(self, size_in: int, width: int, size_out: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size_in, width, bias=bias)
        self.fc2 = nn.Linear(width, size_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class FeedForward(nn.Module):
    """Feed forward through a gate: halves (value, gate); value * SiLU(gate) [B14] or value * sin(pi gate) [B44]."""

    def __init__(self, width: int, mult: int, gate: Literal["silu", "sine"]) -> None:
        super().__init__()
        self.gate = gate
        self.proj_in = nn.Linear(width, 2 * mult * width)
        self.proj_out = nn.Linear(mult * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(gate_silu(value, gate) if self.gate == "silu" else gate_sine(value, gate))


def linear_rows(layer: nn.Module, x: Tensor, start: int, stop: int) -> Tensor:
    """Return outputs ``start..stop`` of a layer without bias, and no others: (..., D) -> (..., stop - start)."""
    if isinstance(layer, HalfLinear):
        return layer.rows(x, start, stop)
    if type(layer) is not nn.Linear:  # such as one that quantizes its weight on the way
        return layer(x)[..., start:stop]
    return F.linear(x, layer.weight[start:stop])


class HalfLinear(nn.Module):
    """Multiply in 16 bits, sums in fp32, for a network whose other numbers are fp32; gives fp32 back if ``wide``.

    Where it does not, what follows takes 16-bit inputs too: attention does, DynamicTanh and sums become fp32 again.
    """

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, *, wide: bool) -> None:
        super().__init__()
        self.wide = wide
        self.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return self.rows(x, 0, len(self.weight))

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Return outputs ``start..stop``, and no others: (..., I) -> (..., stop - start)."""
        bias = None if self.bias is None else self.bias[start:stop]
        y = F.linear(x.to(self.weight.dtype), self.weight[start:stop], bias)
        return y.float() if self.wide else y


def halve_products(network: nn.Module, dtype: torch.dtype, *, wide: bool) -> None:
    """Put ``HalfLinear`` in the place of every linear map inside a network."""
    for parent in [*network.modules()]:
        for name, layer in [*parent.named_children()]:
            if type(layer) is nn.Linear:
                setattr(parent, name, HalfLinear(layer, dtype, wide=wide))


Rope = tuple[Tensor, Tensor]


def rope(start: int, stop: int, device: torch.device) -> Rope:
    """Return rotary cos and sin for the positions start..stop-1, each (N, 16) fp32 [B12]."""
    cos, sin = _rope(1 << max(10, (stop - 1).bit_length()), device)
    return cos[start:stop], sin[start:stop]


@cache  # a graph of kernels reads the table where it lies; all lengths together take twice the longest
def _rope(positions: int, device: torch.device) -> Rope:
    cos, sin = rope_table(np.arange(positions))
    return upload(cos, device), upload(sin, device)


def rotate(x: Tensor, table: Rope) -> Tensor:
    """Rotate, half-split, the first dimensions of every head, in fp32: (B, H, N, K) -> same [B12].

    In memory the result lies as (B, H, N, K) on a CPU, whose attention is faster so, and as (B, N, H, K) elsewhere.
    """
    cos, sin = table
    size, tokens_first = cos.shape[-1], x.device.type != "cpu"
    if tokens_first:
        x, cos, sin = x.transpose(1, 2), cos[:, None], sin[:, None]
    a, b, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]  # products with the table are fp32
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    x = torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)
    return x.transpose(1, 2) if tokens_first else x
