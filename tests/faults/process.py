"""Run a command in a process that is split off one which has imported everything, and disturb it.

A command then takes about as long as its work. Nothing is computed in the process that splits, as threads of a
framework would not survive.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_BLOCKED = (signal.SIGINT, signal.SIGTERM)
_OTHER_EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")


@dataclass(frozen=True, kw_only=True)
class Disturbance:
    """Say what happens to a process; by default nothing."""

    kill_event: int | None = None  # SIGKILL before its writing call of this number
    signal: signal.Signals | None = None
    after: float = 0.0  # seconds until the signal
    file_bytes: int | None = None  # no file may be longer
    read_bytes: int | None = None  # whoever reads its output goes away after so many
    stderr_closes: bool = False  # that of standard error goes away too


@dataclass(frozen=True, kw_only=True)
class Ended:
    """Hold how a process ended: ``code`` as subprocess gives it, None where it hung and was killed."""

    code: int | None
    out: str
    err: str
    seconds: float
    events: int  # writing calls, where it ended by itself


class Running:
    """Start a command (``words``) in ``folder``; ``wait`` for its end."""

    def __init__(self, words: Sequence[str], folder: Path, home: Path, disturbance: Disturbance) -> None:
        self._disturbance, self._start = disturbance, time.monotonic()
        self._outputs = [os.pipe() for _ in range(3)]  # standard output, standard error, count of events
        sys.stdout.flush()
        sys.stderr.flush()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _BLOCKED)  # until the command itself begins
        self.pid = os.fork()
        if self.pid == 0:
            _become(words, folder, home, disturbance, [write for _, write in self._outputs])
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for _, write in self._outputs:
            os.close(write)

    def wait(self, limit: float) -> Ended:
        """Read what it prints until it ends, send its signal, and kill it after ``limit`` seconds."""
        wanted, texts = self._disturbance, [b"", b"", b""]
        files = {read: number for number, (read, _) in enumerate(self._outputs)}
        signalled, hung = wanted.signal is None, False
        while files:
            passed = time.monotonic() - self._start
            if not signalled and passed >= wanted.after:
                signalled = True
                assert wanted.signal is not None
                self._send(wanted.signal)
            if passed > limit:
                hung = True
                self._send(signal.SIGKILL)
            timeout = min(0.5, max(0.0, wanted.after - passed)) if not signalled else 0.5
            for read in select.select(list(files), [], [], timeout)[0]:
                data, number = os.read(read, 65_536), files[read]
                texts[number] += data
                gone = wanted.read_bytes is not None and (number == 0 or (number == 1 and wanted.stderr_closes))
                if not data or (gone and len(texts[number]) >= (wanted.read_bytes or 0)):
                    os.close(read)
                    del files[read]
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        out, err = (text.decode(errors="replace") for text in texts[:2])
        seconds = time.monotonic() - self._start
        return Ended(code=None if hung else code, out=out, err=err, seconds=seconds, events=int(texts[2] or b"0"))

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


def run(
    words: Sequence[str], folder: Path, home: Path, disturbance: Disturbance | None = None, *, limit: float
) -> Ended:
    """Run a command to its end."""
    return Running(words, folder, home, disturbance or Disturbance()).wait(limit)


def call(function: Callable[[], object], *, limit: float = 300.0) -> bool:
    """Call a function in a process of its own; return whether it returned something true. Its errors are printed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 0 if function() else 3
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + limit
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status == 0
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.005)


def _become(
    words: Sequence[str], folder: Path, home: Path, disturbance: Disturbance, outputs: Sequence[int]
) -> NoReturn:
    """Be the command."""
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(outputs[0], 1)
        os.dup2(outputs[1], 2)
        count = os.dup(outputs[2])
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        os.environ["SA3_HOME"] = str(home)
        if disturbance.file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (disturbance.file_bytes, disturbance.file_bytes))
        events = _Events(disturbance.kill_event)
        sys.addaudithook(events.hear)
        sys.argv = ["sa3", *words]
        code = _run()
        events.kill_at = None
        os.write(count, str(events.count).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run() -> int:
    """Run as the ``sa3`` program does, which ends by SystemExit."""
    from sa3_mlx.cli import main

    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _BLOCKED)
        main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:  # before the first line of the program
        return 130
    return 0


class _Events:
    """Count calls that write, and kill the process before one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self.kill_at = 0, kill_at

    def hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _mode, flags = arguments
            if not isinstance(path, str | bytes) or not isinstance(flags, int) or not flags & _WRITING:
                return
            if os.fsdecode(path).startswith(("/dev/", "/proc/")):
                return
        elif event not in _OTHER_EVENTS:
            return
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
