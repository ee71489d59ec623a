"""Open audio files for reading, block by block, without trust in what their headers say.

Rate and channels are bounded before anything is allocated, lengths are what was read: a FLAC or WAV that a program
wrote to a pipe carries none. What libsndfile does not know goes to ffmpeg, where it is of a kind that ffmpeg is given.
Every error is one line that names the file, in words of our own.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
import soundfile
from numpy.typing import NDArray

from sa3_mlx.common.terminal import hushed

from . import ffmpeg

Audio = NDArray[np.float32]

RATES = (1_000, 768_000)  # Hz
CHANNELS = (1, 32)
BLOCK_SAMPLES = 1 << 18
_UNKNOWN_SAMPLES = 1 << 62  # libsndfile's word for a length that is not in the header lies beyond it
# What programs write as the bytes of a WAV that goes to a pipe: about 2 GiB less or 4 GiB less some pages
_STREAMED_BYTES = (range(2**31 - 2**13, 2**31 + 1), range(2**32 - 2**16, 2**32))
_FILLED_MAX = 1 << 13  # samples by which a decoder may fill up the last frame of a file
_OTHERS = (1, 4)  # libsndfile's codes for what another program may read
_REASONS = {  # of libsndfile's codes
    1: "its format is not known: wav, flac, ogg, mp3 and aiff are read, with ffmpeg also m4a, aac and webm",
    2: "the system cannot read it",
    3: "its header is damaged",
    4: "its encoding is not supported",
}


class _Blocks(ABC):
    """Read an open sound piece by piece to its end, and see that it is whole."""

    label: str  # what errors call it
    samplerate: int  # Hz
    channels: int

    @property
    @abstractmethod
    def samples(self) -> int | None:
        """Return the length that the header gives, None where it gives none."""

    @abstractmethod
    def take(self, count: int) -> Audio:
        """Read the next samples, fewer at the end -> (n, channels). Raises ValueError for damaged data."""

    def blocks(self, block_samples: int = BLOCK_SAMPLES) -> Generator[Audio, None, None]:
        """Yield the samples from here to the end, (n, channels) float32.

        Raises ValueError for a file that is damaged, truncated or empty, or has samples that are no finite numbers.
        """
        read = 0
        while len(block := self.take(block_samples)):
            check_finite(block, self.label, read)
            read += len(block)
            yield block
        if read < (self.samples or 0) or self._cut_short():
            raise ValueError(
                f"{self.label}: the file is truncated, it ends before the length in its header; get a complete copy"
            )
        if not read:
            raise ValueError(f"{self.label}: the file holds no audio (0 samples)")

    def _cut_short(self) -> bool:
        """Tell whether anything else says that the end is missing."""
        return False

    def _check_header(self) -> None:
        """Raise ValueError for impossible rates and channels."""
        for what, value, (low, high) in (("Hz", self.samplerate, RATES), ("channels", self.channels, CHANNELS)):
            if not low <= value <= high:
                said = f"its header says {value:,} {what}; {low:,} to {high:,} are allowed"
                raise ValueError(f"{self.label}: cannot be read as audio ({said})")


class AudioFile(_Blocks, soundfile.SoundFile):  # type: ignore[misc]  # the library is untyped
    """Hold an open sound that libsndfile reads; ``name`` is what errors call it."""

    def __init__(self, source: Path | BinaryIO, name: str) -> None:
        """Open a path or an open file. Raises ValueError for what is no audio and for impossible rates and channels."""
        self.label = name
        try:
            with hushed():  # libmpg123 takes notes of what it meets
                super().__init__(source)
        except (soundfile.LibsndfileError, OSError) as error:
            raise self._unreadable(error) from error
        try:
            self._check_header()
        except ValueError:
            self.close()
            raise

    @property
    def samples(self) -> int | None:
        """Return the length that the header gives, None where it gives none."""
        return int(self.frames) if self.frames < _UNKNOWN_SAMPLES else None

    def seekable(self) -> bool:
        """Tell whether a place can be gone to; without a length in the header a file is read from its start only."""
        return self.samples is not None and bool(super().seekable())

    def take(self, count: int) -> Audio:
        """Read the next samples, fewer at the end -> (n, channels). Raises ValueError for damaged data."""
        try:
            # only libmpg123 prints notes, and whoever is hushed waits for others: decoders would take turns
            with hushed() if self.format == "MP3" else nullcontext():
                block: Audio = self.read(count, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise self._unreadable(error) from error
        return block

    def _cut_short(self) -> bool:
        """Tell whether a WAV or AIFF lost its end: libsndfile reads what is there, and says so only in its log."""
        found = re.search(r"(?:data|SSND)\s*:\s*(\d+) \(should be (\d+)\)", self.extra_info)
        if found is None:
            return False
        declared = int(found[1])
        return int(found[2]) < declared and not any(declared in sizes for sizes in _STREAMED_BYTES)

    def _unreadable(self, error: Exception) -> ValueError:
        if isinstance(error, soundfile.LibsndfileError):
            reason = _REASONS.get(error.code, "its data is damaged")
        else:
            reason = getattr(error, "strerror", None) or "the system cannot read it"
        return ValueError(f"{self.label}: cannot be read as audio ({reason})")


class DecodedFile(_Blocks):
    """Hold an open sound that ffmpeg decodes, from its start to its end and in no other way."""

    def __init__(self, path: Path, name: str, kind: str) -> None:
        """Open a file of a kind that ``ffmpeg.demuxer`` named. Raises ValueError as ``AudioFile``."""
        self.label, self._path, self._read = name, path, 0
        self._decoder: ffmpeg.SoundDecoder | None = None
        with self._named():
            self._found = ffmpeg.describe(path, kind)
        self.samplerate, self.channels = self._found.sample_rate, self._found.channels
        self.comment, self.subtype = self._found.comment, self._found.codec.upper()
        self._check_header()

    @property
    def samples(self) -> int | None:
        """Return the length that the header gives, None where it gives none."""
        return self._found.samples

    def seekable(self) -> bool:
        """Tell whether a place can be gone to."""
        return False

    def take(self, count: int) -> Audio:
        """Read the next samples, fewer at the end -> (n, channels). Raises ValueError for damaged data.

        What fills up the last frame, beyond the length in the header, is left out.
        """
        left = None if self.samples is None else self.samples - self._read
        if left is not None and left > 0:
            return self._decoded(min(count, left))
        if left != 0:
            return self._decoded(count)
        rest = self._decoded(_FILLED_MAX + 1)
        return rest if len(rest) > _FILLED_MAX else rest[:0]

    def close(self) -> None:
        """End the decoder."""
        if self._decoder is not None:
            self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decoded(self, count: int) -> Audio:
        size = 4 * self.channels
        with self._named():
            self._decoder = self._decoder or ffmpeg.SoundDecoder(self._path, self._found)
            data = self._decoder.read(size * count)
        block = np.frombuffer(data[: len(data) // size * size], "<f4").reshape(-1, self.channels)
        self._read += len(block)
        return block.astype(np.float32)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ffmpeg.ProgramError as error:
            raise ValueError(f"{self.label}: cannot be read as audio ({error})") from error


Sound = AudioFile | DecodedFile


def open_audio_file(path: Path) -> Sound:
    """Open the sound in a file. Raises FileNotFoundError for a missing one, ValueError for one that is no audio."""
    check_name(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such audio file")
    if not path.is_file():
        raise ValueError(f"{path}: not a file; expected an audio file such as wav or flac")
    try:
        return AudioFile(path, str(path))
    except ValueError as error:
        unknown = isinstance(error.__cause__, soundfile.LibsndfileError) and error.__cause__.code in _OTHERS
        kind = ffmpeg.demuxer(path) if unknown else None
        if kind is None:
            raise
    return DecodedFile(path, str(path), kind)


def check_name(path: Path) -> None:
    """Refuse a name that is not UTF-8: libsndfile and the tags of what is made take no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{str(path)!r}: the name of the file is not UTF-8; rename the file") from error


def check_finite(audio: Audio, name: str, first: int = 0) -> None:
    """Raise ValueError that names the first sample that is NaN or infinite; ``first`` is the number of sample 0."""
    finite = np.isfinite(audio).all(axis=1)
    if not finite.all():
        number = first + int(np.argmin(finite))
        raise ValueError(f"{name}: sample {number} is not a finite number; repair the audio first")
