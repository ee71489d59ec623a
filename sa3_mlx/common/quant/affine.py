"""Compute affine group quantization in numpy, bit for bit as the CPU stream of MLX 0.29 and later does it [Q1].

A row of weights is cut into groups of ``group`` values; each group keeps one scale, one bias and a code of ``bits``
bits per value, which stands for ``scale * code + bias``. Quantize once, offline: a Metal device rounds otherwise.
All arithmetic is fp32 with IEEE division. Values of a narrower storage type come in as float32, exactly widened.

Shapes: O outputs, I inputs, G = I / group groups, W = I * bits / 32 words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.safetensors import from_bf16_bits, to_bf16_bits

Float = NDArray[np.float32]
Words = NDArray[np.uint32]
Codes = NDArray[np.uint8]
Storage = Literal["F32", "F16", "BF16"]

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
SMALLEST_SCALE = np.float32(1e-7)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Hold a quantized matrix as it is stored. Scales and biases are float32 arrays with values of ``storage``."""

    bits: int
    group: int
    storage: Storage
    words: Words  # (O, W)
    scales: Float  # (O, G)
    biases: Float  # (O, G)

    @property
    def shape(self) -> tuple[int, int]:
        """Return (O, I), the shape of the matrix."""
        return self.words.shape[0], self.words.shape[1] * 32 // self.bits


def check_grid(bits: int, group: int, inputs: int) -> None:
    """Raise ValueError for bits or a group that MLX does not have, and for rows that groups do not fill."""
    if bits not in BITS:
        raise ValueError(f"bits is {bits}: allowed are {', '.join(map(str, BITS))}")
    if group not in GROUPS:
        raise ValueError(f"group is {group}: allowed are {', '.join(map(str, GROUPS))}")
    if inputs % group:
        raise ValueError(f"rows of {inputs} values cannot be cut into groups of {group}; leave this matrix in float")


def round_to(values: Float, storage: Storage) -> Float:
    """Round to the storage type, to nearest, ties to even; the result is float32 still."""
    if storage == "F16":
        return values.astype(np.float16).astype(np.float32)
    return from_bf16_bits(to_bf16_bits(values)) if storage == "BF16" else values


def grid(groups: Float, bits: int) -> tuple[Float, Float]:
    """Return scale and bias of groups (..., group) of values, both (..., 1) and not yet rounded to a storage type.

    Zero lies on the grid where it is in range. The scale is negative where the largest value has the larger magnitude.
    """
    steps = np.float32(2**bits - 1)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    low_side = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / steps, SMALLEST_SCALE)
    scale = np.where(low_side, scale, -scale)
    edge = np.where(low_side, low, high)
    zero = np.rint(edge / scale)
    on_grid = zero != 0
    scale = np.where(on_grid, edge / np.where(on_grid, zero, np.float32(1)), scale)
    return scale, np.where(on_grid, edge, np.float32(0))


def encode(values: Float, scale: Float, bias: Float, bits: int) -> Codes:
    """Return the nearest codes on a grid; half goes to even. Scale and bias broadcast against the values."""
    steps = np.rint((values - bias) / scale)
    return np.asarray(np.clip(steps, 0, 2**bits - 1), dtype=np.uint8)


def quantize(weight: Float, *, bits: int, group: int, storage: Storage) -> Packed:
    """Pack a matrix (O, I) with scales and biases of the storage type, whose values the weight must already have.

    Raises ValueError for a grid that does not exist, for rows that groups do not fill, and for values that are not
    finite.
    """
    rows, inputs = weight.shape
    check_grid(bits, group, inputs)
    if not np.isfinite(weight).all():
        raise ValueError("a matrix to quantize has NaN or infinite values")
    groups = np.asarray(weight, dtype=np.float32).reshape(rows, inputs // group, group)
    scale, bias = grid(groups, bits)
    codes = encode(groups, scale, bias, bits).reshape(rows, inputs)
    return Packed(
        bits=bits,
        group=group,
        storage=storage,
        words=pack(codes, bits),
        scales=round_to(scale[..., 0], storage),
        biases=round_to(bias[..., 0], storage),
    )


def dequantize(packed: Packed, storage: Storage) -> Float:
    """Return the values (O, I) that a product on packed weights sees: fp32(scale) * code + fp32(bias) [Q1.2].

    They are rounded to ``storage``. With half-precision scales the product is exact, so that fp32 values are the same
    with and without fused arithmetic.
    """
    scales, biases, codes = _spread(packed)
    return round_to(scales * codes + biases, storage)


def dequantize_stepwise(packed: Packed) -> Float:
    """Return the values of ``mx.dequantize`` on a CPU: product and sum are each rounded to the type of the scales."""
    scales, biases, codes = _spread(packed)
    return round_to(round_to(scales * codes, packed.storage) + biases, packed.storage)


def _spread(packed: Packed) -> tuple[Float, Float, Float]:
    """Return scale, bias and code of every value, (O, I) each."""
    codes = unpack(packed.words, packed.bits).astype(np.float32)
    return np.repeat(packed.scales, packed.group, -1), np.repeat(packed.biases, packed.group, -1), codes


def pack(codes: Codes, bits: int) -> Words:
    """Pack codes (O, I) into words (O, W): a row is one little-endian stream of bits, cut into words [Q1.3]."""
    stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little").reshape(len(codes), -1)
    words = np.packbits(stream, axis=-1, bitorder="little").view("<u4")
    return cast(Words, words.astype(np.uint32))


def unpack(words: Words, bits: int) -> Codes:
    """Unpack words (O, W) into codes (O, I), the inverse of ``pack``."""
    stream = np.unpackbits(np.ascontiguousarray(words, "<u4").view(np.uint8), axis=-1, bitorder="little")
    codes = np.packbits(stream.reshape(len(words), -1, bits), axis=-1, bitorder="little")
    return codes[..., 0]
