"""Open what ``--data`` of the autoencoder stages may be: a clip cache, or WebDataset shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sa3_torch.train.run import parallel

from .augment import is_silent
from .clip_cache import FORMAT, SAMPLE_RATE, ClipSet, Draft, read_index, write_clips
from .shards import SHARD_FORMAT, Shard, ShardIndex, index_shards, open_index, read_shard

HELD_OUT, HELD_OUT_SECONDS = 64, 10  # recordings of the last shard, at most, and what is kept of each


@dataclass(frozen=True, kw_only=True)
class AudioData:
    """``clips`` are trained and measured on; with ``shards``, which are trained on then, only measured on."""

    clips: ClipSet
    shards: ShardIndex | None = None

    @property
    def digest(self) -> str:
        """Return what tells what is trained on from others: a run may not go on with others."""
        if self.shards is None:
            return self.clips.digest()
        return hashlib.sha256(" ".join(shard.hash for shard in self.shards.shards).encode()).hexdigest()


def open_audio(place: str, run: Path) -> AudioData:
    """Open ``place``: a clip cache; a folder or URL with the index of shards, or that file; shards without one, as
    "s3://bucket/name-{000000..000009}.tar", which are read through once.

    The last shard is held out: the beginnings of its first recordings become a clip cache in the folder ``run``, where
    the index of shards without one is kept, too. Raises FileNotFoundError, ValueError for anything else.
    """
    local = "://" not in place and "{" not in place and not place.endswith((".tar", ".json"))
    if local and read_index(Path(place), FORMAT, SHARD_FORMAT)["format"] == FORMAT:
        return AudioData(clips=ClipSet(Path(place)))
    index = _index_of(place, run)
    if len(index.shards) < 2:
        raise ValueError(f"{place}: only one shard; the last one is held out, so make more, smaller shards")
    *shards, last = index.shards
    return AudioData(clips=_held_out(last, run / "held-out"), shards=ShardIndex(shards=tuple(shards)))


def _index_of(place: str, run: Path) -> ShardIndex:
    if not place.endswith(".tar"):
        return open_index(place)
    path = run / f"shards-{hashlib.sha256(place.encode()).hexdigest()[:12]}.json"
    if parallel.is_first() and not path.is_file():
        run.mkdir(parents=True, exist_ok=True)
        index_shards(place, path)
    parallel.wait()
    return open_index(str(path))


def _held_out(shard: Shard, folder: Path) -> ClipSet:
    about = {"shard": shard.hash}
    if parallel.is_first() and not ((folder / "index.json").is_file() and ClipSet(folder).about == about):
        write_clips(folder, islice(_drafts(shard), HELD_OUT), channels=2, about=about, overwrite=True)
    parallel.wait()
    return ClipSet(folder)


def _drafts(shard: Shard) -> Iterator[Draft]:
    """Yield drafts of the recordings whose first two seconds can be read and are not silent."""
    for sample in read_shard(shard.name):
        if sample.piece is not None and sample.piece.number:  # not the beginning of a recording
            continue
        try:
            audio = sample.read(0, min(sample.facts()[0], HELD_OUT_SECONDS * SAMPLE_RATE))
        except ValueError:
            continue
        if not is_silent(audio[: 2 * SAMPLE_RATE]):
            yield Draft(
                id=sample.id,
                captions=sample.sidecar.captions,
                kind="user",
                label="user",
                instrument=None,
                midi=None,
                split="validation",
                audio=audio,
                licence=sample.sidecar.licence,
                fields=sample.sidecar.fields,
            )
