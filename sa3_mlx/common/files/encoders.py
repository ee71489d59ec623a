"""Turn samples into the bytes of a file: WAV here, FLAC, MP3, Vorbis and Opus by libsndfile, AAC by ffmpeg."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import soundfile

from .audio_file import RATES, Audio
from .ffmpeg import AacEncoder
from .wav import Subtype, quantise, sample_bytes, wav_header

SUBTYPES: dict[str, tuple[Subtype, ...]] = {  # by extension, the usual one first
    ".wav": ("pcm16", "pcm24", "float"),
    ".flac": ("pcm16", "pcm24"),
    ".mp3": ("mp3",),
    ".ogg": ("vorbis", "opus"),
    ".opus": ("opus",),
    ".m4a": ("aac",),
}
_ENCODERS: dict[Subtype, tuple[str, str, float | None]] = {  # of libsndfile: format, subtype, compression 0..1
    "pcm16": ("FLAC", "PCM_16", None),
    "pcm24": ("FLAC", "PCM_24", None),
    "mp3": ("MP3", "MPEG_LAYER_III", 0.0),
    "vorbis": ("OGG", "VORBIS", 0.2),
    "opus": ("OGG", "OPUS", 0.64),  # 192 kbit/s of two channels
}
_ALL_RATES = range(RATES[0], RATES[1] + 1)
_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_RATES: dict[str, Container[int]] = {  # Hz, of those that do not take all
    "mp3": _MP3_RATES,
    "opus": (8000, 12000, 16000, 24000, 48000),
    "aac": (*_MP3_RATES, 64000, 88200, 96000),
    "vorbis": range(RATES[0], 200_001),
}
_NOT_ASCII = re.compile("[^\x00-\x7f]")
_OPUS_TAGS_MAX = 51_200  # bytes; libsndfile leaves a damaged file with more
_ENCODED_SAMPLES = 1 << 16  # that an encoder gets at once


def usual_rate(subtype: Subtype, sample_rate: int) -> int:
    """Return the rate that a file gets for sound of ``sample_rate`` Hz: the same, or 48,000 where it cannot have it."""
    return sample_rate if sample_rate in _RATES.get(subtype, _ALL_RATES) else 48_000


def check_rate(subtype: Subtype, sample_rate: int) -> None:
    """Raise ValueError for a rate in Hz that a file of this kind cannot have."""
    allowed = _RATES.get(subtype, _ALL_RATES)
    if sample_rate not in allowed:
        names = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else ", ".join(map(str, allowed))  # type: ignore[call-overload]
        raise ValueError(f"sample rate is {sample_rate} Hz: {subtype} takes {names}")


class FileEncoder(Protocol):
    """Take samples (n, channels) until ``close``, which completes the file; ``discard`` gives it up."""

    def write(self, audio: Audio) -> None: ...
    def close(self) -> None: ...
    def discard(self) -> None: ...


def open_encoder(
    path: Path,
    file: BinaryIO,
    kind: str,
    subtype: Subtype,
    samples: int,
    channels: int,
    sample_rate: int,
    comment: str,
) -> FileEncoder:
    """Open the encoder of a file ``path``, open as ``file``, that is going to have the extension ``kind``.

    Raises ValueError for what the file cannot hold, or where a program is missing.
    """
    check_rate(subtype, sample_rate)
    if kind == ".wav":
        return _WavEncoder(file, samples, channels, sample_rate, subtype, comment)
    if subtype == "aac":
        return _ProgramEncoder(AacEncoder(path, channels, sample_rate, comment))
    return _LibraryEncoder(file, channels, sample_rate, subtype, comment)


class _WavEncoder:
    """Write WAV as it comes."""

    def __init__(
        self, file: BinaryIO, samples: int, channels: int, sample_rate: int, subtype: Subtype, comment: str
    ) -> None:
        self._file, self._subtype = file, subtype
        file.write(wav_header(samples, channels, sample_rate, subtype, comment))

    def write(self, audio: Audio) -> None:
        self._file.write(sample_bytes(audio, self._subtype))

    def close(self) -> None:
        pass

    def discard(self) -> None:
        pass


class _ProgramEncoder:
    """Send samples to ffmpeg."""

    def __init__(self, program: AacEncoder) -> None:
        self._program = program

    def write(self, audio: Audio) -> None:
        for start in range(0, len(audio), _ENCODED_SAMPLES):
            self._program.write(np.clip(audio[start : start + _ENCODED_SAMPLES], -1, 1).astype("<f4").tobytes())

    def close(self) -> None:
        self._program.close()

    def discard(self) -> None:
        self._program.discard()


class _LibraryEncoder:
    """Send samples to libsndfile."""

    def __init__(self, file: BinaryIO, channels: int, sample_rate: int, subtype: Subtype, comment: str) -> None:
        self._output, self._subtype = _Output(file), subtype
        size = len(comment.encode())
        if subtype == "opus" and size > _OPUS_TAGS_MAX:
            limits = f"opus holds {_OPUS_TAGS_MAX:,}; write .ogg with --format vorbis"
            raise ValueError(f"tags of {size:,} bytes, {limits}")
        form, coding, compression = _ENCODERS[subtype]
        kind = {"subtype": coding, "format": form, "compression_level": compression}
        try:
            self._sound = soundfile.SoundFile(self._output, "w", sample_rate, channels, **kind)
        except soundfile.LibsndfileError as error:
            name = form.lower() if coding != "OPUS" else "opus"
            raise ValueError(f"{name} cannot hold {channels} channels at {sample_rate} Hz; write wav") from error
        if comment:  # libsndfile refuses an empty one, and its tags of an mp3 are Latin-1
            self._sound.comment = comment if subtype != "mp3" else _NOT_ASCII.sub(_escaped, comment)

    def write(self, audio: Audio) -> None:
        for start in range(0, len(audio), _ENCODED_SAMPLES):
            block = audio[start : start + _ENCODED_SAMPLES]
            if self._subtype == "pcm16":
                self._sound.write(quantise(block, 16) << 16)  # libsndfile takes the upper bits
            elif self._subtype == "pcm24":
                self._sound.write(quantise(block, 24) << 8)
            else:
                self._sound.write(np.clip(block, -1, 1))
            self._output.check()

    def close(self) -> None:
        self._sound.close()
        self._output.check()

    def discard(self) -> None:
        self._sound.close()


def _escaped(found: re.Match[str]) -> str:
    """Return a character as JSON, which tags are, writes it in ASCII."""
    return json.dumps(found[0])[1:-1]


class _Output:
    """Take what an encoder writes: errors cannot pass through the library, so the first one waits for ``check``."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._position, self._end = file, 0, 0
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the OSError that was met."""
        if self._error is not None:
            raise self._error

    def write(self, data: bytes) -> int:
        """Write where the encoder believes to be; after an error nothing is."""
        self._try(self._file.write, data)
        self._position += len(data)
        self._end = max(self._end, self._position)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place."""
        self._position = (0, self._position, self._end)[whence] + offset
        self._try(self._file.seek, self._position)
        return self._position

    def tell(self) -> int:
        """Return the place."""
        return self._position

    def _try(self, call: Callable[[Any], object], argument: object) -> None:
        try:
            if self._error is None:
                call(argument)
        except OSError as error:
            self._error = error
