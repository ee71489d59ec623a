"""WebDataset shards of recordings: tar files written, indexed and streamed through the webdataset library [T11e].

A folder holds ``audio-000000.tar`` ..., samples ``KEY.flac`` (or .wav, .ogg, .mp3: the file as it was) + ``KEY.json``,
and ``index.json`` with names, counts and hashes. The index makes every place of the stream known: sample i is a
function of (seed, i), so a resumed run seeks, and nothing but the step has to be kept.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.files.audio import fit_channels, open_blocks, resample
from sa3_mlx.common.files.audio_file import AudioFile, check_finite
from sa3_mlx.common.files.objects import JSON_MAX, parse_object, read_object
from sa3_mlx.common.schema import listed, quoted, reason
from sa3_torch.train.run.random import Purpose, generator

from .clip_cache import SAMPLE_RATE, Audio
from .entries import parse_entries
from .recordings import (
    ATTRIBUTION,
    SUFFIXES,
    TOLERATED,
    Credit,
    Sidecar,
    check_apart,
    check_empty,
    find_audio,
    hash_file,
    inspect,
    parse_sidecar,
    read_sidecar,
    refuse_failures,
    write_attribution,
)
from .urls import FetchError, Names, Stream, check_url, expand, is_remote, open_url

SHARD_FORMAT = "sa3-shards/1"
_MAX_SAMPLES = 1_000_000  # of a shard
_TAR_BLOCK = 512  # bytes; a sample of a tar file has at least its header
_NO_TAR = "no tar file with recordings, or damaged or truncated; get a complete copy"
_UNREADABLE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, RecursionError)
_CONTEXT = 1024  # samples of a file read around a piece that is resampled


def _library() -> Any:
    try:
        import webdataset
    except ImportError as error:
        raise ImportError("shards need the webdataset library: pip install 'sa3[train]'") from error
    return webdataset


class StaleIndexError(ValueError):
    """Report a shard that is not the one that was indexed: what it has more would be left out without a word."""

    def __init__(self, shard: str, found: str, samples: int) -> None:
        super().__init__(f"{shard}: has {found} samples, its index says {samples}; index it again")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file; ``name`` is a URL, or relative to the place of the index."""

    name: str
    samples: int
    bytes: int
    hash: str  # "sha256:..." of the tar file


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Shards with names that can be opened."""

    shards: tuple[Shard, ...]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class ShardSample:
    """One recording of a shard, undecoded: the bytes of its file."""

    id: str
    name: str  # the shard and the sample's key in it, for errors
    sidecar: Sidecar
    data: bytes
    problem: str = ""  # why it cannot be used

    def facts(self) -> tuple[int, int]:
        """Return the length in samples at 44.1 kHz, and the sample rate of the file."""
        with self._open() as file:
            samples = sum(map(len, file.blocks())) if file.samples is None else file.samples
            return round(samples * SAMPLE_RATE / file.samplerate), file.samplerate

    def read(self, start: int, stop: int) -> Audio:
        """Read samples [start, stop) at 44.1 kHz, what there is of them, (n, 2). Raises ValueError as read_audio."""
        with self._open() as file:
            rate, ratio = file.samplerate, file.samplerate / SAMPLE_RATE
            context = 0 if rate == SAMPLE_RATE else _CONTEXT  # a resampler rings where its input begins
            first, last = max(int(start * ratio) - context, 0), int(np.ceil(stop * ratio)) + context
            if file.samples is None:  # read from its start, as it cannot be gone to a place
                audio = file.take(last)[first:]
            else:
                first = min(first, file.samples)
                wanted = min(last, file.samples) - first
                file.seek(first)
                audio = file.take(wanted)
                if len(audio) < wanted:
                    raise ValueError(f"{self.name}: the file is truncated")
            check_finite(audio, self.name, first)
        if not len(audio):
            return np.zeros((0, 2), np.float32)
        lead = start - round(first / ratio)
        return resample(fit_channels(audio, 2), rate, SAMPLE_RATE)[lead : lead + stop - start]

    def blocks(self, sample_rate: int, channels: int) -> Iterator[Audio]:
        """Yield the whole audio piece by piece, as ``read_blocks``."""
        with self._open() as file:
            yield from open_blocks(file, sample_rate, channels)

    def _open(self) -> AudioFile:
        if self.problem:
            raise ValueError(f"{self.name}: {self.problem}")
        return AudioFile(io.BytesIO(self.data), self.name)


def write_shards(
    folder: Path,
    out: Path,
    *,
    shard_bytes: int,
    captions_required: bool,
    tolerated: float = TOLERATED,
    progress: Callable[[list[Path]], Iterable[Path]] = iter,
) -> ShardIndex:
    """Pack the recordings of ``folder`` into shards of about ``shard_bytes``, with index and attribution list.

    Equal files give equal shards. ``progress`` goes through the files, with a bar for example. Unreadable files and,
    where required, those without a caption are left out and named in the index; raises ValueError with the list when
    more than a share ``tolerated`` of the files are unreadable or more than 1 % without a caption, or when nothing is
    left; then nothing is left in ``out``, either.
    """
    wds, files = _library(), find_audio(folder)
    check_apart(folder, out)
    check_empty(out)
    shards: list[Shard] = []
    credits: list[Credit] = []
    unreadable, without_caption = list[str](), list[str]()
    pending = _samples(folder, progress(files), unreadable, without_caption if captions_required else None, credits)
    with new_folder(out) as partial:
        sample = next(pending, None)
        while sample is not None:
            path, count, size = partial / f"audio-{len(shards):06d}.tar", 0, 0
            with wds.TarWriter(str(path), encoder=False, mtime=0, user="", group="", compress=False) as writer:
                while sample is not None and (not count or size < shard_bytes):
                    size += writer.write(sample)
                    count += 1
                    sample = next(pending, None)
            digest = hash_file(path)
            shards.append(Shard(name=path.name, samples=count, bytes=path.stat().st_size, hash=digest))
        refuse_failures(unreadable, len(files), "unreadable", tolerated)
        refuse_failures(without_caption, len(files), "without a caption")
        if not shards:
            raise ValueError(f"nothing to pack in {folder}")
        _write_index(partial / "index.json", shards, {"unreadable": unreadable, "without a caption": without_caption})
        write_attribution(partial / ATTRIBUTION, credits)
    return open_index(str(out))


def _samples(
    folder: Path,
    files: Iterable[Path],
    unreadable: list[str],
    without_caption: list[str] | None,
    credits: list[Credit],
) -> Iterator[dict[str, Any]]:
    """Yield what is packed, and list what is not; ``without_caption`` None: captions are not needed."""
    for number, path in enumerate(files):
        name = path.relative_to(folder).as_posix()
        try:
            facts, sidecar = inspect(path), read_sidecar(path)
        except (ValueError, OSError) as error:
            unreadable.append(f"{name}: {error}")
            continue
        if without_caption is not None and not sidecar.captions:
            without_caption.append(name)
            continue
        about = {
            **sidecar.fields,
            "id": name,
            "source": facts.digest,
            "licence": sidecar.licence,
            "prompt": list(sidecar.captions),
            "seconds_start": sidecar.seconds_start,
            "seconds_total": sidecar.seconds_total or facts.seconds,
        }
        credits.append(Credit(id=name, licence=sidecar.licence, source=facts.digest, fields=sidecar.fields))
        text = json.dumps(about, sort_keys=True, ensure_ascii=False).encode()
        yield {"__key__": f"{number:08d}", path.suffix[1:].lower(): path.read_bytes(), "json": text}


def _write_index(path: Path, shards: Sequence[Shard], left_out: dict[str, list[str]]) -> None:
    write_json(path, {"format": SHARD_FORMAT, "shards": [asdict(shard) for shard in shards], "left_out": left_out})


def open_index(place: str) -> ShardIndex:
    """Open the index of a folder or URL that holds ``index.json``, or of that file. Raises ValueError for another."""
    place = place.rstrip("/")
    url = place if place.endswith(".json") else f"{place}/index.json"
    if not is_remote(url) and not Path(url).is_file():
        raise FileNotFoundError(f"{url}: no such file; make it with `sa3 data index` where others made the shards")
    with open_url(url) as stream:
        data = parse_object(stream.read(JSON_MAX), url)
    if data.get("format") != SHARD_FORMAT or not data.get("shards"):
        raise ValueError(f"{url}: expected format {SHARD_FORMAT} with shards, got {quoted(data.get('format'))}")
    base = url.rpartition("/")[0]
    shards = parse_entries(Shard, data["shards"], f"{url}: shards")
    for shard in shards:
        most = min(_MAX_SAMPLES, shard.bytes // _TAR_BLOCK)
        if shard.samples > most:
            raise ValueError(
                f"{url}: {quoted(shard.name)} has {shard.samples} samples in {shard.bytes} bytes; up to {most} are "
                "allowed; index it again, or make more shards"
            )
    whole = [not base or is_remote(shard.name) or shard.name.startswith("/") for shard in shards]
    named = [shard.name if full else f"{base}/{shard.name}" for shard, full in zip(shards, whole, strict=True)]
    for name in named:
        check_url(name)
    return ShardIndex(
        shards=tuple(Shard(**{**asdict(shard), "name": name}) for shard, name in zip(shards, named, strict=True))
    )


def index_shards(pattern: str, out: Path, *, progress: Callable[[Names], Iterable[str]] = iter) -> ShardIndex:
    """Read shards of others through once, "name-{000000..000009}.tar" or one URL, and write their index to ``out``.

    An index that is there is replaced; ``progress`` goes through the names, with a bar for example. Raises ValueError
    for another file there, as ``expand``, and for what is no tar file, or a damaged one; FetchError, and
    FileNotFoundError.
    """
    if out.exists() and (not out.is_file() or read_object(out).get("format") != SHARD_FORMAT):
        raise ValueError(f"{out}: is no index of shards, so it is not replaced; choose another name")
    shards = []
    for url in progress(expand(pattern)):
        with open_url(url) as stream:
            watched = _Watched(stream)
            count = sum(1 for _ in _samples_of(url, watched))
            watched.finish()
        if not count:
            raise ValueError(f"{url}: {_NO_TAR}")
        name = url if is_remote(url) else str(Path(url).resolve())
        shards.append(Shard(name=name, samples=count, bytes=watched.size, hash=f"sha256:{watched.digest.hexdigest()}"))
    _write_index(out, shards, {})
    return ShardIndex(shards=tuple(shards))


class _Watched:
    """Read a stream and keep size and hash of what was read."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self.size, self.digest = stream, 0, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        self.size += len(data)
        return data

    def finish(self) -> None:
        """Read the rest: a tar file goes on after its last member."""
        while self.read(1 << 24):
            pass


