"""Make the networks that shape latents terms of a stage: settings, random numbers, warm-up, all processes together.

Shapes: B items of a slice, N audio samples, T latent frames, C latent channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.flow.times import truncated_logit_normal
from sa3_torch.train.networks.init import seeded
from sa3_torch.train.run.parallel import BatchSlice, gather_rows, own_slice
from sa3_torch.train.run.random import Purpose, item_noise, item_uniforms
from sa3_torch.train.run.settings import check

from .alignment import Alignment, AlignmentConfig
from .captions import FrozenStates, WordStates
from .critic import Critic, CriticConfig
from .regressors import Regressors, RegressorsConfig


@dataclass(frozen=True, kw_only=True)
class SemanticsConfig(Config):
    """Weigh the terms on the latents; a weight of 0 leaves its network out."""

    detached_steps: int  # before their gradient reaches the latents
    least_rank: (
        float  # share of C below which the effective rank of held-out latents ends the run, once attached; 0 off
    )
    alignment_weight: float
    regressors_weight: float  # of all heads, beside their own weights
    critic_weight: float
    text_width: int
    text_encoder: str  # checkpoint folder whose frozen text encoder reads captions; "": word embeddings, trained
    alignment: AlignmentConfig
    regressors: RegressorsConfig
    critic: CriticConfig
    words: Literal["first", "music"] = "first"  # the set of sounds whose words are embedded

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "detached_steps", "alignment_weight", "regressors_weight", "critic_weight")
        check(self, 0, 1, "least_rank")
        check(self, 1, 1 << 16, "text_width")


class Semantics(nn.Module):
    """Hold the networks whose weight is not zero."""

    def __init__(self, config: SemanticsConfig, model: ModelConfig, *, items: int, samples: int, seed: int) -> None:
        """Build the networks for a global batch of ``items`` of ``samples``.

        Raises ConfigError for crops too short, ValueError where the critic has nothing to compare.
        """
        super().__init__()
        self.config, self.items, self.seed = config, items, seed
        channels = model.same.latent_channels
        with seeded(seed):
            if config.alignment_weight:
                self.alignment = Alignment(config.alignment, channels)
            if config.regressors_weight:
                if samples < config.regressors.size:
                    raise ConfigError(f"crop_samples is {samples}: regressors look at {config.regressors.size}")
                ratio = model.same.samples_per_latent
                self.regressors = Regressors(config.regressors, model.sample_rate, ratio, channels)
            if config.critic_weight:
                config.critic.shifts(items)
                self.words: WordStates | FrozenStates = (
                    FrozenStates(Path(config.text_encoder), config.text_width)
                    if config.text_encoder
                    else WordStates(config.text_width, config.words)
                )
                self.critic = Critic(config.critic, model.audio_channels, config.text_width, channels)

    def weights(self) -> dict[str, float]:
        """Return the weights of the terms that ``losses`` gives; what else it gives is a measure."""
        config = self.config
        found: dict[str, float] = {}
        if config.alignment_weight:
            found |= {name: config.alignment_weight * weight for name, weight in Alignment.weights.items()}
        if config.regressors_weight:
            found |= {name: config.regressors_weight * weight for name, weight in self.regressors.weights.items()}
        if config.critic_weight:
            found |= {name: config.critic_weight * weight for name, weight in Critic.weights.items()}
        return found

    def follow(self, std: Tensor) -> None:
        """Follow the standard deviation of the latents of all processes; once per step, before the losses."""
        if self.config.alignment_weight:
            self.alignment.follow(std)

    def losses(
        self, z: Tensor, audio: Tensor, captions: tuple[str, ...], *, step: int, batch_slice: BatchSlice
    ) -> dict[str, Tensor]:
        """Return raw terms and measures of the items of a slice: z (B, T, C), audio (B, N, channels), their
        captions."""
        config, detach = self.config, step < self.config.detached_steps
        found: dict[str, Tensor] = {}
        if config.alignment_weight:
            rows, shape = batch_slice.rows(self.items), tuple(z.shape[1:])
            t = truncated_logit_normal(item_uniforms(rows, 1, self.seed, Purpose.ALIGNMENT_TIMES, step)[:, 0])
            noise = item_noise(rows, shape, self.seed, Purpose.ALIGNMENT, step, z.device)
            found |= self.alignment.loss(z, t.to(z.device, non_blocking=True), noise, detach=detach)
        if config.regressors_weight:
            found |= self.regressors.loss(z, audio, detach=detach)
        if config.critic_weight:
            found |= self._criticism(z, audio, captions, step=step, detach=detach)
        return found

    def _criticism(
        self, z: Tensor, audio: Tensor, captions: tuple[str, ...], *, step: int, detach: bool
    ) -> dict[str, Tensor]:
        """Compare the items of all processes by the critic."""
        ids, mask = (gather_rows(x.to(z.device)) for x in self.words.encode(captions))
        z, audio = gather_rows(z), gather_rows(audio)
        corruptions = self.critic.draw(len(z), audio.shape[1], z.shape[1], self.seed, step)
        same = torch.unique(ids, dim=0, return_inverse=True)[1]  # (items,), equal for equal captions
        return self.critic.loss(
            audio, self.words(ids, mask), mask, z, same, corruptions, rows=own_slice().rows(len(z)), detach=detach
        )
