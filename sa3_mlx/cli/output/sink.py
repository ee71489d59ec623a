"""Take finished audio to files and standard output while the rest of it is still being decoded.

A file is whole or not there: its bytes are in a temporary one until the last. A pipe ends early when a run fails.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Protocol, Self

from sa3_mlx.common.files.audio import AudioWriter
from sa3_mlx.common.files.audio_file import Audio, check_finite
from sa3_mlx.common.files.encoders import SUBTYPES
from sa3_mlx.common.files.wav import Subtype, sample_bytes, wav_header
from sa3_mlx.common.terminal import write_stdout

STDOUT = Path("-")


class Sink(Protocol):
    """Take a clip's audio piece by piece, in a ``with`` statement."""

    def write(self, audio: Audio) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None: ...


def open_sink(path: Path, samples: int, channels: int, sample_rate: int, subtype: Subtype, *, comment: str) -> Sink:
    """Open a file by its extension, or a WAV on standard output for "-"."""
    if path == STDOUT:
        return PipeSink(samples, channels, sample_rate, subtype, comment=comment)
    return AudioWriter(path, samples, channels, sample_rate, subtype, comment=comment)


def check_pipe(subtype: str) -> None:
    """Raise ValueError when standard output is a terminal or closed, and for samples that no WAV holds."""
    if subtype not in SUBTYPES[".wav"]:
        raise ValueError(f"--out -: a WAV cannot hold {subtype!r}; allowed: {', '.join(SUBTYPES['.wav'])}")
    if sys.stdout is None:
        raise ValueError("--out -: standard output is closed; give the name of a file")
    if sys.stdout.isatty():
        raise ValueError(f"--out -: a {subtype} WAV does not belong on a terminal; add for example | ffplay -i -")


class PipeSink:
    """Write a WAV to standard output; its header goes out at once, with the length that is going to be reached."""

    def __init__(self, samples: int, channels: int, sample_rate: int, subtype: Subtype, *, comment: str) -> None:
        self._subtype = subtype
        write_stdout(wav_header(samples, channels, sample_rate, subtype, comment))

    def write(self, audio: Audio) -> None:
        check_finite(audio, "standard output")
        write_stdout(sample_bytes(audio, self._subtype))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        pass
