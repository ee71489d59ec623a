"""Quantize a matrix by GPTQ: column by column, while later columns make up for the error of earlier ones.

Written for every bit width of ``affine``; the result is an ordinary ``Packed`` matrix. Method: Frantar et al. 2022
(arXiv 2210.17323) with the grid of each group fixed when its first column is reached.

Shapes: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from .affine import Float, Packed, Storage, check_grid, encode, grid, pack, round_to

DAMPING = 0.01  # of the mean of the Hessian's diagonal
HESSIAN_BYTES = 2 << 30  # of one pass over the calibration states; more layers take more passes
Double = NDArray[np.float64]


def gptq(weight: Float, hessian: Double, *, bits: int, group: int, storage: Storage) -> Packed:
    """Pack weights (O, I) such that |x (W - Q)^T| is small; ``hessian`` (I, I) is the sum of x x^T over the layer's
    inputs.

    Raises ValueError for a grid that does not fit, and for a Hessian of another size or with values not finite.
    """
    return compensate(weight, hessian, bits=bits, group=group, storage=storage)[0]


def compensate(weight: Float, hessian: Double, *, bits: int, group: int, storage: Storage) -> tuple[Packed, Float]:
    """Return what ``gptq`` does and the values (O, I) that were rounded: the weights with what made up for errors."""
    rows, inputs = weight.shape
    check_grid(bits, group, inputs)
    if hessian.shape != (inputs, inputs) or not np.isfinite(hessian).all():
        raise ValueError(f"the Hessian of a layer with {inputs} inputs must be finite and square of that size")
    spread = _spreading(hessian)
    left = np.array(weight, dtype=np.float64)  # what is still to be quantized, with the errors so far spread over it
    codes = np.empty((rows, inputs), np.uint8)
    scales = np.empty((rows, inputs // group), np.float32)
    biases = np.empty_like(scales)
    for number, start in enumerate(range(0, inputs, group)):
        stop = start + group
        scale, bias = (round_to(a, storage) for a in grid(left[:, start:stop].astype(np.float32), bits))
        scales[:, number], biases[:, number] = scale[:, 0], bias[:, 0]
        errors = np.empty((rows, group))
        for k in range(start, stop):
            column = left[:, k : k + 1].astype(np.float32)
            code = encode(column, scale, bias, bits)
            codes[:, k] = code[:, 0]
            errors[:, k - start] = (left[:, k] - (scale * code + bias)[:, 0]) / spread[k, k]
            left[:, k + 1 : stop] -= errors[:, k - start, None] * spread[k, k + 1 : stop]
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    packed = Packed(bits=bits, group=group, storage=storage, words=pack(codes, bits), scales=scales, biases=biases)
    return packed, left.astype(np.float32)


def _spreading(hessian: Double) -> Double:
    """Return the upper Cholesky factor of the inverse; inputs that were always zero get a unit diagonal."""
    damped = np.array(hessian, dtype=np.float64)
    diagonal = np.einsum("ii->i", damped)
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return np.asarray(np.linalg.cholesky(np.linalg.inv(damped)).T)


def passes(inputs: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield layers, given with their number of inputs, in groups whose fp32 Hessians fit HESSIAN_BYTES."""
    group: list[str] = []
    size = 0
    for path, count in inputs.items():
        cost = 4 * count**2
        if group and size + cost > HESSIAN_BYTES:
            yield group
            group, size = [], 0
        group.append(path)
        size += cost
    if group:
        yield group
