"""A stand-in for the ``sounddevice`` library that keeps what it is given to play."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any, Self

import numpy as np


class PortAudioError(Exception):
    """The library's own error."""


class FakeSoundDevice(ModuleType):
    """``played`` are the blocks in their order; ``problem`` is what the device says to every block."""

    PortAudioError = PortAudioError

    def __init__(self, *, device: bool = True, problem: str = "") -> None:
        super().__init__("sounddevice")
        self.device, self.problem = device, problem
        self.formats: list[dict[str, Any]] = []
        self.played: list[np.ndarray] = []
        self.threads: set[int] = set()
        self.ends: list[str] = []
        self.may_play = threading.Event()
        self.may_play.set()

    def check_output_settings(self, *, samplerate: int, channels: int) -> None:
        assert samplerate and channels
        if not self.device:
            raise PortAudioError("Error querying device -1")

    def query_devices(self, *, kind: str) -> dict[str, Any]:
        if not self.device:
            raise PortAudioError("Error querying device -1")
        return {"name": f"built-in {kind}"}

    def OutputStream(self, **form: Any) -> _Stream:
        self.formats.append(form)
        return _Stream(self)


class _Stream:
    def __init__(self, library: FakeSoundDevice) -> None:
        self._library = library

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._library.ends.append("stop")

    def write(self, audio: np.ndarray) -> None:
        assert self._library.may_play.wait(10)
        if self._library.problem:
            raise PortAudioError(self._library.problem)
        self._library.threads.add(threading.get_ident())
        self._library.played.append(audio.copy())

    def abort(self) -> None:
        self._library.ends.append("abort")
