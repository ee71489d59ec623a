"""What training reads: random crops of a clip cache, and batches of pre-encoded latents.

Both are functions of (seed, step) alone: a resumed run sees exactly the batches that an uninterrupted one sees.

Shapes: B items, N audio samples, T latent frames, C latent channels, S text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sa3_mlx.common.schema import Config

from .augment import PER_ITEMS, AugmentConfig, Crop, augment, chirp, draw_gain, is_silent
from .clip_cache import Clip, ClipSet, generator
from .latents import LatentItem, LatentSet
from .recordings import caption_parts

_TRIES = 8
_CROPS, _BATCH, _AUGMENT = 101, 102, 104  # purposes of the random generators
CANONICAL = 0.6  # how often the first caption is drawn


@dataclass(frozen=True, kw_only=True)
class SharesConfig(Config):
    """How often each kind of clip is drawn, whatever its number of clips; kinds without clips do not count."""

    note: float
    chord: float
    drum: float
    noise: float
    sample: float  # one-shots without captions
    user: float  # imported recordings


def draw_weights(kinds: Sequence[str], shares: Mapping[str, float] | None) -> NDArray[np.float64]:
    """Probability of each item: its kind's share over the items of that kind; ``shares`` None: all items alike.

    Raises ValueError when the items have a kind that ``shares`` does not name; a share without items is ignored.
    """
    if not kinds:
        raise ValueError("no items to draw from")
    if shares is None:
        return np.full(len(kinds), 1 / len(kinds))
    unknown = sorted(set(kinds) - set(shares))
    if unknown:
        raise ValueError(f"no share given for kind(s) {', '.join(unknown)}; given: {', '.join(sorted(shares))}")
    weights = np.array([shares[kind] / kinds.count(kind) for kind in kinds])
    return np.asarray(weights / weights.sum())


@dataclass(frozen=True, kw_only=True)
class AudioBatch:
    """``audio`` (B, N, 2) float32 on the CPU; a caption ("": none, as of a chirp) and the id of the clip per item."""

    audio: Tensor
    captions: tuple[str, ...]
    ids: tuple[str, ...]


def draw_caption(captions: Sequence[str], rng: np.random.Generator) -> str:
    """The canonical caption 60 % of the time, an alternative otherwise; "" where there is none. Always two draws."""
    pick, canonical = int(rng.integers(1, max(len(captions), 2))), rng.random() < CANONICAL
    if not captions:
        return ""
    return captions[0] if canonical or len(captions) == 1 else captions[pick]


def draw_parts(parts: Sequence[str], rng: np.random.Generator) -> str:
    """The parts of a caption in random order, each with probability 1/2, at least one [T4.1]."""
    kept = np.flatnonzero(rng.random(len(parts)) < 0.5)
    if not len(kept):
        kept = rng.integers(len(parts), size=1)
    return ", ".join(parts[i] for i in rng.permutation(kept))


class Crops(Protocol):
    """Endless batches for an autoencoder: ``AudioCrops`` of a cache, or ``ShardCrops`` of shards."""

    items: int  # of a batch, chirps included

    def batch(self, step: int, rows: slice | None = None) -> AudioBatch: ...


class AudioCrops:
    """Endless crops of a clip cache for training an autoencoder.

    Crops are those of ``draw_crop``. Gain falls from 0 to ``quietest_db`` (mostly near 0), polarity is random, mono
    becomes two equal channels. Then come the augmentations; their generators are their own, so that they change no
    crop. Behind every 16 crops stand its chirps: ``items`` is the size of a batch with them.
    """

    def __init__(
        self,
        clips: ClipSet,
        *,
        split: str,
        samples: int,
        batch: int,
        seed: int,
        quietest_db: float,
        shares: Mapping[str, float] | None,
        augment: AugmentConfig,
    ) -> None:
        if samples < 1 or batch < 1 or quietest_db > 0:
            raise ValueError(
                f"samples and batch must be positive, quietest_db <= 0; got {samples}, {batch}, {quietest_db}"
            )
        if augment.chirps_per_16 and batch % PER_ITEMS:
            raise ValueError(f"batch is {batch}: chirps_per_16 needs a multiple of {PER_ITEMS}; set one of the two")
        self.set, self.samples, self.batch_size, self.seed, self.quietest_db = clips, samples, batch, seed, quietest_db
        self.augment = augment
        self.items = batch + batch // PER_ITEMS * augment.chirps_per_16
        self.clips = clips.select(split)
        if not self.clips:
            raise ValueError(f"no clip of split {split}: choose other clips")
        self._cumulative = np.cumsum(draw_weights([clip.kind for clip in self.clips], shares))

    def batch(self, step: int, rows: slice | None = None) -> AudioBatch:
        """The items of a step, or those of ``rows`` among them: what one process of several trains on.

        Which crops are drawn does not depend on ``rows``; only the kept ones are worked on.
        """
        rng = generator(self.seed, _CROPS, step)
        wanted = range(self.items)[rows or slice(None)]
        group = PER_ITEMS + self.augment.chirps_per_16
        chosen: list[tuple[Crop, str, str]] = []
        for item in range(self.items):
            own = generator(self.seed, _AUGMENT, step, item)
            if item % group >= PER_ITEMS:
                if item in wanted:
                    chosen.append((chirp(own, self.samples), "", f"chirp {step} {item}"))
                continue
            clip, crop, gain = self._crop(rng)
            if item in wanted:
                caption = draw_caption(clip.captions, own)
                chosen.append((augment(crop * np.float32(gain), self.augment, own), caption, clip.id))
        audio, captions, ids = zip(*chosen, strict=True)
        return AudioBatch(audio=torch.from_numpy(np.stack(audio)), captions=captions, ids=ids)

    def _crop(self, rng: np.random.Generator) -> tuple[Clip, Crop, float]:
        clip = self.clips[min(int(np.searchsorted(self._cumulative, rng.random())), len(self.clips) - 1)]
        crop = draw_crop(rng, clip.samples, self.samples, lambda start, stop: self.set.read(clip, start, stop))
        return clip, crop, draw_gain(rng, self.quietest_db)


def draw_crop(rng: np.random.Generator, length: int, samples: int, read: Callable[[int, int], Crop]) -> Crop:
    """A crop (samples, 2) of a sound of ``length`` samples; ``read(start, stop)`` gives what there is of it.

    It starts anywhere from a quarter of its length before the sound to where a quarter of it lies behind the end; a
    third start at the onset. Outside is silence; what is silent throughout is drawn again.
    """
    margin = samples // 4
    for attempt in range(_TRIES + 1):
        start = int(rng.integers(-margin, max(length - samples, 0) + margin + 1))
        if attempt == _TRIES or rng.random() < 1 / 3:
            start = 0
        audio = read(max(start, 0), max(start + samples, 0))
        lead = min(max(-start, 0), samples)
        crop = np.pad(audio, ((lead, samples - lead - len(audio)), (0, 0)))
        if not is_silent(crop):
            break
    return np.repeat(crop, 2, axis=1) if crop.shape[1] == 1 else crop


class TextEncoding(Protocol):
    """What LatentBatches need of a tokenizer: texts -> ids (B, S) int32 and mask (B, S) bool, True for a real token."""

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
    drawn 60 % of the time, an alternative otherwise; a caption that was made of fields (recordings.py) is made anew of
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
        """The batch of a step, on the CPU."""
        rng = generator(self.seed, _BATCH, step)
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
