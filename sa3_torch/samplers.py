"""Sample step by step: samplers are generators [A9].

A new one is a generator here and in the twin, and a line of SAMPLERS.

Shapes: B batch, T latent frames, C latent channels. Each takes ``velocity(x, t)``, the start x (B, T, C), the schedule
(B, steps + 1) fp32 on the host, and ``noise(k)``, the standard normals of step k (only pingpong asks for them). Each
yields one Step per step; nothing is computed for a step before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Velocity = Callable[[Tensor, np.ndarray], Tensor]
Noise = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Hold what step ``index`` made: ``denoised``, the estimate at its start, D = x - t v, and the next state ``x``."""

    index: int
    denoised: Tensor
    x: Tensor


def _column(values: np.ndarray, x: Tensor) -> Tensor:
    """Return (B, 1, 1) of (B,) in the dtype and on the device of x."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(x.device, x.dtype)[:, None, None]


def euler(velocity: Velocity, x: Tensor, sigmas: np.ndarray, noise: Noise) -> Iterator[Step]:
    """Step to x + (t' - t) v [B27]."""
    for k in range(sigmas.shape[1] - 1):
        t, t_next = sigmas[:, k], sigmas[:, k + 1]
        v = velocity(x, t)
        denoised, x = x - _column(t, x) * v, x + _column(t_next - t, x) * v
        yield Step(index=k, denoised=denoised, x=x)


def pingpong(velocity: Velocity, x: Tensor, sigmas: np.ndarray, noise: Noise) -> Iterator[Step]:
    """Step to (1 - t') D + t' eps with fresh eps every step; none is drawn where t' is 0 for all [B27]."""
    for k in range(sigmas.shape[1] - 1):
        t, t_next = sigmas[:, k], sigmas[:, k + 1]
        denoised = x - _column(t, x) * velocity(x, t)
        x = denoised
        if t_next.any():
            x = _column(1 - t_next, x) * denoised + _column(t_next, x) * noise(k)
        yield Step(index=k, denoised=denoised, x=x)


def _log_snr(t: np.ndarray) -> np.ndarray:
    t = t.astype(np.float64)
    return np.log(np.maximum(1 - t, 1e-10) / np.maximum(t, 1e-10))


def dpmpp(velocity: Velocity, x: Tensor, sigmas: np.ndarray, noise: Noise) -> Iterator[Step]:
    """Step by DPM-Solver++, second order, multistep; first order in the first step and where t' = 0 [B28]."""
    previous = None
    for k in range(sigmas.shape[1] - 1):
        t, t_next = sigmas[:, k].astype(np.float64), sigmas[:, k + 1].astype(np.float64)
        denoised = x - _column(sigmas[:, k], x) * velocity(x, sigmas[:, k])
        target = denoised
        if previous is not None and t_next.any():
            h = _log_snr(t_next) - _log_snr(t)
            r = (_log_snr(t) - _log_snr(sigmas[:, k - 1])) / h
            second = np.where(t_next > 0, 1 / (2 * r), 0.0)
            target = _column(1 + second, x) * denoised - _column(second, x) * previous
        step = (t_next - t) / (np.maximum(1 - t_next, 1e-10) * np.maximum(t, 1e-10))
        x = _column(t_next / np.maximum(t, 1e-10), x) * x - _column((1 - t_next) * step, x) * target
        previous = denoised
        yield Step(index=k, denoised=denoised, x=x)


def rk4(velocity: Velocity, x: Tensor, sigmas: np.ndarray, noise: Noise) -> Iterator[Step]:
    """Step by classic fourth order Runge-Kutta, the last slope at max(t', 1e-5); one schedule row per item [B29]."""
    for k in range(sigmas.shape[1] - 1):
        t, t_next = sigmas[:, k], sigmas[:, k + 1]
        middle, last = (t + t_next) / 2, np.maximum(t_next, np.float32(1e-5))
        h = _column(t_next - t, x)
        k1 = velocity(x, t)
        k2 = velocity(x + h / 2 * k1, middle)
        k3 = velocity(x + h / 2 * k2, middle)
        k4 = velocity(x + h * k3, last)
        denoised, x = x - _column(t, x) * k1, x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        yield Step(index=k, denoised=denoised, x=x)


Sampler = Callable[[Velocity, Tensor, np.ndarray, Noise], Iterator[Step]]
SAMPLERS: dict[str, Sampler] = {"euler": euler, "pingpong": pingpong, "dpmpp": dpmpp, "rk4": rk4}
