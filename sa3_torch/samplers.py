"""Sample step by step: samplers are generators [A9].

A new one is a generator here and in the twin, and a line of SAMPLERS.

Shapes: B batch, T latent frames, C latent channels. Each takes ``velocity(x, t)``, the start x (B, T, C), the schedule
(B, steps + 1) fp32 on the host, and ``noise(k)``, the standard normals of step k (only pingpong asks for them). Each
yields one Step per step; nothing is computed for a step before it is asked for. Coefficients of all steps are on the
device before the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .cuda.transfer import upload

Velocity = Callable[[Tensor, np.ndarray], Tensor]
Noise = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Hold what step ``index`` made: ``denoised``, the estimate at its start, D = x - t v, and the next state ``x``."""

    index: int
    denoised: Tensor
    x: Tensor


def _columns(values: np.ndarray, x: Tensor) -> Tensor:
    """Return (steps, B, 1, 1) of (B, steps), in the dtype and on the device of x: one copy before the first step."""
    return upload(values.T.astype(np.float32), x.device).to(x.dtype)[..., None, None]


def euler(velocity: Velocity, x: Tensor, sigmas: np.ndarray, noise: Noise) -> Iterator[Step]:
    """Step to x + (t' - t) v [B27]."""
    times, changes = _columns(sigmas[:, :-1], x), _columns(np.diff(sigmas), x)
    for k, (t, change) in enumerate(zip(times, changes, strict=True)):
        v = velocity(x, sigmas[:, k])
        denoised, x = x - t * v, x + change * v
        yield Step(index=k, denoised=denoised, x=x)


def pingpong(velocity: Velocity, x: Tensor, sigmas: np.ndarray, noise: Noise) -> Iterator[Step]:
    """Step to (1 - t') D + t' eps with fresh eps every step; none is drawn where t' is 0 for all [B27]."""
    times, kept, added = (_columns(values, x) for values in (sigmas[:, :-1], 1 - sigmas[:, 1:], sigmas[:, 1:]))
    for k in range(sigmas.shape[1] - 1):
        denoised = x - times[k] * velocity(x, sigmas[:, k])
        x = denoised
        if sigmas[:, k + 1].any():
            x = kept[k] * denoised + added[k] * noise(k)
        yield Step(index=k, denoised=denoised, x=x)


def _log_snr(t: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(1 - t, 1e-10) / np.maximum(t, 1e-10))


def dpmpp(velocity: Velocity, x: Tensor, sigmas: np.ndarray, noise: Noise) -> Iterator[Step]:
    """Step by DPM-Solver++, second order, multistep; first order in the first step and where t' = 0 [B28]."""
    t, t_next = sigmas[:, :-1].astype(np.float64), sigmas[:, 1:].astype(np.float64)  # (B, steps)
    floor = np.maximum(t, 1e-10)
    step = (t_next - t) / (np.maximum(1 - t_next, 1e-10) * floor)
    second = np.zeros_like(t)  # the weight of the slope between the last two estimates
    h = _log_snr(t_next) - _log_snr(t)
    r = h[:, :-1] / h[:, 1:]
    second[:, 1:] = np.where(t_next[:, 1:] > 0, 1 / (2 * r), 0.0)
    times, kept, added = (_columns(values, x) for values in (sigmas[:, :-1], t_next / floor, (1 - t_next) * step))
    first, last = _columns(1 + second, x), _columns(second, x)
    previous = None
    for k in range(sigmas.shape[1] - 1):
        denoised = x - times[k] * velocity(x, sigmas[:, k])
        target = denoised
        if previous is not None and t_next[:, k].any():
            target = first[k] * denoised - last[k] * previous
        x = kept[k] * x - added[k] * target
        previous = denoised
        yield Step(index=k, denoised=denoised, x=x)


def rk4(velocity: Velocity, x: Tensor, sigmas: np.ndarray, noise: Noise) -> Iterator[Step]:
    """Step by classic fourth order Runge-Kutta, the last slope at max(t', 1e-5); one schedule row per item [B29]."""
    change = np.diff(sigmas)
    times, whole, half, sixth = (_columns(values, x) for values in (sigmas[:, :-1], change, change / 2, change / 6))
    for k, (t, h) in enumerate(zip(times, whole, strict=True)):
        middle, last = (sigmas[:, k] + sigmas[:, k + 1]) / 2, np.maximum(sigmas[:, k + 1], np.float32(1e-5))
        k1 = velocity(x, sigmas[:, k])
        k2 = velocity(x + half[k] * k1, middle)
        k3 = velocity(x + half[k] * k2, middle)
        k4 = velocity(x + h * k3, last)
        denoised, x = x - t * k1, x + sixth[k] * (k1 + 2 * k2 + 2 * k3 + k4)
        yield Step(index=k, denoised=denoised, x=x)


Sampler = Callable[[Velocity, Tensor, np.ndarray, Noise], Iterator[Step]]
SAMPLERS: dict[str, Sampler] = {"euler": euler, "pingpong": pingpong, "dpmpp": dpmpp, "rk4": rk4}
