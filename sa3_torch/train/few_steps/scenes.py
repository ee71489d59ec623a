"""Draw what a step of adversarial post-training needs, but for the noise [T7.2].

Shapes: B items of a slice of the batch, S text tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.flow.latent_data import LatentData
from sa3_torch.train.flow.masks import Masks
from sa3_torch.train.run.feed import BatchFeed
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.random import Purpose, item_uniforms, purpose_generator

from .arc_losses import other_prompts
from .noise_levels import draw_levels

if TYPE_CHECKING:
    from .posttrain import PosttrainConfig


@dataclass(frozen=True, kw_only=True)
class SceneDraw:
    """Hold what is drawn for a slice of the batch, but for the noise."""

    batch: LatentBatch
    masks: Masks
    t: Tensor  # (B,) of the generator's input
    t_discriminator: Tensor  # (B,) of the discriminator's
    t_clap: Tensor  # (B,) of the CLAP's
    own: Tensor  # (B,) bool, whose input is made of an own sample
    other_ids: Tensor  # (B, S) of the prompt that an item gets in the contrastive term
    other_mask: Tensor  # (B, S)
    usable: Tensor  # (B,) bool, that it is another one
    usable_in_all: int  # items of the whole batch

    def to(self, device: torch.device) -> SceneDraw:
        """Send what networks read."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, batch=self.batch.to(device), **moved)


class SceneData:
    """Draw the slices of a step, from training clips. ``feed`` reads them ahead."""

    def __init__(self, config: PosttrainConfig, data: LatentData) -> None:
        self.config, self.data = config, data
        self.feed = BatchFeed(self.read)
        self._others = lru_cache(2)(self._draw_others)  # of the whole batch, for all its slices

    def read(self, step: int, part: BatchSlice) -> SceneDraw:
        """Read the clips of a slice and draw all numbers of its items but the noise, on the CPU."""
        config, train, rows = self.config, self.config.train, part.rows(self.config.train.batch)
        batch, shift = self.data.train.batch(step, rows), (config.shift_min_frames, config.shift_max_frames)
        u, lengths = item_uniforms(rows, 6, train.seed, Purpose.NOISE_LEVELS, step), batch.valid.sum(1)
        others, usable = self._others(step)
        texts = self.data.train.plan(step).texts
        ids, mask = self.data.train.texts([texts[i] for i in others[rows].tolist()])
        return SceneDraw(
            batch=batch,
            masks=self.data.masks(batch, rows, step),
            t=draw_levels(config.generator_noise, lengths, shift, u[:, 0:2]),
            t_discriminator=draw_levels(config.discriminator_noise, lengths, shift, u[:, 2:4]),
            t_clap=config.clap_max_noise * u[:, 4].float(),
            own=u[:, 5] < config.own_sample_share,
            other_ids=ids,
            other_mask=mask,
            usable=usable[rows],
            usable_in_all=int(usable.sum()),
        )

    def _draw_others(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw whose prompt each item of the whole batch gets, and whether it is another one: (batch,) each."""
        plan, random = (
            self.data.train.plan(step),
            purpose_generator(self.config.train.seed, Purpose.OTHER_PROMPTS, step),
        )
        others, usable = other_prompts([item.captions[0] for item in plan.items], random)
        ids, _ = self.data.train.texts(plan.texts)
        return others, usable & (ids != ids[others]).any(1)  # equal to the text encoder, however they are written
