"""Draw endless random crops of a clip cache, or of WebDataset shards, on which an autoencoder is trained.

Batches are functions of (seed, step): a resumed run sees exactly those that an uninterrupted one sees.

Shapes: B items, N audio samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from sa3_mlx.common.schema import Config
from sa3_torch.train.run.random import Purpose, generator
from sa3_torch.train.run.settings import check

from .augment import PER_ITEMS, AugmentConfig, Crop, augment, chirp, draw_gain, is_silent
from .clip_cache import SAMPLE_RATE, CachedClip, ClipSet
from .drawing import draw_caption, draw_weights
from .recordings import refuse_failures
from .shards import Piece, ShardIndex, ShardSample, ShardStream

_TRIES = 8
_DECODERS = 4  # samples of shards that are decoded at once
Item = tuple[Crop, str, str]  # of a batch: audio, caption, id
ONE_SHOT = 10 * SAMPLE_RATE  # samples: a sound of at most this length begins with an attack


@dataclass(frozen=True)
class CropMix:
    """Say which items of a batch are crops and which chirps: these stand evenly among ``crops`` crops, so that equal
    parts of a batch have equally many, wherever that is possible."""

    crops: int
    chirps_per_16: int

    @property
    def items(self) -> int:
        return self.crops + self._chirps

    @property
    def _chirps(self) -> int:
        return self.crops // PER_ITEMS * self.chirps_per_16

    def crop(self, item: int) -> int | None:
        """Return which crop an item is; None: a chirp."""
        before, after = (place * self._chirps // self.items for place in (item, item + 1))
        return item - before if before == after else None


@dataclass(frozen=True, kw_only=True)
class AudioBatch:
    """``audio`` (B, N, 2) float32 on the CPU; a caption ("": none, as of a chirp) and the id of the clip per item."""

    audio: Tensor
    captions: tuple[str, ...]
    ids: tuple[str, ...]


class Crops(Protocol):
    """Endless batches for an autoencoder: ``AudioCrops`` of a cache, or ``ShardCrops`` of shards."""

    items: int  # of a batch, chirps included

    def batch(self, step: int, rows: slice | None = None) -> AudioBatch: ...


class AudioCrops:
    """Endless crops of a clip cache for training an autoencoder.

    Crops are those of ``draw_crop``. Gain falls from 0 to ``quietest_db`` (mostly near 0), polarity is random, mono
    becomes two equal channels. Then come the augmentations; their generators are their own, so that they change no
    crop. Chirps stand evenly among the crops (``CropMix``): ``items`` is the size of a batch with them.
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
        self.augment, self.mix = augment, CropMix(batch, augment.chirps_per_16)
        self.items = self.mix.items
        self.clips = clips.select(split)
        if not self.clips:
            raise ValueError(f"no clip of split {split}: choose other clips")
        self._cumulative = np.cumsum(draw_weights([clip.kind for clip in self.clips], shares))

    def batch(self, step: int, rows: slice | None = None) -> AudioBatch:
        """Return the items of a step, or those of ``rows`` among them: what one process of several trains on.

        Each item has its own generators, so nothing is drawn or read for others.
        """
        chosen: list[Item] = []
        for item in range(self.items)[rows or slice(None)]:
            own = generator(self.seed, Purpose.AUGMENTATION, step, item)
            number = self.mix.crop(item)
            if number is None:
                chosen.append((chirp(own, self.samples), "", f"chirp {step} {item}"))
                continue
            clip, crop, gain = self._crop(generator(self.seed, Purpose.CROPS, step, number))
            caption = draw_caption(clip.captions, own)
            chosen.append((augment(crop * np.float32(gain), self.augment, own), caption, clip.id))
        return _stacked(chosen)

    def _crop(self, rng: np.random.Generator) -> tuple[CachedClip, Crop, float]:
        clip = self.clips[min(int(np.searchsorted(self._cumulative, rng.random())), len(self.clips) - 1)]
        crop = draw_crop(rng, clip.samples, self.samples, lambda start, stop: self.set.read(clip, start, stop))
        return clip, crop, draw_gain(rng, self.quietest_db)


def _stacked(items: Sequence[Item]) -> AudioBatch:
    audio, captions, ids = zip(*items, strict=True)
    return AudioBatch(audio=torch.from_numpy(np.stack(audio)), captions=captions, ids=ids)


def draw_crop(
    rng: np.random.Generator,
    length: int,
    samples: int,
    read: Callable[[int, int], Crop],
    piece: Piece | None = None,
) -> Crop:
    """Draw a crop (samples, 2) of a sound of ``length`` samples; ``read(start, stop)`` gives what there is of it.

    It starts anywhere from a quarter of its length before the sound to where a quarter of it lies after the end; a
    third of those of a ``ONE_SHOT`` start at its onset [T1.2]. Outside is silence; what is silent throughout is drawn
    again, and at last taken from the onset. Of a ``piece`` it starts before the next one begins.
    """
    at_onset = 1 / 3 if length <= ONE_SHOT and piece is None else 0
    starts = _starts(length, samples, piece)
    for attempt in range(_TRIES + 1):
        start = int(rng.integers(starts.start, starts.stop))
        if attempt == _TRIES or rng.random() < at_onset:
            start = 0
        audio = read(max(start, 0), max(start + samples, 0))
        lead = min(max(-start, 0), samples)
        crop = np.pad(audio, ((lead, samples - lead - len(audio)), (0, 0)))
        if not is_silent(crop):
            break
    return np.repeat(crop, 2, axis=1) if crop.shape[1] == 1 else crop


