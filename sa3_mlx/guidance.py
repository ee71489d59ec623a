"""Guide without a classifier, with adaptive projection [A7].

Shapes: B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.model.sampling import Guidance
from sa3_mlx.runtime import mx

from .dit import DiT, Prepared, join
from .layers import compiled

ModulatedVelocity = Callable[[mx.array, mx.array], mx.array]  # (B, T, C), (B, 6 D) -> (B, T, C)


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
    """Return velocity(x, t) with or without guidance; ``null`` is the unconditional or negative input [B18, B19].

    ``times`` (steps, B): times that will come, whose modulations are made as one batch; others are allowed.
    """

    dit: DiT
    cond: Prepared
    null: Prepared | None
    guidance: Guidance
    times: np.ndarray | None = None

    @cached_property
    def _both(self) -> Prepared:
        assert self.null is not None
        return join(self.cond, self.null)

    @cached_property
    def _one_step(self) -> ModulatedVelocity:
        return self._compiled(self.cond)

    @cached_property
    def _guided_step(self) -> ModulatedVelocity:
        return self._compiled(self._both)

    def _compiled(self, prepared: Prepared) -> ModulatedVelocity:
        dit = self.dit  # not self, which keeps the result: memory would wait for the garbage collector

        def velocity(x: mx.array, modulation: mx.array) -> mx.array:
            return dit.velocity(x, modulation, prepared)

        mx.eval(dit.parameters(), _arrays(prepared))  # or a compiled graph would compute them at every call
        return velocity if dit.streamed else compiled(velocity, "compiled_step")

    @cached_property
    def _known(self) -> dict[bytes, mx.array]:
        """Return modulations (B, 6 D) by the bytes of t."""
        if self.times is None:
            return {}
        steps, batch = self.times.shape
        seconds = mx.tile(self.cond.seconds, (steps, 1))
        rows = self.dit.modulation(self.times.reshape(-1), seconds).reshape(steps, batch, -1)
        return {t.tobytes(): rows[k] for k, t in enumerate(self.times)}

    def _modulation(self, t: np.ndarray) -> mx.array:
        known = self._known.get(t.tobytes())
        return self.dit.modulation(t, self.cond.seconds) if known is None else known

    def __call__(self, x: mx.array, t: np.ndarray) -> mx.array:
        """Return (B, T, C) for x (B, T, C), t (B,) fp32. Every item's own t decides about the interval.

        In the official code the first item's decides for all [B18]; here no item depends on its batch [A15.2].
        """
        modulation = self._modulation(t)
        low, high = self.guidance.interval
        inside = (low <= t) & (t <= high)  # (B,)
        if self.null is None or self.guidance.scale == 1 or not inside.any():
            return self._one_step(x, modulation)
        twice = mx.concatenate([modulation, modulation])
        v_cond, v_null = self._guided_step(mx.concatenate([x, x]), twice).split(2)
        guided = guide(x, t, v_cond, v_null, self.guidance, self.cond.valid)
        return guided if inside.all() else mx.where(mx.array(inside)[:, None, None], guided, v_cond)


def _arrays(prepared: Prepared) -> list[mx.array | None]:
    contexts = [array for c in prepared.contexts if c is not None for array in (c.keys, c.values, c.bias)]
    return [*contexts, *prepared.local, prepared.seconds, prepared.valid]


def negative(cond: Conditioning[mx.array], hidden: mx.array, mask: mx.array) -> Conditioning[mx.array]:
    """Return the input of a negative prompt (B, S, D), mask (B, S): zeros, not the learned vector, at padding [B19].

    The duration token is that of ``cond``; ``repeats`` is left None.
    """
    assert cond.context is not None
    tokens = hidden.astype(cond.context.dtype) * mask[..., None]
    return replace(cond, context=mx.concatenate([tokens, cond.context[:, -1:]], axis=1), repeats=None)
