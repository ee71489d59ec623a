"""Draw endless batches of pre-encoded latents with their prompts, on which a model of latents is trained.

Batches are functions of (seed, step): a resumed run sees exactly those that an uninterrupted one sees.

Shapes: B items, T latent frames, C latent channels, S text tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sa3_mlx.common.text.tokenizer import Tokenizer, first_words
from sa3_torch.train.run.random import Purpose, generator

from .drawing import draw_caption, draw_parts, draw_weights
from .latents import LatentItem, LatentSet
from .recordings import caption_parts


class TextEncoding(Protocol):
    """A tokenizer, as LatentBatches need it: texts -> ids (B, S) int32 and mask (B, S) bool, True for a real token."""

    def encode(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]: ...


@dataclass(frozen=True)
class LatentBatch:
    """``latents`` (B, T, C) float32, padded with the latent of silence; ``valid`` (B, T); text ids and mask (B, S)."""

    latents: Tensor
    valid: Tensor
    ids: Tensor
    mask: Tensor
    seconds: Tensor
    items: tuple[LatentItem, ...]

    def __getitem__(self, rows: slice) -> LatentBatch:
        return LatentBatch(
            latents=self.latents[rows],
            valid=self.valid[rows],
            ids=self.ids[rows],
            mask=self.mask[rows],
            seconds=self.seconds[rows],
            items=self.items[rows],
        )


class LatentBatches:
    """Endless batches of latents, of similar lengths, padded to a multiple of ``multiple`` frames.

    ``head_room_frames`` more frames of silence follow the longest item; they are not valid. The canonical caption is
    drawn 60 % of the time, an alternative otherwise; a caption that was made of fields (recordings.py) is made again of
    some of them. Of items longer than ``max_frames`` a random part inside them is taken; ``seconds`` stays their full
    duration. Items without a caption are left out and counted in ``skipped``.
    """

    def __init__(
        self,
        latents: LatentSet,
        tokenizer: TextEncoding,
        *,
        split: str,
        batch: int,
        seed: int,
        max_frames: int,
        head_room_frames: int,
        buckets: int,
        multiple: int,
        shares: Mapping[str, float] | None,
    ) -> None:
        self.latents, self.batch_size, self.seed = latents, batch, seed
        self.head_room_frames, self.multiple, self.max_frames = head_room_frames, multiple, max_frames
        mine = [item for item in latents.items if item.split == split]
        usable = [item for item in mine if item.captions]
        self.skipped = len(mine) - len(usable)
        usable.sort(key=lambda item: (min(item.frames, max_frames), item.id))
        if not usable:
            raise ValueError(f"{latents}: no item of split {split} with a caption; choose other latents")
        self.items = usable
        weights = draw_weights([item.kind for item in usable], shares)
        parts = np.array_split(np.arange(len(usable)), min(buckets, len(usable)))
        self._buckets = [([usable[i] for i in part], weights[part] / weights[part].sum()) for part in parts]
        self._shares = np.array([weights[part].sum() for part in parts])
        self.tokenizer = tokenizer
        texts = sorted({caption for item in usable for caption in item.captions})
        ids, mask = tokenizer.encode(texts)
        self._text = {text: (ids[i], mask[i]) for i, text in enumerate(texts)}

    def batch(self, step: int) -> LatentBatch:
        """Return the batch of a step, on the CPU."""
        rng = generator(self.seed, Purpose.LATENT_BATCH, step)
        members, weights = self._buckets[int(rng.choice(len(self._buckets), p=self._shares))]
        items = [members[i] for i in rng.choice(len(members), size=self.batch_size, p=weights)]
        texts = [self._draw_text(item, rng) for item in items]
        longest = max(item.frames for item in items) + self.head_room_frames
        frames = min(-(-longest // self.multiple) * self.multiple, self.max_frames)
        z = self.latents.silence.expand(len(items), frames, -1).clone()  # (B, T, C)
        valid = torch.zeros(len(items), frames, dtype=torch.bool)
        for row, item in enumerate(items):
            start = int(rng.integers(item.frames - frames + 1)) if item.frames > frames else 0
            part = self.latents.read(item, start, start + frames)
            z[row, : len(part)] = part
            valid[row, : len(part)] = True
        return LatentBatch(
            latents=z,
            valid=valid,
            ids=torch.from_numpy(np.stack([ids for ids, _ in texts])).long(),
            mask=torch.from_numpy(np.stack([mask for _, mask in texts])),
            seconds=torch.tensor([item.seconds for item in items], dtype=torch.float32),
            items=tuple(items),
        )

    def _draw_text(self, item: LatentItem, rng: np.random.Generator) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        parts = caption_parts(item.fields)
        if len(parts) < 2 or item.captions != (", ".join(parts),):
            return self._text[draw_caption(item.captions, rng)]
        ids, mask = self.tokenizer.encode([draw_parts(parts, rng)])
        return ids[0], mask[0]


def unknown_words(tokenizer: Tokenizer, items: Iterable[LatentItem]) -> list[str]:
    """Return a note on words of captions that a tokenizer with a closed vocabulary does not know; else nothing."""
    captions = dict.fromkeys(caption for item in items for caption in item.captions)
    words = tuple(dict.fromkeys(word for caption in captions for word in tokenizer.unknown(caption)))
    if not words:
        return []
    return [f"note: the model does not know {first_words(words)} of the captions; write them in words that it knows"]
