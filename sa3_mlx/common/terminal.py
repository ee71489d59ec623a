"""Print for people: every line that a command prints passes here.

What others wrote, such as prompts, tags, names of models and of files, cannot control the terminal. Streams that are
closed, full or gone are survived: notes are dropped, a report on finished work costs a note, and only a command whose
product is the text itself fails.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import TextIO

# control characters but for line ends and tabs, and what turns or breaks the line: ESC, BEL, C1, bidirectional marks
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_BREAKS = re.compile(r"[^\S ]+")  # white space, spaces aside


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


def labelled(label: str, text: str, width: int) -> str:
    """Return a line of a table: a label in ``width`` columns, then the text."""
    return f"{label:<{width}} {one_line(text)}"


def command(*words: object) -> str:
    """Return a command of ``sa3`` that can be copied into a shell."""
    return shlex.join(["sa3", *map(str, words)])


def say(text: str) -> None:
    """Print on standard error: a note, an error, progress. Where nobody can read it, nothing happens."""
    _write(sys.stderr, text)


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


def silence(stream: TextIO | None) -> None:
    """Lead a stream of the process that failed to the null device, where its buffer can be flushed."""
    if stream is not None:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as null:  # noqa: PTH123
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
