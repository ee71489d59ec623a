"""Compare an own kernel with its plain form when it is first used, and leave it off where it disagrees."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from sa3_mlx.common.terminal import excerpt, one_line, say
from sa3_mlx.runtime import mx

Variant = TypeVar("Variant", bound=Hashable)
Computes = Callable[[Variant, list[mx.array]], list[mx.array]]
# Relative L2 of kernel and plain form. In 16 bits the plain form rounds more often than the kernel.
BOUNDS = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


@dataclass
class Checked(Generic[Variant]):
    """Hold a kernel and the plain form that defines its result; a variant is what the kernel is compiled for."""

    name: str
    kernel: Computes[Variant]
    plain: Computes[Variant]
    sample: Callable[[Variant], list[mx.array]]  # small inputs of a variant
    off: bool = False
    _agrees: set[Variant] = field(default_factory=set)

    def __call__(self, variant: Variant, arrays: list[mx.array]) -> list[mx.array] | None:
        """Return what the kernel makes of the arrays, or None where it is off: then the plain form has to."""
        if not self.off and variant not in self._agrees:
            problem = self._problem(variant)
            self.off = problem is not None
            if problem is not None:
                say(f"note: the Metal kernel {self.name} is off: it {problem}; MLX's own operations do its work")
            self._agrees.add(variant)
        return None if self.off else self.kernel(variant, arrays)

    def _problem(self, variant: Variant) -> str | None:
        arrays = self.sample(variant)
        try:
            found = self.kernel(variant, arrays)
            mx.eval(found)
        except (RuntimeError, ValueError) as error:
            return f"does not run here ({excerpt(one_line(str(error)), 80)})"
        wanted = self.plain(variant, arrays)
        errors = [_relative(*pair) / BOUNDS[pair[1].dtype] for pair in zip(found, wanted, strict=True)]
        return None if max(errors) < 1 else f"disagrees with its plain form ({max(errors):.1g} times what is allowed)"


def _relative(found: mx.array, wanted: mx.array) -> float:
    """Return the relative L2 error; infinite where the shape, the type or a number is wrong."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    a, b = (np.array(array.astype(mx.float32), np.float64) for array in (found, wanted))
    error = float(np.linalg.norm(a - b) / np.linalg.norm(b))
    return error if np.isfinite(error) else float("inf")


def normal(seed: int, dtype: mx.Dtype, *shape: int) -> mx.array:
    """Return normals for a sample; the generators of MLX and numpy stay where they are."""
    return mx.array(np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(dtype)
