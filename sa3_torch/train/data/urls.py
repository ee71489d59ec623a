"""Addresses of shards: the names that a pattern stands for, those that are allowed, and opening them.

A pattern is what bash expands: ``name-{000..009}.tar``, ``{a,b}-{0..8..2}.tar``. An address is a path or a URL; what is
fetched comes through the program of its place (curl, aws, gsutil), whose errors become one line; it goes on where a
connection broke off or stalled.
"""

from __future__ import annotations

import math
import re
import select
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

from sa3_mlx.common.schema import quoted, reason
from sa3_mlx.common.terminal import one_line

_MAX_NAMES = 1_000_000
_BRACES = 8  # of a pattern
_LETTERS = 800  # of a name
_RANGE = re.compile(r"(-?[0-9]{1,12})\.\.(-?[0-9]{1,12})(?:\.\.-?([0-9]{1,12}))?")
_LETTERS_RANGE = re.compile(r"([a-z])\.\.([a-z])|([A-Z])\.\.([A-Z])")
# it gives up an address that does not answer before we do
_CURL = ("curl", "--globoff", "--connect-timeout", "15", "--retry", "2", "--retry-delay", "2", "-f", "-sS", "-L")
_NO_RANGES = 33  # curl's exit code where a server begins at the start only
_SCHEMES = ("https", "http", "s3", "gs", "hf")
_STALLED_SECONDS = 60.0  # without a byte: the connection is dead, though nobody says so
_RESUMED = 3  # how often what broke off is gone on with before something has come again
_PAUSE_SECONDS = 2.0  # before that, and longer each time
_PIECE = 1 << 20  # bytes that are read at once, and that are something


