"""Print for people: every line that a command prints passes here.

What others wrote, such as prompts, tags, names of models and of files, cannot control the terminal or fill it. Streams
that are closed, full or gone are survived: notes are dropped, a report on finished work costs a note, and only a
command whose product is the text itself fails.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TextIO

# control characters but for line ends and tabs, and what turns or breaks the line: ESC, BEL, C1, bidirectional marks
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_BREAKS = re.compile(r"[^\S ]+")  # white space, spaces aside
LONGEST = 1000  # characters of a line that is said
_STDERR = threading.RLock()  # held by what prints there, and by what keeps libraries from it
_LONG_WORD = re.compile(r"\S{121,}")


class ReaderGone(Exception):
    """Report that nobody reads standard output any more, as in ``sa3 models | head``; nothing is to be said of it."""


def clean(text: str) -> str:
    """Return text with control characters, line ends and tabs aside, as escapes such as ``\\x1b``."""
    return _CONTROLS.sub(_escape, text)


def one_line(text: str) -> str:
    """Return clean text with line ends and tabs as spaces."""
    return clean(_BREAKS.sub(" ", text.strip()))


def excerpt(text: str, letters: int = 40) -> str:
    """Return the beginning of a text, with an ellipsis where there is more."""
    return text if len(text) <= letters else f"{text[:letters]}..."


def bounded(line: str) -> str:
    """Return a line of at most ``LONGEST`` characters.

    Of a longer one the middle of its long words is left out, then its own: what it is about stands at the beginning,
    and what to do at the end.
    """
    if len(line) > LONGEST:
        line = _LONG_WORD.sub(lambda word: _ends(word[0], 60, 50), line)
    return line if len(line) <= LONGEST else _ends(line, LONGEST - 303, 300)


def _ends(text: str, first: int, last: int) -> str:
    return f"{text[:first]}...{text[-last:]}"


def labelled(label: str, text: str, width: int) -> str:
    """Return a line of a table: a label in ``width`` columns, then the text."""
    return f"{label:<{width}} {one_line(text)}"


def command(*words: object) -> str:
    """Return a command of ``sa3`` that can be copied into a shell."""
    return shlex.join(["sa3", *map(str, words)])


def say(text: str) -> None:
    """Print on standard error: a note, an error, progress, in lines of bearable length.

    Where nobody can read it, nothing happens.
    """
    with _STDERR:
        _write(sys.stderr, "\n".join(map(bounded, text.split("\n"))))


def report(text: str) -> None:
    """Print on standard output what is known of work that is done; a stream that fails costs a note, not the work."""
    error = _write(sys.stdout, text)
    if error is not None and sys.stdout is not None and not isinstance(error, BrokenPipeError):
        say(f"note: standard output cannot be written ({error.strerror})")


def show(text: str) -> None:
    """Print on standard output what a command is for. Raises OSError where that cannot be done, or ReaderGone."""
    _check(_write(sys.stdout, text))


def write_stdout(data: bytes) -> None:
    """Write bytes to standard output now. Raises OSError where that cannot be done, or ReaderGone."""
    _check(_put(sys.stdout, lambda stream: stream.buffer.write(data)))


def mend_streams() -> None:
    """Put the null device where a standard stream is closed, so that no file of ours takes its number.

    ``sys.stdin`` and ``sys.stdout`` stay None there; ``sys.stderr`` is the null device, which libraries write to.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 (for the rest of the process)


def flush_streams() -> None:
    """Flush standard output and error; what cannot be written is dropped, so that the process ends with its code."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            try:
                stream.flush()
            except (OSError, ValueError):
                silence(stream)


@contextmanager
def hushed() -> Iterator[None]:
    """Lead file descriptor 2 nowhere meanwhile: libraries write there what no caller can catch, panics and notes.

    Nothing of ours is printed until it ends, in whatever thread.
    """
    with _STDERR, ExitStack() as stack:
        try:
            saved = os.dup(2)
            stack.callback(os.close, saved)
            with open(os.devnull, "wb") as null:  # noqa: PTH123
                os.dup2(null.fileno(), 2)
            stack.callback(os.dup2, saved, 2)
        except OSError:  # it is closed
            pass
        yield


def silence(stream: TextIO | None) -> None:
    """Lead a stream of the process that failed to the null device, where its buffer can be flushed."""
    if stream is not None:
        with suppress(OSError, ValueError), open(os.devnull, "wb") as null:  # noqa: PTH123
            os.dup2(null.fileno(), stream.fileno())


def _write(stream: TextIO | None, text: str) -> OSError | None:
    encoding = (stream and stream.encoding) or "utf-8"
    line = clean(text).encode(encoding, "backslashreplace").decode(encoding) + "\n"
    return _put(stream, lambda opened: opened.write(line))


def _put(stream: TextIO | None, write: Callable[[TextIO], object]) -> OSError | None:
    """Write to a stream and flush it; return the error where that failed."""
    if stream is None:
        return OSError(errno.EBADF, "it is closed")
    try:
        write(stream)
        stream.flush()
    except OSError as error:
        silence(stream)
        return error
    return None


def _check(error: OSError | None) -> None:
    if isinstance(error, BrokenPipeError):
        raise ReaderGone from error
    if error is not None:
        raise OSError(f"standard output cannot be written ({error.strerror})") from error


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
