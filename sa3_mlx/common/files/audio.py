"""Read, resample and write audio files, with how they were made in their tags; measure and scale audio.

Audio is float32 (L, channels), full scale 1.0, L samples. Lengths in seconds and frames are in ``lengths``.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np
import soxr

from . import ffmpeg
from .atomic import new_file
from .audio_file import BLOCK_SAMPLES, RATES, Audio, Sound, check_finite, check_name, open_audio_file
from .encoders import SUBTYPES, open_encoder
from .wav import Subtype, read_wav_comment

_TURNED = 48  # samples, about a millisecond


def read_audio(path: str | Path, sample_rate: int, channels: int) -> Audio:
    """Read a whole file at ``sample_rate`` with ``channels`` -> (L, channels) float32.

    Mono is repeated, of more channels the first ones are taken, the level is left alone [B35].
    Raises FileNotFoundError for a missing file; ValueError for one that is unreadable, truncated, empty or not finite.
    """
    return np.concatenate(list(read_blocks(path, sample_rate, channels)))


def read_blocks(
    path: str | Path, sample_rate: int, channels: int, block_samples: int = BLOCK_SAMPLES
) -> Generator[Audio, None, None]:
    """Yield the audio of ``read_audio`` without holding the file in memory.

    Pieces have at most about ``block_samples``, at either rate. Raises the same errors, some of them only when the bad
    place is reached.
    """
    with open_audio_file(Path(path)) as file:
        yield from open_blocks(file, sample_rate, channels, block_samples)


def open_blocks(
    file: Sound, sample_rate: int, channels: int, block_samples: int = BLOCK_SAMPLES
) -> Generator[Audio, None, None]:
    """Yield what ``read_blocks`` does of an open file, from its start."""
    read = given = 0
    stream = None
    if file.samplerate != sample_rate:
        _check_rates(file.samplerate, sample_rate)
        # soxr crashes where there is no room for what comes out of a piece
        block_samples = max(1, block_samples * min(file.samplerate, sample_rate) // sample_rate)
        stream = soxr.ResampleStream(file.samplerate, sample_rate, channels, dtype="float32", quality="VHQ")
    for raw in file.blocks(block_samples):
        read += len(raw)
        block = fit_channels(raw, channels)
        block = block if stream is None else stream.resample_chunk(block)
        given += len(block)
        if len(block):
            yield block
    rest = np.zeros((0, channels), np.float32)
    if stream is not None and len(rest := stream.resample_chunk(rest, last=True)):
        yield rest
    if not given + len(rest):
        raise ValueError(
            f"{file.label}: {read} samples at {file.samplerate} Hz are less than one sample at {sample_rate} Hz"
        )


def check_audio(audio: object, name: str, channels: int) -> None:
    """Raise ValueError unless ``audio`` is a finite, non-empty float32 array (L, channels)."""
    if not isinstance(audio, np.ndarray) or audio.dtype != np.float32:
        kind = str(audio.dtype) if isinstance(audio, np.ndarray) else type(audio).__name__
        raise ValueError(f"{name}: expected a float32 numpy array (samples, {channels}), got {kind}")
    if audio.ndim != 2 or audio.shape[1] != channels or not audio.shape[0]:
        raise ValueError(f"{name}: expected shape (samples, {channels}) with at least 1 sample, got {audio.shape}")
    check_finite(audio, name)


def fit_channels(audio: Audio, channels: int) -> Audio:
    """Return (L, channels) of (L, any): mono is repeated, of more channels the first ones are taken [B35].

    Raises ValueError for fewer channels, mono aside.
    """
    if audio.shape[1] == 1:
        return np.repeat(audio, channels, axis=1)
    if audio.shape[1] < channels:
        raise ValueError(f"audio has {audio.shape[1]} channels: allowed are 1 or at least {channels}")
    return np.ascontiguousarray(audio[:, :channels])


def fit_length(audio: Audio, samples: int) -> Audio:
    """Crop, or pad with zeros at the end, to exactly ``samples`` [B35]."""
    return np.pad(audio[:samples], ((0, max(0, samples - len(audio))), (0, 0)))


def going_on(audio: Audio, samples: int) -> Audio:
    """Return so many samples that may follow (L, channels): its mirror image, there and back where it is shorter.

    A mirror image has a corner where it begins. For the first ``_TURNED`` samples it is turned about the last one of
    the audio, which keeps the slope, and comes back from there.
    """
    if not samples:
        return audio[:0]
    image: Audio = np.pad(audio[-samples - 1 :], ((0, samples), (0, 0)), mode="reflect")[-samples:]
    steps = np.arange(min(_TURNED, samples), dtype=np.float32)[:, None]
    image[: len(steps)] = audio[-1] - np.cos(np.pi * steps / _TURNED) * (image[: len(steps)] - audio[-1])
    return image


def resample(audio: Audio, from_rate: int, to_rate: int) -> Audio:
    """Resample (L, channels) with soxr at its highest quality; unchanged when the rates are equal.

    Raises ValueError for an impossible rate and for audio of less than one sample at ``to_rate``.
    """
    _check_rates(from_rate, to_rate)
    if from_rate == to_rate:
        return audio
    result: Audio = soxr.resample(audio, from_rate, to_rate, quality="VHQ")
    if not len(result):
        raise ValueError(f"{len(audio)} samples at {from_rate} Hz are less than one sample at {to_rate} Hz")
    return result


def resampled_length(samples: int, from_rate: int, to_rate: int) -> int:
    """Return how many samples ``resample`` makes of so many."""
    return samples if from_rate == to_rate else (samples * to_rate + from_rate // 2) // from_rate


def _check_rates(*rates: int) -> None:
    for rate in rates:
        if not RATES[0] <= rate <= RATES[1]:
            raise ValueError(f"sample rate is {rate} Hz: allowed are {RATES[0]} to {RATES[1]}")


def check_output(path: str | Path, subtype: str, *, overwrite: bool, size_bytes: int = 0) -> None:
    """Refuse, before any work, an audio file that cannot be written.

    Raises ValueError for an unknown extension or format, and as ``check_target``.
    """
    path = Path(path)
    allowed = _subtypes(path)
    if subtype not in allowed:
        raise ValueError(f"{path}: {path.suffix} cannot hold {subtype!r}; allowed: {', '.join(allowed)}")
    if subtype == "aac" and not ffmpeg.available():
        raise ValueError(f"{path}: {path.suffix} is written by ffmpeg, which is not here; {ffmpeg.ADVICE}")
    check_target(path, overwrite=overwrite, size_bytes=size_bytes)


def usual_subtype(path: Path) -> Subtype:
    """Return what samples become in a file with this extension. Raises ValueError for an unknown one."""
    return _subtypes(path)[0]


def _subtypes(path: Path) -> tuple[Subtype, ...]:
    allowed = SUBTYPES.get(path.suffix.lower())
    if allowed is None:
        raise ValueError(f"{path}: unknown audio extension {path.suffix!r}; allowed: {', '.join(SUBTYPES)}")
    return allowed


def check_target(path: Path, *, overwrite: bool, size_bytes: int = 0) -> None:
    """Refuse, before any work, a file that cannot be written.

    Raises ValueError for a name that is too long, for a folder, for an existing file without ``overwrite``, for a link
    that leads nowhere, for a folder that is not writable and a disk with less than ``size_bytes`` free;
    FileNotFoundError for a missing folder.
    """
    try:
        path.lstat()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(
                f"{path.name[:40]}...: the name is too long for this disk; choose a shorter one"
            ) from error
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it first")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; give a file name")
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"{path}: is a link to {path.readlink()}, which is not there; remove it or choose another name"
        )
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; choose another name or overwrite it with --force")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent}: the folder is not writable")
    free = shutil.disk_usage(path.parent).free
    if free < size_bytes:
        raise ValueError(f"{path}: needs {size_bytes:,} bytes and the disk has {free:,}; free some space")


def write_audio(
    path: str | Path, audio: Audio, sample_rate: int, subtype: Subtype = "pcm16", *, comment: str = ""
) -> None:
    """Write (L, channels) by extension; ``comment`` is the provenance, JSON, read back by ``read_tags``.

    Equal arguments give equal bytes, but for the serial number of an Ogg file. Beyond full scale all clip but float.
    Raises ValueError for a wrong format or audio that is not finite, OSError (one line) when the disk refuses.
    """
    path = Path(path)
    if audio.ndim != 2:
        raise ValueError(f"{path}: audio must be (samples, channels), got {audio.shape}")
    with AudioWriter(path, len(audio), audio.shape[1], sample_rate, subtype, comment=comment) as writer:
        writer.write(audio)


class AudioWriter:
    """Write an audio file piece by piece; ``write_audio`` is one piece. Use it in a ``with`` statement.

    An existing file is replaced, and only by a complete one, at the end of the ``with`` statement.
    """

    def __init__(
        self, path: str | Path, samples: int, channels: int, sample_rate: int, subtype: Subtype, *, comment: str = ""
    ) -> None:
        """Begin a file of ``samples`` in all. Raises as ``write_audio``."""
        self.path = Path(path)
        check_output(self.path, subtype, overwrite=True)
        self._expected, self._written = samples, 0
        kind = self.path.suffix.lower()
        with ExitStack() as stack:
            partial = stack.enter_context(new_file(self.path))
            file = stack.enter_context(partial.open("wb"))
            self._encoder = open_encoder(partial, file, kind, subtype, samples, channels, sample_rate, comment)
            self._finish = stack.pop_all()

    def write(self, audio: Audio) -> None:
        """Take the next samples (n, channels). Raises ValueError for samples that are not finite."""
        check_finite(audio, str(self.path))
        self._written += len(audio)
        self._encoder.write(audio)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._finish:
            if error is not None:
                self._encoder.discard()
                raise error
            self._encoder.close()
            if self._written != self._expected:
                raise ValueError(f"{self.path}: {self._written} samples came, {self._expected} were announced")


def read_tags(path: str | Path) -> str:
    """Return the comment that ``write_audio`` left in a file, "" if there is none.

    Raises FileNotFoundError for a missing file and ValueError for one that is not audio.
    """
    path = Path(path)
    check_name(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such audio file")
    if comment := read_wav_comment(path):
        return comment
    with open_audio_file(path) as file:
        return str(file.comment)


def clipped_share(audio: Audio) -> float:
    """Return the share of sample frames, 0..1, in which some channel is beyond full scale."""
    if not len(audio) or (audio.max() <= 1 and audio.min() >= -1):  # the usual case, without copies of the audio
        return 0.0
    return float((np.abs(audio) > 1).any(axis=1).mean())


def peak_db(audio: Audio) -> float:
    """Return the highest absolute sample in dB of full scale, -inf for silence."""
    peak = float(np.abs(audio).max(initial=0.0))
    return 20 * float(np.log10(peak)) if peak > 0 else -float("inf")


def apply_peak(audio: Audio, limit_db: float) -> Audio:
    """Scale the whole audio down so that its peak is ``limit_db`` (<= 0); audio below the limit stays as it is.

    Raises ValueError for a limit outside -60..0.
    """
    if not -60 <= limit_db <= 0:
        raise ValueError(f"peak is {limit_db} dB: allowed are -60 to 0")
    excess = peak_db(audio) - limit_db
    return audio if excess <= 0 else (audio * np.float32(10 ** (-excess / 20))).astype(np.float32)
