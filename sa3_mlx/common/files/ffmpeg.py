"""Read and write with the program ffmpeg what libsndfile cannot: AAC in .m4a, WebM, and what else it decodes.

It runs as a process of its own: no shell, no network, only the one file, with the demuxer that the first bytes ask for,
bounds on what it allocates and says, and a limit on how long it may be silent. Its words do not reach the user.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

ADVICE = "install ffmpeg 5 or later (brew install ffmpeg, apt install ffmpeg)"
SILENT_SECONDS = 60.0  # may pass until it takes or gives the next block
_SAID_MAX = 1 << 25  # bytes of a description of a file
_QUIET = ("-nostdin", "-v", "error", "-max_alloc", str(1 << 28), "-threads", "1")
_BITS_A_SECOND = {1: "160k", 2: "256k"}  # of AAC by channels
_ESCAPED = str.maketrans({letter: f"\\{letter}" for letter in "=;#\\\n"})  # in its files of tags
_HEAD_BYTES = 16
_MAGIC: tuple[tuple[int, bytes, str], ...] = (  # place, bytes, demuxer
    (4, b"ftyp", "mov"),
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (0, b"OggS", "ogg"),
    (0, b"caff", "caf"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (0, b"MAC ", "ape"),
    (0, b"wvpk", "wv"),
    (0, b"TTA1", "tta"),
    (0, b"MPCK", "mpc8"),
    (0, b"#!AMR", "amr"),
    (0, b"DSD ", "dsf"),
    (0, b"\x0bw", "ac3"),
    (8, b"AVI ", "avi"),
    (8, b"WAVE", "wav"),
    (8, b"AIFC", "aiff"),
)
T = TypeVar("T")


class ProgramError(ValueError):
    """Report that ffmpeg is missing, or does not take a file; a short reason in our own words."""


@dataclass(frozen=True)
class Description:
    """Hold what the header of a file says of its first sound."""

    demuxer: str
    codec: str
    sample_rate: int
    channels: int
    samples: int | None  # None where the header does not say it
    comment: str


def available() -> bool:
    """Tell whether ffmpeg, with ffprobe beside it, is on the path."""
    return shutil.which("ffmpeg") is not None and shutil.which("ffprobe") is not None


def demuxer(path: Path) -> str | None:
    """Return what the first bytes of a file ask for, None where they are nothing that ffmpeg is given."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for place, magic, name in _MAGIC:
        if head[place : place + len(magic)] == magic:
            return name
    is_adts = len(head) > 1 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0
    return "aac" if is_adts else None


def describe(path: Path, kind: str) -> Description:
    """Ask ffprobe about the first sound of a file. Raises ProgramError without the programs and for damaged files."""
    shown = "stream=codec_name,sample_rate,channels,duration_ts,time_base:stream_tags=comment:format_tags=comment"
    _need()
    command = ["ffprobe", "-v", "error", "-max_alloc", str(1 << 28), *_input(path, kind)]
    try:
        said = json.loads(_said([*command, "-select_streams", "a:0", "-show_entries", shown, "-of", "json"]))
        stream = said["streams"][0]
        tags = said.get("format", {}).get("tags", {}) | stream.get("tags", {})
        comment = next((str(text) for name, text in tags.items() if name.lower() == "comment"), "")
        return Description(
            demuxer=kind,
            codec=str(stream["codec_name"]),
            sample_rate=int(stream["sample_rate"]),
            channels=int(stream["channels"]),
            samples=_samples(stream),
            comment=comment,
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ProgramError):
            raise
        raise ProgramError("there is no sound in it, or it is damaged") from error


def _samples(stream: dict[str, Any]) -> int | None:
    """Return the length where it is given in samples, as in .m4a."""
    fine = stream.get("time_base") == f"1/{int(stream['sample_rate'])}"
    return int(stream["duration_ts"]) if fine and int(stream.get("duration_ts", 0)) > 0 else None


class SoundDecoder:
    """Decode the first sound of a file to float32 in native order, bytes in the order of samples and channels."""

    def __init__(self, path: Path, found: Description) -> None:
        _need()
        form = ["-ar", str(found.sample_rate), "-ac", str(found.channels), "-f", "f32le", "-c:a", "pcm_f32le", "pipe:1"]
        self._process = _start(
            ["ffmpeg", *_QUIET, "-xerror", *_input(path, found.demuxer), "-map", "0:a:0", *form],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )

    def read(self, count: int) -> bytes:
        """Return the next bytes, fewer at the end. Raises ProgramError for damage and where nothing comes."""
        output = self._process.stdout
        assert output is not None
        data = _watched(self._process, lambda: output.read(count))
        if len(data) < count and _watched(self._process, self._process.wait):
            raise ProgramError("its data is damaged")
        return data

    def close(self) -> None:
        """End the process, whether or not all was read."""
        _end(self._process)


