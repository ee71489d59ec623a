"""Random crops of WebDataset shards: the batches of ``AudioCrops`` from streams instead of a cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sa3_mlx.common.schema import Config
from sa3_torch.train.run.settings import check

from .augment import PER_ITEMS, AugmentConfig, Crop, augment, chirp, draw_gain
from .batches import AudioBatch, draw_caption, draw_crop
from .clip_cache import generator
from .recordings import refuse_failures
from .shards import ShardIndex, ShardSample, ShardStream

_CROPS, _AUGMENT = 107, 104  # purposes of the random generators


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
    asks for some rows opens the streams of those rows alone. Samples that cannot be read are named in ``failures``, the
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
        self.index, self.samples, self.batch_size, self.seed = index, samples, batch, seed
        self.window, self.quietest_db, self.augment = window, quietest_db, augment
        self.items = batch + batch // PER_ITEMS * augment.chirps_per_16
        self.failures: dict[str, str] = {}
        self._count = streams
        self._streams: dict[int, ShardStream] = {}

    def batch(self, step: int, rows: slice | None = None) -> AudioBatch:
        """The items of a step, or those of ``rows`` among them."""
        group = PER_ITEMS + self.augment.chirps_per_16
        chosen: list[tuple[Crop, str, str]] = []
        for item in range(self.items)[rows or slice(None)]:
            own = generator(self.seed, _AUGMENT, step, item)
            if item % group >= PER_ITEMS:
                chosen.append((chirp(own, self.samples), "", f"chirp {step} {item}"))
            else:
                chosen.append(self._item(step, item // group * PER_ITEMS + item % group, own))
        audio, captions, ids = zip(*chosen, strict=True)
        return AudioBatch(audio=torch.from_numpy(np.stack(audio)), captions=captions, ids=ids)

    def _item(self, step: int, row: int, own: np.random.Generator) -> tuple[Crop, str, str]:
        each = self.batch_size // self._count
        stream = self._stream(row // each)
        for number in range(step * each + row % each, step * each + row % each + stream.samples):
            sample = stream.sample(number)
            rng = generator(self.seed, _CROPS, step, row)
            try:
                crop = draw_crop(rng, sample.facts()[0], self.samples, sample.read)
            except ValueError as error:
                self._failed(sample, error)
                continue
            gain = draw_gain(rng, self.quietest_db)
            caption = draw_caption(sample.sidecar.captions, own)
            return augment(crop * np.float32(gain), self.augment, own), caption, sample.id
        raise ValueError(f"no sample of stream {row // each} can be read")

    def _stream(self, number: int) -> ShardStream:
        if number not in self._streams:
            self._streams[number] = ShardStream(
                self.index, seed=self.seed, stream=number, streams=self._count, window=self.window
            )
        return self._streams[number]

    def _failed(self, sample: ShardSample, error: ValueError) -> None:
        self.failures[sample.id] = str(error)
        refuse_failures([f"{name}: {why}" for name, why in self.failures.items()], self.index.samples, "unreadable")
