"""Losses of adversarial post-training as pure functions in fp32 [T7.2].

Shapes: B batch, T latent frames, C latent channels, N positions of scores, E size of CLAP vectors. Maps of scores are
(B, N) with a mask (B, N).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of every item over valid positions: (B, N), (B, N) bool -> (B,). Other values do not matter."""
    return torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp_min(1)


def relativistic(better: Tensor, worse: Tensor, mask: Tensor) -> Tensor:
    """Return softplus(worse - better) of every item: small where ``better`` has the higher scores, ln 2 where equal."""
    return masked_mean(F.softplus(worse - better), mask)


def mean_of_usable(losses: Tensor, usable: Tensor, total: int, parts: int) -> Tensor:
    """Return the mean of losses (B,) over usable items: 0 without a gradient where the whole batch has none.

    ``total`` usable items are in all ``parts`` of the batch, whose results are averaged.
    """
    return torch.where(usable, losses, 0.0).sum() * parts / max(total, 1)


def finite_difference(scores: Tensor, moved: Tensor, mask: Tensor) -> Tensor:
    """Return the squared change of the scores of every item under a small step of its input: (B,)."""
    return masked_mean((moved - scores).square(), mask)


def geodesic(a: Tensor, u: Tensor) -> Tensor:
    """Return 2 arcsin^2(|a - u| / 2) of unit vectors (B, E): (B,), 0 where equal, pi^2 / 8 at right angles.

    The slope is infinite at opposite vectors; the argument stays below 1 - 1e-6.
    """
    distance = (a.float() - u.float()).square().sum(1).clamp_min(1e-12).sqrt()
    return 2 * torch.arcsin((distance / 2).clamp_max(1 - 1e-6)).square()


def other_prompts(captions: Sequence[str], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw for every item another whose prompt it gets: order (B,), a permutation, and which are usable (B,) bool.

    Items are sorted by caption in random order, then moved on by the size of the largest group: nobody gets an equal
    caption unless one fills more than half of the batch; then as few as possible do, and are not usable.
    """
    count = len(captions)
    shuffled = torch.randperm(count, generator=generator).tolist()
    first = {captions[i]: place for place, i in reversed(list(enumerate(shuffled)))}
    ranked = sorted(shuffled, key=lambda i: first[captions[i]])  # equal captions side by side
    step = max(Counter(captions).values())
    order = torch.empty(count, dtype=torch.long)
    for place, i in enumerate(ranked):
        order[i] = ranked[(place + step) % count]
    usable = torch.tensor([captions[i] != captions[j] for i, j in enumerate(order.tolist())])
    return order, usable
