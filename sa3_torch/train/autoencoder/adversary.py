"""Add discriminators to a decoder: whose turn a step is, and the terms of both sides [T1.3] and [T1.5].

Shapes: B items of a slice, N audio samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sa3_mlx.common.schema import Config
from sa3_torch.train.run.parallel import BatchSlice, mean
from sa3_torch.train.run.random import Purpose, purpose_generator
from sa3_torch.train.run.settings import check

from .discriminators import (
    DiscriminatorOutput,
    DiscriminatorsConfig,
    InputNoise,
    InputNoiseConfig,
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
    mode: Literal["full", "adv"]  # full: no discriminator before start_step; adv: trained before it
    start_step: int  # of the generator's adversarial terms
    noise: InputNoiseConfig
    discriminators: DiscriminatorsConfig

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "weight", "feature_weight", "start_step")

    @property
    def on(self) -> bool:
        """Return whether there are discriminators."""
        return self.weight > 0 or self.feature_weight > 0


class Adversary(nn.Module):
    """Hold the discriminators and the noise on their input; random numbers are those of the global batch of
    ``items``."""

    def __init__(
        self, config: AdversarialConfig, sample_rate: int, audio_channels: int, *, items: int, seed: int
    ) -> None:
        super().__init__()
        self.config, self.items, self.seed = config, items, seed
        self.discriminators = build(config.discriminators, sample_rate, audio_channels, seed)
        self.noise = InputNoise(config.noise, sample_rate)
        self._found: list[Tensor] = []  # losses of the micro-batches of this step

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights of what ``terms`` gives."""
        return {"adversarial": self.config.weight, "feature_matching": self.config.feature_weight}

    def reaches_generator(self, step: int) -> bool:
        """Return whether the generator has adversarial terms in a step."""
        return step >= self.config.start_step

    def is_trained(self, step: int) -> bool:
        """Return whether a step trains the discriminators: the odd ones do."""
        return step % 2 == 1 and (self.config.mode == "adv" or self.reaches_generator(step))

    def terms(self, comparisons: Sequence[Comparison], *, step: int, batch_slice: BatchSlice) -> dict[str, Tensor]:
        """Return the raw terms of the generator, summed over comparisons by their share."""
        sums: dict[str, Tensor] = {}
        for compared in comparisons:
            with torch.no_grad():
                real = self._judge(compared.reference, Purpose.JUDGED_REAL, step, batch_slice)
            fake = self._judge(compared.prediction, Purpose.JUDGED_FAKE, step, batch_slice)
            raw = {"adversarial": generator_loss(real, fake), "feature_matching": feature_matching_loss(real, fake)}
            for name, value in raw.items():
                sums[name] = sums.get(name, 0) + compared.share * value
        return sums

    def quiet_term(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return the raw adversarial term of the generator without noise on the inputs, for any number of items."""
        return generator_loss(self.discriminators(real), self.discriminators(fake))

    def loss(
        self, comparisons: Sequence[Comparison], *, step: int, batch_slice: BatchSlice, micro_batches: int
    ) -> Tensor:
        """Return the loss of the discriminators, summed over comparisons by their share; the noise follows its mean."""
        losses = [
            compared.share
            * discriminator_loss(
                self._judge(compared.reference, Purpose.JUDGED_REAL, step, batch_slice),
                self._judge(compared.prediction.detach(), Purpose.JUDGED_FAKE, step, batch_slice),
            )
            for compared in comparisons
        ]
        loss = torch.stack(losses).sum()
        self._follow(loss / sum(compared.share for compared in comparisons), batch_slice, micro_batches)
        return loss

    def _follow(self, loss: Tensor, batch_slice: BatchSlice, micro_batches: int) -> None:
        """Keep the loss of a slice; the mean that the noise depends on moves once per step, when all are known."""
        self._found = [*(self._found if batch_slice.rank % micro_batches else []), loss.detach()]
        if len(self._found) == micro_batches:
            self.noise.follow(mean(torch.stack(self._found).mean()))

    def _judge(self, audio: Tensor, purpose: Purpose, step: int, batch_slice: BatchSlice) -> list[DiscriminatorOutput]:
        """Run the discriminators on audio (B, N, channels), with the noise of its slice."""
        if self.config.noise.masked or self.config.noise.instance:
            random = purpose_generator(self.seed, purpose, step)
            noise = self.noise.draw((self.items, *audio.shape[1:]), random)[batch_slice.rows(self.items)]
            audio = self.noise(audio, noise.to(audio.device))
        outputs: list[DiscriminatorOutput] = self.discriminators(audio)
        return outputs
