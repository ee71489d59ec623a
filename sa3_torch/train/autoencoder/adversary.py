"""Discriminators beside a decoder: whose turn a step is, and the terms of both sides [T1.3] and [T1.5].

Shapes: B items of a slice, N audio samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sa3_mlx.common.schema import Config
from sa3_torch.train.run.parallel import BatchSlice, mean
from sa3_torch.train.run.random import Purpose, purpose_generator
from sa3_torch.train.run.settings import check

from .discriminators import (
    DiscriminatorsConfig,
    InputNoise,
    InputNoiseConfig,
    Judgement,
    build,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
)


@dataclass(frozen=True, kw_only=True)
class AdversarialConfig(Config):
    """A weight of 0 for both terms leaves the discriminators out."""

    weight: float
    feature_weight: float
    mode: Literal["full", "adv"]  # full: no discriminator before start_step; adv: trained, not yet heeded
    start_step: int
    noise: InputNoiseConfig
    discriminators: DiscriminatorsConfig

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "weight", "feature_weight", "start_step")

    @property
    def on(self) -> bool:
        return self.weight > 0 or self.feature_weight > 0


class Adversary(nn.Module):
    """The discriminators and the noise on their input; random numbers are those of the global batch of ``items``."""

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
        return {"adversarial": self.config.weight, "feature_matching": self.config.feature_weight}

    def heeded(self, step: int) -> bool:
        """Whether the generator has adversarial terms."""
        return step >= self.config.start_step

    def plays(self, step: int) -> bool:
        """Whether a step trains the discriminators: the odd ones."""
        return step % 2 == 1 and (self.config.mode == "adv" or self.heeded(step))

    def terms(self, real: Tensor, fake: Tensor, *, step: int, batch_slice: BatchSlice) -> dict[str, Tensor]:
        """Raw terms of the generator: (B, N, channels) each."""
        with torch.no_grad():
            judged = self._judge(real, Purpose.JUDGED_REAL, step, batch_slice)
        other = self._judge(fake, Purpose.JUDGED_FAKE, step, batch_slice)
        return {
            "adversarial": generator_loss(judged, other),
            "feature_matching": feature_matching_loss(judged, other),
        }

    def quiet_term(self, real: Tensor, fake: Tensor) -> Tensor:
        """The raw adversarial term of the generator without noise on the inputs, for any number of items."""
        return generator_loss(self.discriminators(real), self.discriminators(fake))

    def loss(self, real: Tensor, fake: Tensor, *, step: int, batch_slice: BatchSlice) -> Tensor:
        """That of the discriminators: (B, N, channels) each -> scalar."""
        return discriminator_loss(
            self._judge(real, Purpose.JUDGED_REAL, step, batch_slice),
            self._judge(fake.detach(), Purpose.JUDGED_FAKE, step, batch_slice),
        )

    def follow(self, loss: Tensor, *, batch_slice: BatchSlice, micro_batches: int) -> None:
        """After every loss of the discriminators; what is kept moves once per step, when all its slices are known."""
        self._found = [*(self._found if batch_slice.rank % micro_batches else []), loss.detach()]
        if len(self._found) == micro_batches:
            self.noise.follow(mean(torch.stack(self._found).mean()))

    def _judge(self, audio: Tensor, purpose: Purpose, step: int, batch_slice: BatchSlice) -> list[Judgement]:
        if self.config.noise.masked or self.config.noise.instance:
            random = purpose_generator(self.seed, purpose, step)
            noise = self.noise.draw((self.items, *audio.shape[1:]), random)[batch_slice.rows(self.items)]
            audio = self.noise(audio, noise.to(audio.device))
        judged: list[Judgement] = self.discriminators(audio)
        return judged
