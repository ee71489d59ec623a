"""A reader to fuzz, one input for it, and what may come of it: a value, or a documented error in one line."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from sa3_mlx.common.terminal import bounded, one_line

ROOT = Path(__file__).resolve().parents[2]
SOURCES = tuple(f"{ROOT / name}{os.sep}" for name in ("sa3_mlx", "sa3_torch", "convert"))
BUSY = 5  # times as long may pass, where other work keeps the processor busy
PIPE_SECONDS = 2.0  # may pass where a reader waits for what does not come
LONGEST = 1000  # characters of a message
_UNSEEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)  # by users
Form = Literal["bytes", "missing", "folder", "pipe", "loop"]


@dataclass(frozen=True)
class Given:
    """Hold what a reader is given: a folder, in which one ``file`` is damaged."""

    folder: Path
    file: str

    @property
    def path(self) -> Path:
        return self.folder / self.file


@dataclass(frozen=True)
class Target:
    """Name a reader.

    ``make`` writes a valid input into an empty folder and returns the files to damage with the kind of damage
    (mutate.py); ``read`` reads what is in that folder. An AssertionError of it says that a wrong value was read.
    """

    name: str
    make: Callable[[Path], dict[str, str]]
    read: Callable[[Given], object]
    covers: tuple[str, ...]  # files whose lines are counted
    names_file: bool = True  # an error says which file it is about
    forms: bool = True  # the file may be missing, a folder, a pipe, a link to itself
    seconds: float = 2.0  # of the processor that an input may cost
    room: int = 1 << 30  # bytes that it may allocate beyond what the process has
    crashes: bool = False  # what goes wrong may end the process: it is only read in one of its own


@dataclass(frozen=True)
class Case:
    """Describe one damaged file of a target's folder."""

    file: str
    data: bytes
    form: Form = "bytes"

    def to_dict(self) -> dict[str, str]:
        return {"file": self.file, "form": self.form, "data": self.data.decode("latin-1")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Case:
        return cls(data["file"], data["data"].encode("latin-1"), data["form"])


@dataclass
class Finding:
    """Describe what must not happen, by its ``signature``, with the shortest input that makes it happen."""

    signature: str
    case: Case
    detail: str
    count: int = 1

    @property
    def kind(self) -> str:
        """Return the signature without the place."""
        return self.signature.partition(" in ")[0]

    def to_dict(self) -> dict[str, Any]:
        return {"signature": self.signature, "detail": self.detail, "count": self.count, **self.case.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Finding:
        return cls(data["signature"], Case.from_dict(data), data["detail"], data["count"])


@dataclass
class Lines:
    """Collect the lines of some files that are executed."""

    files: frozenset[str]
    seen: set[tuple[str, int]] = field(default_factory=set)

    def trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        if event == "call" and frame.f_code.co_filename not in self.files:
            return None
        self.seen.add((frame.f_code.co_filename, frame.f_lineno))
        return self.trace


class HungError(BaseException):
    """Interrupt a reader that takes too long; no handler of the reader catches it."""


def place(folder: Path, case: Case) -> None:
    """Put the file of a case where the reader finds it."""
    path = folder / case.file
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(path)
    if case.form == "bytes":
        path.write_bytes(case.data)
    elif case.form == "folder":
        path.mkdir()
    elif case.form == "pipe":
        os.mkfifo(path)
    elif case.form == "loop":
        path.symlink_to(path.name)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def check(target: Target, folder: Path, case: Case, lines: Lines) -> tuple[str, str] | None:
    """Read one case; return the signature and the words of what must not happen, None where all is well."""
    place(folder, case)
    pipe = folder / case.file if case.form == "pipe" else None
    try:
        with warnings.catch_warnings(record=True) as said, _closing_late(pipe):
            warnings.simplefilter("always")
            with _limits(target, waits=pipe is not None), _tracing(lines):
                target.read(Given(folder, case.file))
    except (ValueError, OSError) as error:
        return _judge(target, folder, case, error)
    except HungError as error:
        return f"hangs in {_where(error)}", f"{case.form}: more than {target.seconds:g} s"
    except AssertionError as error:
        return f"wrong value in {traceback.extract_tb(error.__traceback__)[-1].line}", _short(error)
    except Exception as error:
        return f"{type(error).__name__} in {_where(error)}", _short(error)
    seen = [warning for warning in said if not issubclass(warning.category, _UNSEEN)]
    return ("a warning in what is read", str(seen[0].message)[:200]) if seen else None


def _judge(target: Target, folder: Path, case: Case, error: Exception) -> tuple[str, str] | None:
    """Look at a refusal of a documented type."""
    message, where = str(error), _where(error)
    if any(isinstance(cause, MemoryError) for cause in _chain(error)):
        return f"allocates too much in {where}", _short(error)
    if "\n" in message.strip() or "\r" in message:
        return f"several lines in {where}", _short(error)
    if not message.strip():
        return f"no words in {where}", type(error).__name__
    if len(message) > LONGEST and not (isinstance(error, OSError) and error.strerror):  # of the name that was given
        return f"a long message in {where}", _short(error)
    shown = bounded(one_line(message))
    if target.names_file and str(folder) not in shown and Path(case.file).name not in shown:
        return f"no file is named in {where}", _short(error)
    return None


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:200] + '...'}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _where(error: BaseException) -> str:
    """Return the innermost function of ours: "sa3_mlx/common/schema.py:_parse"."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(SOURCES)]
    if not frames:
        return "nowhere of ours"
    return f"{Path(frames[-1].filename).relative_to(ROOT).as_posix()}:{frames[-1].name}"


@contextmanager
def _closing_late(pipe: Path | None) -> Iterator[None]:
    """End a pipe, which has no writer, a little after its time; some libraries cannot be interrupted before that."""
    if pipe is None:
        yield
        return
    script = f"sleep {PIPE_SECONDS + 0.5}; while true; do : <> {shlex.quote(str(pipe))}; sleep 0.1; done"
    with subprocess.Popen(["sh", "-c", script]) as process:
        try:
            yield
        finally:
            process.kill()


@contextmanager
def _tracing(lines: Lines) -> Iterator[None]:
    previous = sys.gettrace()
    sys.settrace(lines.trace)
    try:
        yield
    finally:
        sys.settrace(previous)


@contextmanager
def _limits(target: Target, *, waits: bool) -> Iterator[None]:
    """Bound the processor time, the waiting and, on Linux, the memory."""
    pages = Path("/proc/self/statm")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    handlers = {number: signal.signal(number, _interrupt) for number in (signal.SIGPROF, signal.SIGALRM)}
    if pages.exists():
        size = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + target.room, hard))
    signal.setitimer(signal.ITIMER_PROF, target.seconds)
    signal.setitimer(signal.ITIMER_REAL, PIPE_SECONDS if waits else BUSY * target.seconds)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        for number in handlers:  # one that comes too late does nothing
            signal.signal(number, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise HungError
