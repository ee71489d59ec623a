"""Guide without a classifier, with adaptive projection [A7].

Shapes: B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.model.sampling import Guidance

from .cuda.transfer import upload
from .dit import DiT, Prepared, join
from .layers import graphed


def project(difference: Tensor, reference: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Split (B, T, C) into the part parallel to ``reference`` and the rest, over valid frames jointly [B20]."""
    if valid is not None:
        difference, reference = difference * valid[..., None], reference * valid[..., None]
    unit = reference / _norm(reference).clamp_min(1e-8)
    parallel = (difference * unit).sum((1, 2), keepdim=True) * unit
    return parallel, difference - parallel


def _norm(x: Tensor) -> Tensor:
    return x.square().sum((1, 2), keepdim=True).sqrt()


def guide(x: Tensor, t: Tensor, v_cond: Tensor, v_null: Tensor, guidance: Guidance, valid: Tensor | None) -> Tensor:
    """Combine both velocities: all (B, T, C), t (B,) in (0, 1], valid (B, T) bool or None -> (B, T, C) [B20, B21]."""
    t = t.float()[:, None, None]
    x, v_cond, v_null, dtype = x.float(), v_cond.float(), v_null.float(), v_cond.dtype
    denoised = x - t * v_cond
    difference = t * (v_null - v_cond)  # of both estimates, without the cancellation of x
    if guidance.norm_threshold > 0:
        size = _norm(difference if valid is None else difference * valid[..., None])
        difference = difference * (guidance.norm_threshold / size.clamp_min(1e-8)).clamp_max(1.0)
    if guidance.apg > 0:
        _, orthogonal = project(difference, denoised, valid)
        difference = guidance.apg * orthogonal + (1 - guidance.apg) * difference
    v = v_cond - (guidance.scale - 1) * difference / t
    if guidance.rescale > 0:
        v = guidance.rescale * v * v_cond.std(-1, keepdim=True) / v.std(-1, keepdim=True) + (1 - guidance.rescale) * v
    return v.to(dtype)


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

    def _run(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Return the result of a function that reads these inputs and the network."""
        return function(*inputs) if self.dit.streamed else graphed(self.dit, function, *inputs)

    def _guided(
        self, x: Tensor, t: Tensor, modulation: Tensor, both: Prepared, guidance: Guidance, valid: Tensor | None
    ) -> Tensor:
        """Return the guided velocity, what is combined included: one graph of kernels a step."""
        v_cond, v_null = self._pair(x, modulation, both)
        return guide(x, t, v_cond, v_null, guidance, valid)

    def _pair(self, x: Tensor, modulation: Tensor, both: Prepared) -> tuple[Tensor, Tensor]:
        v_cond, v_null = self.dit.velocity(torch.cat([x, x]), torch.cat([modulation, modulation]), both).chunk(2)
        return v_cond, v_null

    @cached_property
    def _known(self) -> dict[bytes, tuple[Tensor, Tensor]]:
        """Return t (B,) on the device and modulations (B, 6 D) by the bytes of t."""
        if self.times is None:
            return {}
        steps, batch = self.times.shape
        seconds, times = self.cond.seconds.repeat(steps, 1), self._tensor(self.times)
        rows = self.dit.modulation(times.reshape(-1), seconds).reshape(steps, batch, -1)
        return {t.tobytes(): (times[k], rows[k]) for k, t in enumerate(self.times)}

    def _at(self, t: np.ndarray) -> tuple[Tensor, Tensor]:
        known = self._known.get(t.tobytes())
        if known is None:
            time = self._tensor(t)
            return time, self.dit.modulation(time, self.cond.seconds)
        return known

    def _tensor(self, values: np.ndarray) -> Tensor:
        return upload(values, self.cond.seconds.device)

    def __call__(self, x: Tensor, t: np.ndarray) -> Tensor:
        """Return (B, T, C) for x (B, T, C), t (B,) fp32. Every item's own t decides about the interval.

        In the official code the first item's decides for all [B18]; here no item depends on its batch [A15.2].
        """
        time, modulation = self._at(t)
        low, high = self.guidance.interval
        inside = (low <= t) & (t <= high)  # (B,)
        if self.null is None or self.guidance.scale == 1 or not inside.any():
            return self._run(self.dit.velocity, x, modulation, self.cond)
        given = self.guidance, self.cond.valid
        if inside.all():
            return self._run(self._guided, x, time, modulation, self._both, *given)
        v_cond, v_null = self._pair(x, modulation, self._both)
        return torch.where(self._tensor(inside)[:, None, None], guide(x, time, v_cond, v_null, *given), v_cond)


def negative(cond: Conditioning[Tensor], hidden: Tensor, mask: Tensor) -> Conditioning[Tensor]:
    """Return the input of a negative prompt (B, S, D), mask (B, S): zeros, not the learned vector, at padding [B19].

    The duration token is that of ``cond``; ``repeats`` is left None.
    """
    assert cond.context is not None
    tokens = hidden.to(cond.context.dtype) * mask[..., None]
    return replace(cond, context=torch.cat([tokens, cond.context[:, -1:]], dim=1), repeats=None)
