"""Add discriminators to a decoder: whose turn a step is, and the terms of both sides [T1.3] and [T1.5]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sa3_mlx.common.schema import Config
from sa3_torch.train.run.settings import check

from .discriminators import (
    DiscriminatorsConfig,
    build,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
)
from .losses import Comparison


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(Config):
    """Weigh both terms of the generator; two weights of 0 leave the discriminators out."""

    weight: float
    feature_weight: float
    start_step: int  # of the generator's adversarial terms and of the discriminators
    discriminators: DiscriminatorsConfig

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "weight", "feature_weight", "start_step")

    @property
    def on(self) -> bool:
        """Return whether there are discriminators."""
        return self.weight > 0 or self.feature_weight > 0


class Adversary(nn.Module):
    """Hold the discriminators."""

    def __init__(self, config: AdversarialConfig, audio_channels: int, *, seed: int) -> None:
        super().__init__()
        self.config = config
        self.discriminators = build(config.discriminators, audio_channels, seed)

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights of what ``terms`` gives."""
        return {"adversarial": self.config.weight, "feature_matching": self.config.feature_weight}

    def reaches_generator(self, step: int) -> bool:
        """Return whether the generator has adversarial terms in a step."""
        return step >= self.config.start_step

    def is_trained(self, step: int) -> bool:
        """Return whether a step trains the discriminators: the odd ones do, once they reach the generator."""
        return step % 2 == 1 and self.reaches_generator(step)

    def terms(self, comparisons: Sequence[Comparison]) -> dict[str, Tensor]:
        """Return the raw terms of the generator, summed over comparisons by their share."""
        sums: dict[str, Tensor] = {}
        for compared in comparisons:
            with torch.no_grad():
                real = self.discriminators(compared.reference)
            fake = self.discriminators(compared.prediction)
            raw = {"adversarial": generator_loss(real, fake), "feature_matching": feature_matching_loss(real, fake)}
            for name, value in raw.items():
                sums[name] = sums.get(name, 0) + compared.share * value
        return sums

    def generator_term(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the raw adversarial term of the generator, for any number of items."""
        return generator_loss(self.discriminators(real), self.discriminators(fake))

    def loss(self, comparisons: Sequence[Comparison]) -> Tensor:
        """Return the loss of the discriminators, summed over comparisons by their share."""
        losses = [
            compared.share
            * discriminator_loss(
                self.discriminators(compared.reference), self.discriminators(compared.prediction.detach())
            )
            for compared in comparisons
        ]
        return torch.stack(losses).sum()