class FetchError(OSError):
    """Report an address that cannot be fetched now: a fault of the connection, not of the data."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(
            f"{url}: could not be fetched ({why}); look at the address and the connection, then run the command again"
        )
        self.url, self.why = url, why


# --- what a pattern stands for


class Names(ABC):
    """Count names before they are made, and make them one by one."""

    @abstractmethod
    def count(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int:
        return self.count()


@dataclass(frozen=True)
class _Words(Names):
    """Hold names as they are."""

    words: tuple[str, ...]

    def count(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)


@dataclass(frozen=True)
class _Numbers(Names):
    """Count, with zeros before a number up to ``width`` characters."""

    numbers: range
    width: int

    def count(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[str]:
        return (f"{number:0{self.width}d}" for number in self.numbers)


@dataclass(frozen=True)
class _Choice(Names):
    """Take the names of each option, one option after the other."""

    options: tuple[Names, ...]

    def count(self) -> int:
        return sum(option.count() for option in self.options)

    def __iter__(self) -> Iterator[str]:
        for option in self.options:
            yield from option


@dataclass(frozen=True)
class _Series(Names):
    """Join one name of each part."""

    parts: tuple[Names, ...]

    def count(self) -> int:
        return math.prod(part.count() for part in self.parts)

    def __iter__(self) -> Iterator[str]:
        if not self.parts:
            yield ""
            return
        rest = _Series(self.parts[1:])
        for name in self.parts[0]:
            for end in rest:
                yield name + end


def expand(pattern: str) -> Names:
    """Return the names that a pattern stands for, which are made one by one as they are asked for.

    Raises ValueError for more than 8 pairs of braces, for a brace without another, and for more than a million names.
    """
    check_url(pattern)
    if pattern.count("{") > _BRACES:
        raise ValueError(f"{quoted(pattern)}: has {pattern.count('{')} pairs of braces; up to {_BRACES} are allowed")
    names = _parse(pattern)
    if names is None:
        raise ValueError(f"{quoted(pattern)}: a brace has no other; write it such as name-{{000..009}}.tar")
    if names.count() > _MAX_NAMES:
        raise ValueError(f"{quoted(pattern)}: stands for {names.count():,} names; up to {_MAX_NAMES:,} are allowed")
    return names


def _parse(text: str) -> Names | None:
    """Return what a text stands for, None where a brace has no other."""
    parts, start, depth = list[Names](), 0, 0
    for at, letter in enumerate(text):
        if letter == "{" and (depth := depth + 1) == 1:
            parts.append(_Words((text[start:at],)))
            start = at + 1
        elif letter == "}" and (depth := depth - 1) <= 0:
            inside = _parse_braces(text[start:at]) if depth == 0 else None
            if inside is None:
                return None
            parts.append(inside)
            start = at + 1
    return None if depth else _Series((*parts, _Words((text[start:],))))


def _parse_braces(inside: str) -> Names | None:
    if found := _RANGE.fullmatch(inside):
        return _numbers(*found.groups())
    if found := _LETTERS_RANGE.fullmatch(inside):
        first, last = (ord(letter) for letter in found.groups() if letter)
        return _Words(tuple(map(chr, _span(first, last, 1))))
    options, depth = [""], 0
    for letter in inside:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and not depth:
            options.append("")
        else:
            options[-1] += letter
    parsed = tuple(names for option in options if (names := _parse(option)) is not None)
    if len(parsed) < len(options):
        return None
    return _Choice(parsed) if len(parsed) > 1 else _Series((_Words(("{",)), *parsed, _Words(("}",))))


def _numbers(first: str, last: str, step: str | None) -> Names:
    padded = any(re.match("-?0[0-9]", number) for number in (first, last))
    numbers = _span(int(first), int(last), int(step or 1) or 1)
    return _Numbers(numbers, max(len(first), len(last)) if padded else 0)


def _span(first: int, last: int, step: int) -> range:
    """Count from the first to the last, whichever is larger."""
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)


# --- what is allowed, and opening it


def is_remote(url: str) -> bool:
    """Tell a URL from a path."""
    return "://" in url


def check_url(url: str) -> None:
    """Raise ValueError for a name that is not opened: a command, another kind of URL, or one that no line holds."""
    if one_line(url) != url:
        raise ValueError(f"{quoted(url)}: a name with line ends or control characters, or spaces around it")
    if len(url) > _LETTERS:
        raise ValueError(f"{quoted(url)}: a name of {len(url):,} characters; up to {_LETTERS} are allowed")
    if re.match(r"-|pipe:", url, re.IGNORECASE):
        raise ValueError(
            f"{quoted(url)}: commands are not run for data; give a path or a URL such as s3://bucket/name.tar"
        )
    scheme, separator, _ = url.partition("://")
    if separator and scheme not in _SCHEMES and "{" not in scheme:
        raise ValueError(f"{quoted(url)}: {quoted(scheme)} is not fetched; allowed: a path, {', '.join(_SCHEMES)}")


def open_url(url: str) -> Stream:
    """Open what is at an address, for reading from start to end.

    Raises FileNotFoundError for a path without a file, ValueError as ``check_url``, and FetchError.
    """
    check_url(url)
    if not is_remote(url):
        try:
            return Stream(url, _open_file(Path(url)))
        except OSError as error:
            raise FileNotFoundError(f"{url}: {error.strerror or 'no such file'}") from error
    return Stream(url, _open_hub(url)) if url.startswith("hf://") else _Fetched(url)


class Stream:
    """Read an address piece by piece. Use it in a ``with`` statement."""

    def __init__(self, url: str, file: BinaryIO) -> None:
        self.url, self._file = url, file

    def read(self, size: int = -1) -> bytes:
        """Read ``size`` bytes, fewer at the end, all that is left for -1. Raises OSError, FetchError for a URL."""
        try:
            return self._file.read(size)
        except Exception as error:
            if is_remote(self.url):  # whatever the library raises
                raise FetchError(self.url, reason(error)) from error
            raise

    def close(self) -> None:
        """End it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Fetched(Stream):
    """Read what a program prints; that it failed is known at the end of its output.

    A connection that broke off after something came, or that stalls, is gone on with at the next byte: a run reads a
    shard for hours, and servers end what waits.
    """

    def __init__(self, url: str) -> None:
        self._done, self._ranges = 0, True  # bytes that were given; whether the server can begin anywhere
        self._resumed, self._mark = 0, _PIECE  # how often in a row, and the byte that ends the row
        with ExitStack() as stack:
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            super().__init__(url, self._begin(url))
            self._stack = stack.pop_all()

    def _begin(self, url: str) -> BinaryIO:
        """Start the program at the next byte, or where it can; return its output."""
        words, self._at = _program(url, self._done if self._ranges else 0)
        self._errors.seek(0)
        self._errors.truncate()
        try:
            self._process: subprocess.Popen[bytes] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0
            )
        except OSError as error:
            raise FetchError(url, f"it needs the program {words[0]}: {error.strerror}") from error
        return cast(BinaryIO, self._process.stdout)

    def read(self, size: int = -1) -> bytes:
        """Read as a stream does. Raises FetchError with the last words of a program that failed, or what stalled."""
        parts, left = list[bytes](), size
        while left and (part := self._next(_PIECE if left < 0 else min(left, _PIECE))):
            parts.append(part)
            left -= len(part) if left > 0 else 0
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _next(self, most: int) -> bytes:
        """Return the next bytes, none at the end."""
        while True:
            came, _, _ = select.select([self._file], [], [], _STALLED_SECONDS)
            if not came:
                self._resume(f"nothing came for {_STALLED_SECONDS:g} s")
                continue
            ahead = self._done - self._at  # of a program that had to begin at the start
            if data := self._file.read(min(ahead, _PIECE) if ahead else most):
                self._at += len(data)
                if not ahead:
                    self._done = self._at
                    return data
            elif code := self._process.wait():
                self._ranges = self._ranges and code != _NO_RANGES
                self._errors.seek(0)
                said = self._errors.read().decode("utf-8", "replace").strip().splitlines()
                self._resume(reason(ValueError(said[-1])) if said else f"exit code {code}")
            elif ahead:
                raise FetchError(self.url, f"it ends at byte {self._at}, {self._done} had come before it broke off")
            else:
                return b""

    def _resume(self, why: str) -> None:
        """Start the program again. Raises FetchError where that is of no use."""
        self._end()
        if self._done >= self._mark:
            self._resumed = 0
        if self._resumed == _RESUMED or not (self._done or why.startswith("nothing")):  # it has tried by itself
            raise FetchError(self.url, why)
        self._resumed, self._mark = self._resumed + 1, self._done + _PIECE
        time.sleep(_PAUSE_SECONDS * self._resumed)
        self._file = self._begin(self.url)

    def _end(self) -> None:
        super().close()
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End the program, too, where it has more to say."""
        self._end()
        self._stack.close()


def _program(url: str, first: int) -> tuple[tuple[str, ...], int]:
    """Return the program that prints what is at a URL, from byte ``first`` on where it can, and the byte that it is."""
    if url.startswith("s3://"):
        return ("aws", "s3", "cp", "--quiet", url, "-"), 0
    if url.startswith("gs://"):
        return ("gsutil", "cat", *(("-r", f"{first}-") if first else ()), url), first
    return (*_CURL, *(("-C", f"{first}") if first else ()), url), first


def _open_file(path: Path) -> BinaryIO:
    if not path.is_file():
        raise FileNotFoundError
    return path.open("rb")


def _open_hub(url: str) -> Any:
    from huggingface_hub import HfFileSystem

    try:
        return HfFileSystem().open(url, "rb")
    except Exception as error:  # of its own, of the connection, of the address
        raise FetchError(url, reason(error)) from error
