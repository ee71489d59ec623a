"""Make noise schedules: t from 1 (noise) to 0 (data), one row per item [B22-B25].

Computed in float64 and rounded to float32 once. B batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.model.config import ShiftConfig
from sa3_mlx.common.model.dial import Schedule

Float64Array = NDArray[np.float64]

LOGSNR_FRAMES = 2000  # length at which the anchor log-SNR holds [B24]
_MIN_FRAMES, _MAX_FRAMES = 256, 4096  # lengths between which full and flux interpolate [B24]


def sigmas(
    shift: ShiftConfig,
    steps: int,
    sigma_max: float | Sequence[float],
    lengths: Sequence[int],
    *,
    schedule: Schedule = "official",
) -> NDArray[np.float32]:
    """Return the times of every step (B, steps + 1) float32, first sigma_max, last 0.

    ``lengths``: effective frames of each item (B,). ``sigma_max`` in (0, 1]: one level, or one per item.

    "official" is linspace from sigma_max to 0, warped, and the first entry overwritten with sigma_max [B22]. With
    sigma_max < 1 the warp lifts the second entry above the first, so the sampler adds noise again above the chosen
    level [B23]. "normalized" is linspace from 1 to 0, warped, times sigma_max: it keeps the proportions of the steps
    and only descends. "monotone" cuts the warped schedule at sigma_max: linspace over warp^-1(sigma_max) .. 0, which
    only descends too. A level below twice the smallest one that the warp can give (log-SNR ends at 0.119 before it
    jumps to 0) leaves nothing to cut, and so does a warp that rises: there "monotone" divides sigma_max linearly.

    Raises ValueError for no steps, no items and a sigma_max outside (0, 1].
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least 1 is needed")
    if not len(lengths):
        raise ValueError("lengths is empty: one effective length per item is needed")
    levels = np.asarray(sigma_max, dtype=np.float64)
    if not ((levels > 0) & (levels <= 1)).all():
        raise ValueError(f"sigma_max is {sigma_max}: allowed is above 0 and up to 1")
    top = np.broadcast_to(levels, (len(lengths),))[:, None]  # (B, 1)
    frames = np.maximum(np.asarray(lengths, dtype=np.float64), 1)[:, None]  # (B, 1)
    ramp = np.linspace(1.0, 0.0, steps + 1)[None, :]  # (1, steps + 1)
    if schedule == "monotone":
        warped = _cut(shift, ramp, top, frames)
    else:
        warped = _warp(shift, top * ramp, frames) if schedule == "official" else top * _warp(shift, ramp, frames)
    warped[:, :1] = top
    warped[:, -1] = 0.0
    return warped.astype(np.float32)


def _cut(shift: ShiftConfig, ramp: Float64Array, top: Float64Array, frames: Float64Array) -> Float64Array:
    tiny = np.full_like(top, np.finfo(np.float64).tiny)
    reachable = top >= 2 * _warp(shift, tiny, frames)  # (B, 1)
    if shift.type == "logsnr":  # with a rate, clips of under about 7 frames turn the warp around
        reachable &= _logsnr_start(shift, frames) < shift.end
    start = np.clip(_unwarp(shift, top, frames), 0.0, 1.0)
    return np.where(reachable, _warp(shift, start * ramp, frames), top * ramp)


def _warp(shift: ShiftConfig, t: Float64Array, frames: Float64Array) -> Float64Array:
    """Warp t (B, N) or (1, N) for frames (B, 1) -> (B, N) [B24]."""
    t = np.broadcast_to(t, (frames.shape[0], t.shape[1]))
    if shift.type == "logsnr":
        end = shift.end
        warped = _sigmoid(t * (end - _logsnr_start(shift, frames)) - end)
        return np.where(t <= 0, 0.0, np.where(t >= 1, 1.0, warped))
    alpha = _alpha(shift, frames)
    warped = alpha * t / (1 + (alpha - 1) * t)
    if shift.type == "full" and shift.rate:
        warped = np.sin(np.pi * warped / 2)
    return warped


def _unwarp(shift: ShiftConfig, sigma: Float64Array, frames: Float64Array) -> Float64Array:
    """Invert ``_warp`` for levels inside its range; outside it may leave 0..1."""
    if shift.type == "logsnr":
        with np.errstate(divide="ignore"):
            logit = np.log(sigma) - np.log1p(-sigma)
        unwarped: Float64Array = (logit + shift.end) / (shift.end - _logsnr_start(shift, frames))
        return unwarped
    if shift.type == "full" and shift.rate:
        sigma = np.arcsin(sigma) * 2 / np.pi
    alpha = _alpha(shift, frames)
    return sigma / (alpha - (alpha - 1) * sigma)


def _logsnr_start(shift: ShiftConfig, frames: Float64Array) -> Float64Array:
    return shift.start - shift.rate * np.log2(frames / LOGSNR_FRAMES)


def _alpha(shift: ShiftConfig, frames: Float64Array) -> Float64Array:
    """Return alpha: full, flux and none are all alpha t / (1 + (alpha - 1) t); 'full' writes it as exp(-mu)."""
    if shift.type == "none":
        return np.ones_like(frames)
    clamped = np.clip(frames, _MIN_FRAMES, _MAX_FRAMES)
    if shift.type == "full":
        low, high, position = shift.start, shift.end, (clamped - _MIN_FRAMES) / (_MAX_FRAMES - _MIN_FRAMES)
    else:
        low, high = math.log(shift.start), math.log(shift.end)
        position = np.log(clamped / _MIN_FRAMES) / math.log(_MAX_FRAMES / _MIN_FRAMES)
    with np.errstate(over="ignore"):
        alpha: Float64Array = np.exp(low + (high - low) * position)
    return alpha


def _sigmoid(x: Float64Array) -> Float64Array:
    with np.errstate(over="ignore"):  # to 0
        result: Float64Array = 1 / (1 + np.exp(-x))
    return result
