"""Small layers shared by the diffusion transformer and the SAME autoencoder.

Shapes: B batch, N tokens, D width, H heads, K head size.
"""

from __future__ import annotations

from typing import Literal

from . import blas  # noqa: F401 (before mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .spec.features import rope_table


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x). The one of mlx.nn is compiled, which needs a C++ compiler at run time on Linux."""
    return x * mx.sigmoid(x)


class RMSNorm(nn.Module):
    """x / rms(x) * gamma over the last axis, statistics in fp32 [B11]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = mx.ones(size)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.gamma, self.eps)


class DynamicTanh(nn.Module):
    """gamma * tanh(alpha * x) + beta with a scalar alpha, no statistics [B43]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.alpha = mx.ones(1)
        self.gamma = mx.ones(size)
        self.beta = mx.zeros(size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.gamma * mx.tanh(self.alpha * x) + self.beta


class MLP(nn.Module):
    """Linear, SiLU, Linear: (..., size_in) -> (..., size_out)."""

    def __init__(self, size_in: int, width: int, size_out: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size_in, width, bias=bias)
        self.fc2 = nn.Linear(width, size_out, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(silu(self.fc1(x)))


class FeedForward(nn.Module):
    """Gated feed-forward: halves (value, gate); value * SiLU(gate) [B14] or value * sin(pi gate) [B44]."""

    def __init__(self, width: int, mult: int, gate: Literal["silu", "sine"]) -> None:
        super().__init__()
        self.gate = gate
        self.proj_in = nn.Linear(width, 2 * mult * width)
        self.proj_out = nn.Linear(mult * width, width)

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = self.proj_in(x).split(2, axis=-1)
        gate = silu(gate) if self.gate == "silu" else mx.sin(3.14159265359 * gate)
        return self.proj_out(value * gate)


Rope = tuple[mx.array, mx.array]


def rope(start: int, stop: int) -> Rope:
    """Rotary cos and sin for the positions start..stop-1, each (N, 16) fp32 [B12]."""
    cos, sin = rope_table(np.arange(start, stop))
    return mx.array(cos), mx.array(sin)


def rotate(x: mx.array, table: Rope) -> mx.array:
    """Half-split rotary embedding of the first dimensions of every head, in fp32: (B, H, N, K) -> same [B12]."""
    cos, sin = table
    size = cos.shape[-1]
    a, b = x[..., :size].astype(mx.float32), x[..., size : 2 * size].astype(mx.float32)
    turned = [(a * cos - b * sin).astype(x.dtype), (b * cos + a * sin).astype(x.dtype)]
    return mx.concatenate([*turned, x[..., 2 * size :]], axis=-1)