def read_shard(url: str) -> Iterator[ShardSample]:
    """Yield all samples of a shard in order; those without audio, or with a JSON that is not valid, have a ``problem``.

    Raises FileNotFoundError, FetchError, or ValueError for what is no tar file, or a damaged one.
    """
    with open_url(url) as stream:
        for sample in _samples_of(url, stream):
            yield _sample(url, sample)


def _sample(url: str, found: dict[str, Any]) -> ShardSample:
    name, sidecar, problem = f"{url}: {found['__key__']}", Sidecar(), ""
    suffix = next((suffix for suffix in SUFFIXES if suffix[1:] in found), None)
    if suffix is None:
        problem = f"no audio among {listed(key for key in found if not key.startswith('_'))}"
    try:
        sidecar = parse_sidecar(parse_object(found["json"], "JSON")) if "json" in found else sidecar
    except ValueError as error:
        problem = f"sidecar is not valid: {reason(error)}"
    return ShardSample(
        id=str(sidecar.fields.get("id", name)),
        name=name,
        sidecar=sidecar,
        problem=problem,
        data=b"" if suffix is None else found[suffix[1:]],
    )


def _samples_of(url: str, stream: Stream | _Watched) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar file as the library groups them, with errors in our own words."""
    tar = _library().tariterators
    samples = tar.group_by_keys(tar.tar_file_expander(iter([{"url": url, "stream": stream}])))
    while True:
        try:
            sample = next(samples, None)
        except FetchError as error:  # to whose words the library has added its own
            raise FetchError(error.url, error.why) from error
        except _UNREADABLE as error:
            raise ValueError(f"{url}: {_NO_TAR}") from error
        if sample is None:
            return
        yield sample


class ShardStream:
    """Endless samples of one stream of several, a function of (seed, number).

    Stream s of n owns the shards s, s + n, ...; every epoch their order is drawn again, and within windows of
    ``window`` samples, which are held in memory, the order of the samples.
    """

    def __init__(self, index: ShardIndex, *, seed: int, stream: int, streams: int, window: int) -> None:
        if not 0 <= stream < streams or window < 1:
            raise ValueError(f"stream {stream} of {streams}, window {window}: at least 1 each is allowed")
        self._shards = index.shards[stream::streams]
        self.samples = sum(shard.samples for shard in self._shards)
        if not self.samples:
            raise ValueError(f"{len(index.shards)} shards are too few for {streams} streams; make more, smaller shards")
        self.seed, self.stream, self.window = seed, stream, window
        self._loaded: tuple[int, int] | None = None
        self._samples: list[ShardSample] = []
        self._reader: tuple[tuple[int, int], Iterator[ShardSample]] | None = None  # what it gives next, and the rest

    def sample(self, number: int) -> ShardSample:
        """Return the sample of this number; numbers in rising order read every shard once."""
        epoch, place = divmod(number, self.samples)
        window, within = divmod(place, self.window)
        if self._loaded != (epoch, window):
            start = window * self.window
            stop = min(start + self.window, self.samples)
            self._samples = [self._next(epoch, at) for at in range(start, stop)]
            self._loaded = (epoch, window)
        order = generator(self.seed, Purpose.SHARD_WINDOW, self.stream, epoch, window).permutation(len(self._samples))
        return self._samples[order[within]]

    def _next(self, epoch: int, place: int) -> ShardSample:
        if self._reader is None or self._reader[0] != (epoch, place):
            self._reader = ((epoch, place), self._read_from(epoch, place))
        reader = self._reader[1]
        self._reader = ((epoch, place + 1), reader)
        return next(reader)

    def _read_from(self, epoch: int, place: int) -> Iterator[ShardSample]:
        """Yield the samples of an epoch in the order of their shards, from ``place`` on."""
        for number in generator(self.seed, Purpose.SHARD_ORDER, self.stream, epoch).permutation(len(self._shards)):
            shard = self._shards[number]
            if place >= shard.samples:
                place -= shard.samples
                continue
            count = 0
            for sample in read_shard(shard.name):
                count += 1
                if count > place:
                    yield sample
            if count != shard.samples:
                raise StaleIndexError(shard.name, str(count), shard.samples)
            place = 0
