"""Draw endless batches of pre-encoded latents with their prompts, on which a model of latents is trained.

Batches are functions of (seed, step): a resumed run sees exactly those that an uninterrupted one sees. What a batch is
made of (``plan``) is drawn for all items and costs little; latents and texts are read for the rows that are asked for.

Shapes: B items, T latent frames, C latent channels, S text tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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

TEXTS_KEPT = 1 << 14  # of which the ids are held: 1.3 KB each


class TextEncoding(Protocol):
    """A tokenizer, as LatentBatches need it: texts -> ids (B, S) int32 and mask (B, S) bool, True for a real token."""

    def encode(self, texts: list[str]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]: ...


_REMEDIES = {
    "train": "choose other latents",
    "validation": "one recording in ten is held out, by its hash: encode more of them, or choose other latents",
}


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

    def to(self, device: torch.device) -> LatentBatch:
        """Send what networks read; ``valid`` and ``seconds`` are looked at on the host."""
        latents, ids, mask = (x.to(device, non_blocking=True) for x in (self.latents, self.ids, self.mask))
        return replace(self, latents=latents, ids=ids, mask=mask)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Say what the batch of a step is made of: items with the frame at which each begins, their drawn texts, T."""

    items: tuple[LatentItem, ...]
    starts: tuple[int, ...]
    texts: tuple[str, ...]
    frames: int


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
            raise ValueError(f"{latents}: no item of split {split} with a caption; {_REMEDIES[split]}")
        self.items = usable
        weights = draw_weights([item.kind for item in usable], shares)
        parts = np.array_split(np.arange(len(usable)), min(buckets, len(usable)))
        self._buckets = [([usable[i] for i in part], np.cumsum(weights[part] / weights[part].sum())) for part in parts]
        self._shares = np.array([weights[part].sum() for part in parts])
        self.tokenizer = tokenizer
        self._ids = lru_cache(TEXTS_KEPT)(self._encode)
        self.plan = lru_cache(4)(self._plan)

    def batch(self, step: int, rows: slice | None = None) -> LatentBatch:
        """Return the batch of a step, or the items ``rows`` of it, on the CPU."""
        plan, rows = self.plan(step), rows or slice(None)
        items, starts = plan.items[rows], plan.starts[rows]
        z = torch.empty(len(items), plan.frames, self.latents.channels)
        valid = torch.zeros(len(items), plan.frames, dtype=torch.bool)
        for row, (item, start) in enumerate(zip(items, starts, strict=True)):
            part = self.latents.read(item, start, start + plan.frames)
            z[row, : len(part)], z[row, len(part) :] = part, self.latents.silence
            valid[row, : len(part)] = True
        ids, mask = self.texts(plan.texts[rows])
        return LatentBatch(
            latents=z,
            valid=valid,
            ids=ids,
            mask=mask,
            seconds=torch.tensor([item.seconds for item in items], dtype=torch.float32),
            items=items,
        )

    def _plan(self, step: int) -> BatchPlan:
        rng = generator(self.seed, Purpose.LATENT_BATCH, step)
        members, cumulative = self._buckets[int(rng.choice(len(self._buckets), p=self._shares))]
        chosen = cumulative.searchsorted(rng.random(self.batch_size) * cumulative[-1], side="right")
        items = tuple(members[i] for i in chosen)
        texts = tuple(self._draw_text(item, rng) for item in items)
        longest = max(item.frames for item in items) + self.head_room_frames
        frames = min(-(-longest // self.multiple) * self.multiple, self.max_frames)
        starts = tuple(int(rng.integers(x.frames - frames + 1)) if x.frames > frames else 0 for x in items)
        return BatchPlan(items=items, starts=starts, texts=texts, frames=frames)

    def _draw_text(self, item: LatentItem, rng: np.random.Generator) -> str:
        parts = caption_parts(item.fields)
        if len(parts) < 2 or item.captions != (", ".join(parts),):
            return draw_caption(item.captions, rng)
        return draw_parts(parts, rng)

    def texts(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return ids (B, S) int64 and mask (B, S) of texts, which are tokenised when they are first drawn."""
        ids, mask = zip(*map(self._ids, texts), strict=True)
        return torch.from_numpy(np.stack(ids)).long(), torch.from_numpy(np.stack(mask))

    def _encode(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        ids, mask = self.tokenizer.encode([text])
        return ids[0], mask[0]


def unknown_words(tokenizer: Tokenizer, items: Iterable[LatentItem]) -> list[str]:
    """Return a note on words of captions that a tokenizer with a closed vocabulary does not know; else nothing."""
    captions = dict.fromkeys(caption for item in items for caption in item.captions)
    words = tuple(dict.fromkeys(word for caption in captions for word in tokenizer.unknown(caption)))
    if not words:
        return []
    return [f"note: the model does not know {first_words(words)} of the captions; write them in words that it knows"]
