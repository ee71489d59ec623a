"""Train on one batch, for tests that ask whether a loss can be learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def learn(
    parameters: Iterable[nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> tuple[float, float]:
    """Return the loss at the first and at the last of some steps of AdamW.

    The rate falls to a hundredth: at a constant one the end depends on rounding, and so on the CPU.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=betas)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    values = []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay.step()
        values.append(float(value.detach()))
    return values[0], values[-1]
