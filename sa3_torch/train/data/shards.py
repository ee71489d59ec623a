"""WebDataset shards of recordings: tar files indexed and streamed through the webdataset library [T11e].

A folder holds ``audio-000000.tar`` ..., samples ``KEY.flac`` (or .wav, .ogg, .mp3: the file as it was, or a piece of
it) + ``KEY.json``, and ``index.json`` with names, counts and hashes; ``packing.py`` makes it. The index makes every
place of the stream known: sample i is a function of (seed, i), so a resumed run seeks, and nothing but the step has to
be kept.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.audio import fit_channels, open_blocks, resample
from sa3_mlx.common.files.audio_file import AudioFile, check_finite
from sa3_mlx.common.files.objects import JSON_MAX, parse_object, read_object
from sa3_mlx.common.schema import is_finite, listed, quoted, reason
from sa3_torch.train.run.random import Purpose, generator

from .clip_cache import SAMPLE_RATE, Audio
from .entries import parse_entries, parse_entry
from .recordings import SUFFIXES, Sidecar, parse_sidecar
from .urls import FetchError, Names, Stream, check_url, expand, is_remote, open_url

SHARD_FORMAT = "sa3-shards/1"
PIECE = "sa3-piece"  # in the JSON of a sample: where it lies in its recording
_MAX_SAMPLES = 1_000_000  # of a shard
_TAR_BLOCK = 512  # bytes; a sample of a tar file has at least its header
_NO_TAR = "no tar file with recordings, or damaged or truncated; get a complete copy"
_UNREADABLE = (tarfile.TarError, OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, RecursionError)
_KEPT = 64  # samples of a window that are held after they were taken: a step may ask for them again
_BEGUN = 8  # samples whose reading waits for a thread: a run that ends waits for it
_CONTEXT = 1024  # samples of a file read around a piece that is resampled


def library() -> Any:
    """Return the webdataset library. Raises ImportError with what to do."""
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
    """Shards with names that can be opened, of whole recordings, or of pieces that overlap by ``overlap_seconds``."""

    shards: tuple[Shard, ...]
    overlap_seconds: float | None = None

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Place a piece in its recording: the ``number``-th, from 0, ``of`` several. The next one begins after ``seconds``;
    what it holds beyond these is in the next one, too."""

    number: int
    of: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class ShardSample:
    """One recording of a shard, or a piece of one, undecoded: the bytes of its file."""

    id: str
    name: str  # the shard and the sample's key in it, for errors
    sidecar: Sidecar
    data: bytes
    problem: str = ""  # why it cannot be used
    piece: Piece | None = None

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


