"""Classifier-free guidance with adaptive projection (architecture spec, section 7).

Shapes: B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import blas  # noqa: F401 (before mlx)

# isort: split
import mlx.core as mx
import numpy as np

from .dit import Conditioning, DiT, Prepared
from .spec.request import Guidance


def project(difference: mx.array, reference: mx.array, valid: mx.array | None) -> tuple[mx.array, mx.array]:
    """Split (B, T, C) into the part parallel to ``reference`` and the rest, over valid frames jointly [B20]."""
    if valid is not None:
        difference, reference = difference * valid[..., None], reference * valid[..., None]
    unit = reference / mx.maximum(_norm(reference), 1e-8)
    parallel = (difference * unit).sum((1, 2), keepdims=True) * unit
    return parallel, difference - parallel


def _norm(x: mx.array) -> mx.array:
    return mx.sqrt(mx.square(x).sum((1, 2), keepdims=True))


def guide(
    x: mx.array, t: np.ndarray, v_cond: mx.array, v_null: mx.array, guidance: Guidance, valid: mx.array | None
) -> mx.array:
    """Combine both velocities: all (B, T, C), t (B,) in (0, 1], valid (B, T) bool or None -> (B, T, C) [B20, B21]."""
    time = mx.array(t, dtype=mx.float32)[:, None, None]
    dtype = v_cond.dtype
    x, v_cond, v_null = (array.astype(mx.float32) for array in (x, v_cond, v_null))
    denoised = x - time * v_cond
    difference = time * (v_null - v_cond)  # of both estimates, without the cancellation of x
    if guidance.norm_threshold > 0:
        size = _norm(difference if valid is None else difference * valid[..., None])
        difference = difference * mx.minimum(guidance.norm_threshold / mx.maximum(size, 1e-8), 1.0)
    if guidance.apg > 0:
        _, orthogonal = project(difference, denoised, valid)
        difference = guidance.apg * orthogonal + (1 - guidance.apg) * difference
    v = v_cond - (guidance.scale - 1) * difference / time
    if guidance.rescale > 0:
        ratio = mx.std(v_cond, axis=-1, keepdims=True, ddof=1) / mx.std(v, axis=-1, keepdims=True, ddof=1)
        v = guidance.rescale * v * ratio + (1 - guidance.rescale) * v
    return v.astype(dtype)


@dataclass(frozen=True, kw_only=True)
class GuidedVelocity:
    """velocity(x, t) with or without guidance; ``null`` is the unconditional or negative input [B18, B19]."""

    dit: DiT
    cond: Prepared
    null: Prepared | None
    guidance: Guidance

    def __call__(self, x: mx.array, t: np.ndarray) -> mx.array:
        """x (B, T, C), t (B,) fp32 -> (B, T, C). Every item's own t decides about the interval.

        In the official code the first item's decides for all [B18]; here no item depends on its batch (decision 2).
        """
        v = self.dit(x, t, self.cond)
        low, high = self.guidance.interval
        inside = (low <= t) & (t <= high)  # (B,)
        if self.null is None or self.guidance.scale == 1 or not inside.any():
            return v
        guided = guide(x, t, v, self.dit(x, t, self.null), self.guidance, self.cond.valid)
        return guided if inside.all() else mx.where(mx.array(inside)[:, None, None], guided, v)


def unconditional(cond: Conditioning) -> Conditioning:
    """Zeros in place of the context; the global duration is kept [B19]."""
    return Conditioning(context=mx.zeros_like(cond.context), seconds=cond.seconds, local=cond.local, valid=cond.valid)


def negative(cond: Conditioning, hidden: mx.array, mask: mx.array) -> Conditioning:
    """Negative prompt (B, S, D), mask (B, S): zeros, not the learned padding, at padded positions [B19]."""
    tokens = hidden.astype(cond.context.dtype) * mask[..., None]
    context = mx.concatenate([tokens, cond.context[:, -1:]], axis=1)
    return Conditioning(context=context, seconds=cond.seconds, local=cond.local, valid=cond.valid)
