"""The path between data and noise [T0.2]: t = 0 is data, t = 1 noise."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Array = TypeVar("Array", Tensor, NDArray[np.float32], NDArray[np.float64])


def interpolate(z: Array, noise: Array, t: Array | float) -> Array:
    """Return x_t = (1 - t) z + t noise: data and noise (B, ...) with a time (B,) each, or of any shape with one for
    all."""
    if not isinstance(t, float):
        t = t.reshape(-1, *[1] * (z.ndim - 1))
    return (1 - t) * z + t * noise