def write_index(
    path: Path, shards: Sequence[Shard], left_out: dict[str, list[str]], overlap_seconds: float | None = None
) -> None:
    """Write an index; ``overlap_seconds``: what pieces of recordings share with the next one, None for whole ones."""
    about = {"format": SHARD_FORMAT, "shards": [asdict(shard) for shard in shards], "left_out": left_out}
    write_json(path, about if overlap_seconds is None else {**about, "overlap_seconds": overlap_seconds})


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
    overlap = data.get("overlap_seconds")
    if overlap is not None and not (is_finite(overlap) and overlap >= 0):
        raise ValueError(f"{url}: overlap_seconds is {quoted(overlap)}; expected a number of seconds, at least 0")
    return ShardIndex(
        shards=tuple(Shard(**{**asdict(shard), "name": name}) for shard, name in zip(shards, named, strict=True)),
        overlap_seconds=overlap,
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
    write_index(out, shards, {})
    return ShardIndex(shards=tuple(shards))


def verify_shards(place: str, *, progress: Callable[[Sequence[Shard]], Iterable[Shard]] = iter) -> int:
    """Read the shards of an index through and compare them with its hashes; return how many they are.

    Training does not, as a stream is read only as far as it is used. Raises ValueError as ``open_index``, and for a
    shard that has changed; FetchError.
    """
    shards = open_index(place).shards
    for shard in progress(shards):
        with open_url(shard.name) as stream:
            watched = _Watched(stream)
            watched.finish()
        if f"sha256:{watched.digest.hexdigest()}" != shard.hash:
            raise ValueError(f"{shard.name}: has changed since it was indexed; get a good copy, or index it again")
    return len(shards)


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
    name, sidecar, problem, piece = f"{url}: {found['__key__']}", Sidecar(), "", None
    suffix = next((suffix for suffix in SUFFIXES if suffix[1:] in found), None)
    if suffix is None:
        problem = f"no audio among {listed(key for key in found if not key.startswith('_'))}"
    try:
        sidecar = parse_sidecar(parse_object(found["json"], "JSON")) if "json" in found else sidecar
        piece = parse_entry(Piece, sidecar.fields[PIECE], PIECE) if PIECE in sidecar.fields else None
    except ValueError as error:
        problem = f"sidecar is not valid: {reason(error)}"
    recording = str(sidecar.fields.get("id", name))
    return ShardSample(
        id=recording if piece is None else f"{recording}#{piece.number + 1}",
        name=name,
        sidecar=sidecar,
        problem=problem,
        piece=piece,
        data=b"" if suffix is None else found[suffix[1:]],
    )


def _samples_of(url: str, stream: Stream | _Watched) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar file as the library groups them, with errors in our own words."""
    tar = library().tariterators
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
    ``window`` samples, which are held in memory, the order of the samples. For each sample that is taken in order a
    thread reads one of the next window, and those that were taken a while ago are let go: a window and ``_KEPT`` more
    are held, and none has to be waited for.
    """

    def __init__(self, index: ShardIndex, *, seed: int, stream: int, streams: int, window: int) -> None:
        if not 0 <= stream < streams or window < 1:
            raise ValueError(f"stream {stream} of {streams}, window {window}: at least 1 each is allowed")
        self._shards = index.shards[stream::streams]
        self.samples = sum(shard.samples for shard in self._shards)
        if not self.samples:
            raise ValueError(f"{len(index.shards)} shards are too few for {streams} streams; make more, smaller shards")
        self.seed, self.stream, self.window = seed, stream, window
        self._loaded: tuple[int, int] | None = None  # epoch and window
        self._samples: list[ShardSample | None] = []  # None: let go
        self._taken = 0  # how many of them
        self._thread = ThreadPoolExecutor(1, "shards")  # the only one that reads
        self._ahead: list[Future[ShardSample]] = []  # of the next window, from its start
        self._reader: tuple[tuple[int, int], Iterator[ShardSample]] | None = None  # what it gives next, and the rest

    def sample(self, number: int) -> ShardSample:
        """Return the sample of this number; numbers in rising order read every shard once."""
        epoch, place = divmod(number, self.samples)
        window, within = divmod(place, self.window)
        if self._loaded != (epoch, window):
            self._load(epoch, window)
        order = generator(self.seed, Purpose.SHARD_WINDOW, self.stream, epoch, window).permutation(len(self._samples))
        if self._samples[order[within]] is None:  # asked for once more, long afterwards
            self._load(epoch, window)
        found = self._samples[order[within]]
        assert found is not None
        for taken in range(max(self._taken - _KEPT, 0), within - _KEPT):
            self._samples[order[taken]] = None
        self._taken = max(self._taken, within)
        self._read_ahead()
        return found

    def _load(self, epoch: int, window: int) -> None:
        """Make a window the present one: of the one that follows the present one, a part is there already."""
        ahead, self._ahead = self._ahead if (epoch, window) == self._following() else [], []
        self._loaded, self._taken = None, 0
        rest = self._places(window)[len(ahead) :]
        self._samples = [future.result() for future in ahead]
        self._samples += [self._thread.submit(self._next, epoch, place).result() for place in rest]
        self._loaded = (epoch, window)

    def _places(self, window: int) -> range:
        return range(window * self.window, min((window + 1) * self.window, self.samples))

    def _following(self) -> tuple[int, int] | None:
        if self._loaded is None:
            return None
        epoch, window = self._loaded
        return (epoch, window + 1) if (window + 1) * self.window < self.samples else (epoch + 1, 0)

    def _read_ahead(self) -> None:
        """Begin to read samples of the next window, until they are as many as were taken of this one."""
        following = self._following()
        assert following is not None
        epoch, window = following
        free = _BEGUN - sum(not future.done() for future in self._ahead)
        for place in self._places(window)[len(self._ahead) : self._taken][: max(free, 0)]:
            self._ahead.append(self._thread.submit(self._next, epoch, place))

    def _next(self, epoch: int, place: int) -> ShardSample:
        if self._reader is None or self._reader[0] != (epoch, place):
            self._reader = ((epoch, place), self._read_from(epoch, place))
        (_, reader), self._reader = self._reader, None
        sample = next(reader)
        self._reader = ((epoch, place + 1), reader)
        return sample

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
