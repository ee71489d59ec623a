"""Where finished audio goes while the rest of it is still being decoded: a file, standard output, a player.

A file is whole or not there: its bytes are in a temporary one until the last. What has gone to a pipe or a player has
been heard; when a run fails, they end early.
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self

from sa3_mlx.common.files.audio import Audio, AudioWriter, check_finite
from sa3_mlx.common.files.wav import Subtype, sample_bytes, wav_header

STDOUT = Path("-")


class Sink(Protocol):
    """Takes an item's audio piece by piece, in a ``with`` statement."""

    def write(self, audio: Audio) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None: ...


def open_sink(path: Path, samples: int, channels: int, sample_rate: int, subtype: Subtype, *, comment: str) -> Sink:
    """A file by its extension, or a WAV on standard output for "-"."""
    if path == STDOUT:
        return PipeSink(samples, channels, sample_rate, subtype, comment=comment)
    return AudioWriter(path, samples, channels, sample_rate, subtype, comment=comment)


def check_pipe(subtype: str) -> None:
    """Raises ValueError when standard output is a terminal."""
    if sys.stdout.isatty():
        raise ValueError(f"--out -: a {subtype} WAV does not belong on a terminal; add for example | ffplay -i -")


class PipeSink:
    """A WAV on standard output. Its header is written at once, with the length that is going to be reached."""

    def __init__(self, samples: int, channels: int, sample_rate: int, subtype: Subtype, *, comment: str) -> None:
        self._subtype = subtype
        self._put(wav_header(samples, channels, sample_rate, subtype, comment))

    def write(self, audio: Audio) -> None:
        check_finite(audio, "standard output")
        self._put(sample_bytes(audio, self._subtype))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        pass

    def _put(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


class PlayerSink:
    """Several items, one after the other, to a player that reads a WAV from its standard input.

    A thread feeds the player, which takes a second per second, so that decoding does not wait for it.
    """

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._player: subprocess.Popen[bytes] | None = None
        self._problem = ""
        self._stopped = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def start_item(self, samples: int, channels: int, sample_rate: int) -> None:
        header = wav_header(samples, channels, sample_rate, "pcm16", "")
        self._tasks.put(self._finish)
        self._tasks.put(self._start)
        self._tasks.put(lambda: self._feed(header))

    def write(self, audio: Audio) -> None:
        data = sample_bytes(audio, "pcm16")
        self._tasks.put(lambda: self._feed(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Wait for the end of the sound; after an error, stop it."""
        if kind is not None:
            self._stopped = True
            if self._player is not None:
                self._player.terminate()
        self._tasks.put(self._finish)
        self._tasks.put(None)
        self._thread.join()
        if kind is None and self._problem:
            raise OSError(f"{self._command[0]} could not play it: {self._problem}")

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if self._stopped and task != self._finish:
                continue
            try:
                task()
            except OSError as error:  # a player that was closed; its exit code says whether that was a failure
                self._problem = self._problem or (error.strerror or str(error) if self._player is None else "")

    def _start(self) -> None:
        self._player = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def _feed(self, data: bytes) -> None:
        if self._player is not None and self._player.stdin is not None:
            self._player.stdin.write(data)
            self._player.stdin.flush()

    def _finish(self) -> None:
        if self._player is None:
            return
        player, self._player = self._player, None
        _, log = player.communicate()
        if player.returncode > 0:
            lines = log.decode(errors="replace").strip().splitlines()
            self._problem = lines[-1] if lines else f"exit code {player.returncode}"
