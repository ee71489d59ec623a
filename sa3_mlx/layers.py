"""Share small layers between the diffusion transformer and the SAME autoencoder.

Shapes: B batch, N tokens, D width, H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Literal

import numpy as np

from sa3_mlx.common.model.features import rope_table
from sa3_mlx.runtime import mx, nn, on_gpu

from .choices import way

Function = Callable[..., mx.array]
TILE, FEW_TILES = 32, 256  # outputs of up to 256 tiles of 32 x 32 MLX sums up in parts on Metal, rounded to x's type


def compiled(function: Function, choice: str) -> Function:
    """Return a function of arrays, as one graph per shape where that choice says so; what it uses must be computed."""
    return mx.compile(function) if way(choice) == "compiled" else function


def pointwise(group: Function) -> Function:
    """Mark a function as a group of elementwise operations, which may be compiled, once per number type.

    It is computed in fp32 and rounded once, at its end, to the type of its first array.
    """

    @wraps(group)
    def in_fp32(*arrays: mx.array) -> mx.array:
        if arrays[0].dtype == mx.float32:
            return group(*arrays)
        return group(*(array.astype(mx.float32) for array in arrays)).astype(arrays[0].dtype)

    compiled = mx.compile(in_fp32, shapeless=True)

    @wraps(group)
    def run(*arrays: mx.array) -> mx.array:
        return compiled(*arrays) if way("compiled_pointwise") == "compiled" else in_fp32(*arrays)

    return run


@pointwise
def silu(x: mx.array) -> mx.array:
    """Return x * sigmoid(x), by the exponential: a sigmoid costs 1.5 times as much on a CPU."""
    return x / (1 + mx.exp(-x))


@pointwise
def gate_silu(value: mx.array, gate: mx.array) -> mx.array:
    """Return value * silu(gate) [B14]."""
    return value * (gate / (1 + mx.exp(-gate)))


@pointwise
def gate_sine(value: mx.array, gate: mx.array) -> mx.array:
    """Return value * sin(pi gate) [B44]."""
    return value * mx.sin(3.14159265359 * gate)


@pointwise
def scale_tanh(x: mx.array, alpha: mx.array, gamma: mx.array, beta: mx.array) -> mx.array:
    """Return gamma * tanh(alpha * x) + beta [B43], on a CPU by the exponential: two thirds of the time of tanh."""
    if on_gpu():
        return gamma * mx.tanh(alpha * x) + beta
    return gamma + beta - 2 * gamma / (1 + mx.exp(2 * alpha * x))


@pointwise
def modulate(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """Return x * scale + shift."""
    return x * scale + shift


@pointwise
def add_gated(x: mx.array, branch: mx.array, gate: mx.array) -> mx.array:
    """Return x + branch * gate."""
    return x + branch * gate


class RMSNorm(nn.Module):
    """Return x / rms(x) * gamma over the last axis, statistics in fp32 [B11]."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gamma = mx.ones(size)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.gamma, self.eps)


class DynamicTanh(nn.Module):
    """Return gamma * tanh(alpha * x) + beta with a scalar alpha, no statistics [B43]."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.alpha = mx.ones(1)
        self.gamma = mx.ones(size)
        self.beta = mx.zeros(size)

    def __call__(self, x: mx.array) -> mx.array:
        return scale_tanh(x, self.alpha, self.gamma, self.beta)


class MLP(nn.Module):
    """Apply Linear, SiLU, Linear: (..., size_in) -> (..., size_out)."""

    def __init__(self, size_in: int, width: int, size_out: int, *, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size_in, width, bias=bias)
        self.fc2 = nn.Linear(width, size_out, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(silu(self.fc1(x)))


class FeedForward(nn.Module):
    """Feed forward through a gate: halves (value, gate); value * SiLU(gate) [B14] or value * sin(pi gate) [B44]."""

    def __init__(self, width: int, mult: int, gate: Literal["silu", "sine"]) -> None:
        super().__init__()
        self.gate = gate
        self.proj_in = nn.Linear(width, 2 * mult * width)
        self.proj_out = nn.Linear(mult * width, width)

    def __call__(self, x: mx.array) -> mx.array:
        value, gate = self.proj_in(x).split(2, axis=-1)
        return self.proj_out(gate_silu(value, gate) if self.gate == "silu" else gate_sine(value, gate))


class PackedLinear(nn.QuantizedLinear):
    """Multiply by a weight that stays packed in memory; the choice says whether it is unpacked for a product."""

    def __call__(self, x: mx.array) -> mx.array:
        y = self.rows(x, 0, len(self.weight))
        return y + self.bias if "bias" in self else y

    def rows(self, x: mx.array, start: int, stop: int) -> mx.array:
        """Return outputs ``start..stop`` without the bias, (..., I) -> (..., stop - start)."""
        weight, scales, biases = (self[name][start:stop] for name in ("weight", "scales", "biases"))
        size = {"group_size": self.group_size, "bits": self.bits}
        chosen, tokens = way("packed_products"), x.size // x.shape[-1]
        tiles = -(-tokens // TILE) * -(-(stop - start) // TILE)
        if chosen == "unpacked" or (chosen == "small_unpacked" and tokens >= TILE and tiles <= FEW_TILES):
            return x @ mx.dequantize(weight, scales, biases, **size).T
        return mx.quantized_matmul(x, weight, scales, biases, transpose=True, **size)


def linear_rows(layer: nn.Linear, x: mx.array, start: int, stop: int) -> mx.array:
    """Return outputs ``start..stop`` of a layer without bias, and no others: (..., D) -> (..., stop - start)."""
    if isinstance(layer, PackedLinear):
        return layer.rows(x, start, stop)
    if type(layer) is not nn.Linear:
        return layer(x)[..., start:stop]
    return x @ layer.weight[start:stop].T


Rope = tuple[mx.array, mx.array]


@lru_cache(maxsize=8)
def rope(start: int, stop: int) -> Rope:
    """Return rotary cos and sin for the positions start..stop-1, each (N, 16) fp32 [B12]."""
    cos, sin = rope_table(np.arange(start, stop))
    return mx.array(cos), mx.array(sin)


@pointwise
def _turned_first(a: mx.array, b: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return a * cos - b * sin


@pointwise
def _turned_second(a: mx.array, b: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    return b * cos + a * sin


def rotate(x: mx.array, table: Rope) -> mx.array:
    """Rotate, half-split, the first dimensions of every head, in fp32: (B, H, N, K) -> same [B12]."""
    size = table[0].shape[-1]
    a, b, rest = x[..., :size], x[..., size : 2 * size], x[..., 2 * size :]
    return mx.concatenate([_turned_first(a, b, *table), _turned_second(a, b, *table), rest], axis=-1)
