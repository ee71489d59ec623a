"""Compute relativistic adversarial losses and feature matching, in fp32 [T1.5].

B batch. A ``DiscriminatorOutput`` is (logits (B, ...), features [(B, ...), ...]) of one discriminator; lists hold one
for each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .convolutional import DiscriminatorOutput


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def discriminator_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput]) -> Tensor:
    """Return mean softplus(-(D(x) - D(x_hat))), averaged over discriminators; ln 2 where they cannot tell."""
    return _mean([F.softplus(b.float() - a.float()).mean() for (a, _), (b, _) in zip(real, fake, strict=True)])


def generator_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput]) -> Tensor:
    """Return mean softplus(D(x) - D(x_hat)), averaged over discriminators."""
    return discriminator_loss(fake, real)


def feature_matching_loss(real: list[DiscriminatorOutput], fake: list[DiscriminatorOutput]) -> Tensor:
    """Return mean |f(x) - f(x_hat)| / (mean |f(x)| + 1e-3), averaged over layers, then discriminators.

    The means are those of each item, so that a batch in parts gives the mean of its parts. No gradient reaches f(x).
    """

    def layer(a: Tensor, b: Tensor) -> Tensor:
        a, b = a.detach().float().flatten(1), b.float().flatten(1)
        return ((a - b).abs().mean(1) / (a.abs().mean(1) + 1e-3)).mean()

    return _mean(
        [_mean([layer(a, b) for a, b in zip(f, g, strict=True)]) for (_, f), (_, g) in zip(real, fake, strict=True)]
    )
