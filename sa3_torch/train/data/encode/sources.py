"""Open what can be encoded to latents: a clip cache, a folder of recordings, shards: one interface [T3]."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sa3_mlx.common.files.audio import fit_channels, read_blocks
from sa3_torch.train.data.clip_cache import FORMAT, Audio, ClipSet, read_index
from sa3_torch.train.data.recordings import Sidecar, find_audio, hash_file, read_sidecar
from sa3_torch.train.data.shards import SHARD_FORMAT, ShardIndex, ShardSample, StaleIndexError, open_index, read_shard
from sa3_torch.train.data.user_folder import split_of

_BLOCK = 1 << 18  # samples


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One sound to encode; ``blocks()`` gives its audio piece by piece, (n, channels) at the model's sample rate."""

    id: str
    captions: tuple[str, ...]
    seconds: float | None  # full duration where the sound is an excerpt; None: that of the audio
    kind: str
    label: str
    midi: int | None
    split: str
    source: str
    licence: str
    blocks: Callable[[], Iterator[Audio]]
    fields: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """``names`` of the recordings in a fixed order; ``listing`` changes when there are others, as do their ``rows``."""

    names: list[str]
    listing: str
    rows: list[tuple[object, ...]]  # what tells each recording from others, without reading it
    unique: bool  # whether the same audio under two names is encoded once
    first: int  # place of the first recording in the whole that this may be a part of

    def recording(self, number: int) -> Recording:
        """Raises ValueError or OSError when it, or its sidecar, cannot be read."""


def open_source(path: Path, sample_rate: int, channels: int) -> Source:
    """Open a clip cache or shards (a folder with an ``index.json`` that says so), or a folder of recordings."""
    if (path / "index.json").is_file():
        if read_index(path, FORMAT, SHARD_FORMAT)["format"] == SHARD_FORMAT:
            return ShardSource(_of_recordings(path), sample_rate, channels)
        return ClipSource(ClipSet(path), channels)
    return FolderSource(path, sample_rate, channels)


def _of_recordings(path: Path) -> ShardIndex:
    """Open the index of shards. Raises ValueError for those that hold pieces of recordings."""
    index = open_index(str(path))
    if index.overlap_seconds is not None:
        raise ValueError(
            f"{path}: holds pieces of recordings, for an autoencoder; encode the folder that was packed, or pack it "
            "again without --piece-seconds"
        )
    return index


class PartSource:
    """One of ``parts`` parts of a source, counted from 0: what one of several machines encodes."""

    def __init__(self, whole: Source, part: int, parts: int) -> None:
        """Raises ValueError for a part that there is not, or that would be empty."""
        count = len(whole.names)
        if not 0 <= part < parts <= count:
            raise ValueError(f"part {part + 1} of {parts} of {count} recordings: allowed are 1 to {min(parts, count)}")
        self.first, stop = count * part // parts, count * (part + 1) // parts
        self._whole, self.unique = whole, whole.unique
        self.names, self.rows = whole.names[self.first : stop], whole.rows[self.first : stop]
        self.listing = digest_rows(self.rows)

    def recording(self, number: int) -> Recording:
        return self._whole.recording(self.first + number)


class ClipSource:
    """The captioned clips of a cache."""

    unique, first = False, 0

    def __init__(self, clips: ClipSet, channels: int) -> None:
        self._set, self._channels = clips, channels
        self._clips = [clip for clip in clips.clips if clip.captions]
        if not self._clips:
            raise ValueError("no clip of the cache has a caption, and a diffusion model is trained on captions")
        self.names = [clip.id for clip in self._clips]
        self.rows: list[tuple[object, ...]] = [(clip.id, clip.offset, clip.samples) for clip in self._clips]
        self.listing = digest_rows(self.rows)

    def recording(self, number: int) -> Recording:
        clip = self._clips[number]

        def blocks() -> Iterator[Audio]:
            for start in range(0, clip.samples, _BLOCK):
                yield fit_channels(self._set.read(clip, start, start + _BLOCK), self._channels)

        digest = hashlib.sha256()
        for block in blocks():
            digest.update(block.astype("<f4").tobytes())
        return Recording(
            id=clip.id,
            captions=clip.captions,
            seconds=clip.seconds,
            kind=clip.kind,
            label=clip.label,
            midi=clip.midi,
            split=clip.split,
            source=clip.source or f"sha256:{digest.hexdigest()}",
            licence=clip.licence,
            blocks=blocks,
            fields=clip.fields,
        )


