"""Open audio files for reading, block by block, without trust in what their headers say.

Rate and channels are bounded before anything is allocated, lengths are what was read: a FLAC or WAV that a program
wrote to a pipe carries none. Every error is one line that names the file, in words of our own.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from sa3_mlx.common.terminal import hushed

Audio = NDArray[np.float32]

RATES = (1_000, 768_000)  # Hz
CHANNELS = (1, 32)
BLOCK_SAMPLES = 1 << 18
_UNKNOWN_SAMPLES = 1 << 62  # libsndfile's word for a length that is not in the header lies beyond it
# What programs write as the bytes of a WAV that goes to a pipe: about 2 GiB less or 4 GiB less some pages
_STREAMED_BYTES = (range(2**31 - 2**13, 2**31 + 1), range(2**32 - 2**16, 2**32))
_REASONS = {  # of libsndfile's codes
    1: "its format is not known: wav, flac, ogg, mp3 and aiff are read",
    2: "the system cannot read it",
    3: "its header is damaged",
    4: "its encoding is not supported",
}


class AudioFile(soundfile.SoundFile):  # type: ignore[misc]  # the library is untyped
    """Hold an open sound; ``name`` is what errors call it."""

    def __init__(self, source: Path | BinaryIO, name: str) -> None:
        """Open a path or an open file. Raises ValueError for what is no audio and for impossible rates and channels."""
        self.label = name
        try:
            with hushed():  # libmpg123 takes notes of what it meets
                super().__init__(source)
        except (soundfile.LibsndfileError, OSError) as error:
            raise self._unreadable(error) from error
        for what, value, (low, high) in (("Hz", self.samplerate, RATES), ("channels", self.channels, CHANNELS)):
            if not low <= value <= high:
                self.close()
                said = f"its header says {value:,} {what}; {low:,} to {high:,} are allowed"
                raise ValueError(f"{name}: cannot be read as audio ({said})")

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
            with hushed():
                block: Audio = self.read(count, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError) as error:
            raise self._unreadable(error) from error
        return block

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


def open_audio_file(path: Path) -> AudioFile:
    """Open the sound in a file. Raises FileNotFoundError for a missing one, ValueError for one that is no audio."""
    check_name(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such audio file")
    if not path.is_file():
        raise ValueError(f"{path}: not a file; expected an audio file such as wav or flac")
    return AudioFile(path, str(path))


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
