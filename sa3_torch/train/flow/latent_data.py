"""The latents that a diffusion model is trained and measured on.

Shapes: B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import Config, ConfigError, quoted
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_torch.train.data.batches import LatentBatch, LatentBatches, unknown_words
from sa3_torch.train.data.drawing import SharesConfig
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.run.random import Purpose, item_uniforms
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import Split, TrainConfig

from .masks import MASK_KINDS, MASK_NUMBERS, Masks, draw_masks
from .model import diffusion_of

FRAME_MULTIPLE = 8  # batches are padded to one


@dataclass(frozen=True, kw_only=True)
class ClipsConfig(Config):
    """Say which latents make a batch and which of their frames are to be generated."""

    silence_seconds: float  # mean of the exponential extension of every clip
    mask_shares: tuple[float, ...]  # segments, full, causal
    buckets: int  # of similar lengths
    shares: SharesConfig
    max_frames: int = 0  # of longer clips a random part of so many is taken; 0: as many as the model makes

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "silence_seconds")
        check(self, 1, math.inf, "buckets")
        check(self, 0, math.inf, "max_frames")
        if len(self.mask_shares) != len(MASK_KINDS) or min(self.mask_shares) < 0 or not sum(self.mask_shares):
            raise ConfigError(f"mask_shares is {quoted(self.mask_shares)}: expected shares of {', '.join(MASK_KINDS)}")


class LatentData:
    """Draw batches of both splits, and masks of their frames. ``held_out`` is the split that is measured on."""

    def __init__(
        self,
        latents: LatentSet,
        tokenizer: Tokenizer,
        model: ModelConfig,
        clips: ClipsConfig,
        train: TrainConfig,
        *,
        held_out: str = "validation",
    ) -> None:
        self.latents, self.tokenizer, self.clips = latents, tokenizer, clips
        self.frames_per_second = model.frames_per_second
        diffusion = diffusion_of(model)
        most = diffusion.max_frames
        if clips.max_frames > most:
            raise ConfigError(f"clips.max_frames is {clips.max_frames}: {model.name} makes at most {most} frames")

        def batches(split: str, seed: int) -> LatentBatches:
            return LatentBatches(
                latents,
                tokenizer,
                split=split,
                batch=train.batch,
                seed=seed,
                max_frames=clips.max_frames or most,
                head_room_frames=int(diffusion.head_room_seconds * model.frames_per_second),
                buckets=clips.buckets,
                multiple=FRAME_MULTIPLE,
                shares=clips.shares.to_dict(),
            )

        self.train = batches("train", train.seed)
        self.validation = batches(held_out, train.seed + 1)

    def splits(self) -> tuple[Split, ...]:
        """Return how much there is, for a plan."""
        return tuple(
            Split(name=name, items=len(batches.items), seconds=sum(item.seconds for item in batches.items))
            for name, batches in (("train", self.train), ("validation", self.validation))
        )

    def remarks(self) -> list[str]:
        """Name words of the captions that the tokenizer does not know."""
        return unknown_words(self.tokenizer, (*self.train.items, *self.validation.items))

    def masks(self, batch: LatentBatch, rows: slice, step: int) -> Masks:
        """Extend the clips of a step by silence and draw the frames to keep ([T4.2] steps 3 and 4).

        ``batch`` are the items ``rows`` of the step's batch.
        """
        u = item_uniforms(rows, MASK_NUMBERS, self.train.seed, Purpose.MASK_DRAWS, step)
        mean_frames = self.clips.silence_seconds * self.frames_per_second
        return draw_masks(batch.valid, mean_frames, self.clips.mask_shares, u)