class AacEncoder:
    """Encode float32 samples to AAC in an .m4a file, with a comment in its tags."""

    def __init__(self, path: Path, channels: int, sample_rate: int, comment: str) -> None:
        """Begin a file, which exists and is empty. Raises ProgramError without ffmpeg."""
        _need()
        sound = ["-f", "f32le", "-ar", str(sample_rate), "-ac", str(channels), "-i", "pipe:0"]
        coded = ["-c:a", "aac", "-b:a", _BITS_A_SECOND.get(channels, "256k"), "-movie_timescale", str(sample_rate)]
        equal = ["-fflags", "+bitexact", "-flags:a", "+bitexact"]  # no time of day, no version
        with ExitStack() as stack:
            self._said = stack.enter_context(tempfile.TemporaryFile())
            tags = stack.enter_context(tempfile.NamedTemporaryFile(prefix="sa3-"))  # a comment is too long for a word
            tags.write(f";FFMETADATA1\ncomment={comment.translate(_ESCAPED)}\n".encode())
            tags.flush()
            both = [*sound, "-f", "ffmetadata", "-i", f"file:{tags.name}", "-map", "0:a", "-map_metadata", "1"]
            self._process = _start(
                ["ffmpeg", "-v", "error", *both, *coded, *equal, "-f", "ipod", "-y", _place(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=self._said,
            )
            stack.callback(_end, self._process)
            self._open = stack.pop_all()

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises OSError where the disk, or ffmpeg, refuses."""
        self._input(lambda pipe: pipe.write(data))

    def close(self) -> None:
        """Bring the file to its end. Raises OSError where the disk, or ffmpeg, refuses."""
        with self._open:
            self._input(lambda pipe: pipe.close())
            if _watched(self._process, self._process.wait):
                raise self._refusal()

    def discard(self) -> None:
        """End the process; the file is of no use."""
        self._open.close()

    def _input(self, use: Callable[[IO[bytes]], object]) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            _watched(self._process, lambda: use(pipe))
        except BrokenPipeError as error:
            _watched(self._process, self._process.wait)
            raise self._refusal() from error

    def _refusal(self) -> OSError:
        """Return the error of the system behind the end of the process, by what it said and how it ended."""
        self._said.seek(0)
        said = self._said.read(_SAID_MAX).decode(errors="replace")
        numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
        number = next((number for number in numbers if os.strerror(number) in said), None)
        if self._process.returncode == -signal.SIGXFSZ:
            number = errno.EFBIG
        return OSError(f"ffmpeg failed; {ADVICE}") if number is None else OSError(number, os.strerror(number))


def _need() -> None:
    if not available():
        raise ProgramError(f"it needs ffmpeg, which is not here; {ADVICE}")


def _place(path: Path) -> str:
    """Return the name of a file as ffmpeg takes it for nothing else."""
    return f"file:{path.absolute()}"


def _input(path: Path, kind: str) -> list[str]:
    return ["-protocol_whitelist", "file", "-f", kind, "-i", _place(path)]


def _start(command: list[str], *, stdin: int, stdout: int, stderr: Any = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Start a program that no Ctrl-C reaches: whoever started it ends it."""
    return subprocess.Popen(command, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)


def _said(command: list[str]) -> bytes:
    """Return what a program prints. Raises ProgramError where it fails, says too much or does not end."""
    process = _start(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        output = process.stdout
        assert output is not None
        data = _watched(process, lambda: output.read(_SAID_MAX + 1))
        if len(data) > _SAID_MAX or _watched(process, process.wait):
            raise ProgramError("its header is damaged")
        return data
    finally:
        _end(process)


def _watched(process: subprocess.Popen[bytes], work: Callable[[], T]) -> T:
    """Do work with a process; it is killed, and ProgramError raised, where that takes too long."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(SILENT_SECONDS, kill)
    timer.daemon = True
    timer.start()
    try:
        return work()
    finally:
        timer.cancel()
        if late.is_set():
            raise ProgramError(f"ffmpeg did nothing for {SILENT_SECONDS:g} s")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process if it is still there, and forget it."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    process.wait()