class FolderSource:
    """The audio files of a folder (recordings.py), in the order of their names."""

    unique, first = True, 0

    def __init__(self, folder: Path, sample_rate: int, channels: int) -> None:
        self._folder, self._sample_rate, self._channels = folder, sample_rate, channels
        self._files = find_audio(folder)
        self.names = [path.relative_to(folder).as_posix() for path in self._files]
        self.rows: list[tuple[object, ...]] = [
            (n, path.stat().st_size) for n, path in zip(self.names, self._files, strict=True)
        ]
        self.listing = digest_rows(self.rows)

    def recording(self, number: int) -> Recording:
        path = self._files[number]
        sidecar, source = read_sidecar(path), hash_file(path)
        return _of_user(
            self.names[number], sidecar, source, lambda: read_blocks(path, self._sample_rate, self._channels)
        )


class ShardSource:
    """The samples of WebDataset shards, in their order; ids are the shard and the place in it."""

    unique, first = True, 0

    def __init__(self, index: ShardIndex, sample_rate: int, channels: int) -> None:
        self._sample_rate, self._channels = sample_rate, channels
        self._places = [(shard, place) for shard in index.shards for place in range(shard.samples)]
        self.names = [f"{shard.name.rpartition('/')[2]}/{place}" for shard, place in self._places]
        self.rows: list[tuple[object, ...]] = [
            (shard.name, shard.hash, place) for shard in index.shards for place in range(shard.samples)
        ]
        self.listing = digest_rows([(shard.name, shard.hash) for shard in index.shards])
        self._next, self._reader = -1, iter(())  # type: tuple[int, Iterator[ShardSample]]

    def recording(self, number: int) -> Recording:
        sample = self._sample(number)
        if sample.problem or sample.piece is not None:
            raise ValueError(f"{self.names[number]}: {sample.problem or 'is a piece of a recording'}")
        sidecar, source = sample.sidecar, f"sha256:{hashlib.sha256(sample.data).hexdigest()}"
        return _of_user(self.names[number], sidecar, source, lambda: sample.blocks(self._sample_rate, self._channels))

    def _sample(self, number: int) -> ShardSample:
        """Return a sample. Reading in order keeps a shard open; any other place is reached from its shard's start.

        Raises StaleIndexError where the shard has fewer samples than its index says, or more.
        """
        shard, place = self._places[number]
        if number != self._next or place == 0:
            self._reader = islice(read_shard(shard.name), place, None)
        self._next = number + 1
        sample = next(self._reader, None)
        if sample is None:
            raise StaleIndexError(shard.name, "fewer", shard.samples)
        if place + 1 == shard.samples and next(self._reader, None) is not None:
            raise StaleIndexError(shard.name, "more", shard.samples)
        return sample


def _of_user(name: str, sidecar: Sidecar, source: str, blocks: Callable[[], Iterator[Audio]]) -> Recording:
    """Describe a recording of the user's, of which its sidecar and the digest ``source`` of its file are known."""
    return Recording(
        id=name,
        captions=sidecar.captions,
        seconds=sidecar.seconds_total,
        kind="user",
        label="user",
        midi=None,
        split=split_of(source),
        source=source,
        licence=sidecar.licence,
        blocks=blocks,
        fields=sidecar.fields,
    )


def digest_rows(rows: Sequence[tuple[object, ...]]) -> str:
    """Return "sha256:..." of what tells recordings from others."""
    return f"sha256:{hashlib.sha256(json.dumps(rows).encode()).hexdigest()}"


def whole(recording: Recording) -> Audio:
    """Return all blocks of a recording in one array."""
    return np.concatenate(list(recording.blocks()))