def _starts(length: int, samples: int, piece: Piece | None) -> range:
    """Return where crops may start: those of all pieces of a recording are those of the recording, each once."""
    last, margin = max(length - samples, 0), samples // 4
    if piece is None:
        return range(-margin, last + margin + 1)
    ends = piece.number + 1 == piece.of
    own = last + margin + 1 if ends else min(max(round(piece.seconds * SAMPLE_RATE), 1), last + 1)
    return range(0 if piece.number else -margin, own)


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(Config):
    """How shards are read."""

    streams: int  # parts of a batch with shards of their own; a multiple of the number of processes
    window: int  # samples that a stream holds in memory and shuffles

    def __post_init__(self) -> None:
        check(self, 1, 1 << 20, "streams", "window")


class ShardCrops:
    """Endless crops, a function of (seed, step), of any number of processes.

    A batch is made of ``streams`` streams of shards, each of which gives an equal part of its crops; a process that
    asks for some rows opens only the streams of those rows. Samples that cannot be read are named in ``failures``, the
    next one takes their place, and more than 1 % of all samples stop the run.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        samples: int,
        batch: int,
        streams: int,
        window: int,
        seed: int,
        quietest_db: float,
        augment: AugmentConfig,
    ) -> None:
        if samples < 1 or batch < 1 or quietest_db > 0:
            raise ValueError(
                f"samples and batch must be positive, quietest_db <= 0; got {samples}, {batch}, {quietest_db}"
            )
        if batch % streams or (augment.chirps_per_16 and batch % PER_ITEMS):
            raise ValueError(f"batch is {batch}: a multiple of {streams} streams is needed, with chirps also of 16")
        overlap = index.overlap_seconds
        if overlap is not None and samples > round(overlap * SAMPLE_RATE):
            raise ValueError(
                f"a crop has {samples / SAMPLE_RATE:.3g} s, the pieces of these shards overlap by {overlap:g} s: crops "
                "across their ends would be missing; pack them with a longer --overlap-seconds"
            )
        self.index, self.samples, self.batch_size, self.seed = index, samples, batch, seed
        self.window, self.quietest_db, self.augment = window, quietest_db, augment
        self.mix = CropMix(batch, augment.chirps_per_16)
        self.items = self.mix.items
        self.failures: dict[str, str] = {}
        self._count = streams
        self._streams: dict[int, ShardStream] = {}
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")

    def batch(self, step: int, rows: slice | None = None) -> AudioBatch:
        """Return the items of a step, or those of ``rows`` among them.

        Samples are read in their order; several of them are decoded at once.
        """
        items = range(self.items)[rows or slice(None)]
        numbers = [self.mix.crop(item) for item in items]
        first = [None if number is None else self._sample(step, number) for number in numbers]

        def make(item: int, number: int | None, sample: ShardSample | None) -> Item | ValueError:
            own = generator(self.seed, Purpose.AUGMENTATION, step, item)
            if number is None or sample is None:
                return chirp(own, self.samples), "", f"chirp {step} {item}"
            try:
                return self._crop(step, number, sample, own)
            except ValueError as error:
                return error

        found = list(self._decoders.map(make, items, numbers, first))
        for place, (item, number, made) in enumerate(zip(items, numbers, found, strict=True)):
            if isinstance(made, ValueError):
                assert number is not None
                found[place] = self._next_readable(step, item, number, made)
        return _stacked(cast(list[Item], found))

    def _crop(self, step: int, number: int, sample: ShardSample, own: np.random.Generator) -> Item:
        rng = generator(self.seed, Purpose.SHARD_CROPS, step, number)
        crop = draw_crop(rng, sample.facts()[0], self.samples, sample.read, sample.piece)
        gain = draw_gain(rng, self.quietest_db)
        caption = draw_caption(sample.sidecar.captions, own)
        return augment(crop * np.float32(gain), self.augment, own), caption, sample.id

    def _sample(self, step: int, number: int, later: int = 0) -> ShardSample:
        """Return the sample of a crop of a step, or one of those after it."""
        each = self.batch_size // self._count
        return self._stream(number // each).sample(step * each + number % each + later)

    def _next_readable(self, step: int, item: int, number: int, error: ValueError) -> Item:
        """Make a crop of the next sample that can be read."""
        stream = number // (self.batch_size // self._count)
        for later in range(1, self._stream(stream).samples):
            self._failed(self._sample(step, number, later - 1), error)
            own = generator(self.seed, Purpose.AUGMENTATION, step, item)
            try:
                return self._crop(step, number, self._sample(step, number, later), own)
            except ValueError as another:
                error = another
        raise ValueError(f"no sample of stream {stream} can be read")

    def _stream(self, number: int) -> ShardStream:
        if number not in self._streams:
            self._streams[number] = ShardStream(
                self.index, seed=self.seed, stream=number, streams=self._count, window=self.window
            )
        return self._streams[number]

    def _failed(self, sample: ShardSample, error: ValueError) -> None:
        self.failures[sample.id] = str(error)
        refuse_failures([f"{name}: {why}" for name, why in self.failures.items()], self.index.samples, "unreadable")
