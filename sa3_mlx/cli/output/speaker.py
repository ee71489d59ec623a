"""Play sound while it is made, with the ``sounddevice`` library (macOS, Linux, Windows)."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from types import ModuleType
from typing import Self

import numpy as np

from sa3_mlx.common.files.audio_file import Audio

INSTALL = "pip install 'sa3[play]'"
_BLOCKS_A_SECOND = 10  # how soon an error stops the sound
_LOOK_SECONDS = 0.02


def library() -> ModuleType:
    """Import sounddevice. Raises ImportError, one line that says what to install."""
    try:
        import sounddevice
    except ImportError as error:
        raise ImportError(f"--play needs the sounddevice library: {INSTALL}") from error
    except OSError as error:  # on Linux its wheel comes without PortAudio
        raise ImportError(f"--play needs PortAudio ({error}); Debian, Ubuntu: apt install libportaudio2") from error
    module: ModuleType = sounddevice
    return module


def check_speaker(sample_rate: int, channels: int) -> None:
    """Raise ImportError without the library, OSError without a device that plays such sounds."""
    sounddevice = library()
    try:
        sounddevice.check_output_settings(samplerate=sample_rate, channels=channels)
    except (ValueError, sounddevice.PortAudioError) as error:
        raise OSError(f"--play: no audio device takes {channels} channels at {sample_rate} Hz ({error})") from error


class Speaker:
    """Play pieces of audio one after the other on the default device, in a ``with`` statement.

    A thread feeds the device, which takes a second per second, so that decoding does not wait for it. The statement
    ends with the sound; an error in it stops the sound.
    """

    def __init__(self, sample_rate: int, channels: int) -> None:
        self._library, self._sample_rate, self._channels = library(), sample_rate, channels
        self._pieces: queue.Queue[Audio | None] = queue.Queue()
        self._problem: Exception | None = None
        self._stopped = False
        self._written = self._sent = 0  # samples that came, and that went to the device
        self._thread = threading.Thread(target=self._work, daemon=True)

    def write(self, audio: Audio) -> None:
        """Take the next samples (n, channels); beyond full scale they are clipped."""
        self._written += len(audio)
        self._pieces.put(np.clip(audio, -1, 1))

    def wait(self, seconds: float) -> None:
        """Wait until at most so many seconds are in memory, ahead of the device; not for a device that has failed."""
        while self._thread.is_alive() and self._written - self._sent > seconds * self._sample_rate:
            time.sleep(_LOOK_SECONDS)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._stopped = kind is not None
        self._pieces.put(None)
        self._thread.join()
        if kind is None and self._problem is not None:
            raise OSError(f"all was written, but it could not be played: {self._problem}") from self._problem

    def _work(self) -> None:
        pieces = self._taken()
        try:
            if (first := next(pieces, None)) is not None:  # the device is opened when there is something to play
                self._play(chain([first], pieces))
        except (ValueError, self._library.PortAudioError) as error:
            self._problem = error

    def _taken(self) -> Iterator[Audio]:
        while (audio := self._pieces.get()) is not None:
            yield audio

    def _play(self, pieces: Iterable[Audio]) -> None:
        block = self._sample_rate // _BLOCKS_A_SECOND + 1
        form = {"samplerate": self._sample_rate, "channels": self._channels, "dtype": "float32"}
        with self._library.OutputStream(**form) as stream:  # leaving it waits for the last samples
            for audio in pieces:
                for start in range(0, len(audio), block):
                    if self._stopped:
                        stream.abort()
                        return
                    stream.write(audio[start : start + block])
                    self._sent += len(audio[start : start + block])
