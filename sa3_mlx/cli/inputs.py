"""Take an input from a path, from - for standard input, or from a pipe such as <(command)."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

STDIN = Path("-")
INPUT_MAX = 1 << 32  # bytes of what has no file, which is copied to one


def is_stream(path: Path) -> bool:
    """Tell whether a path stands for standard input or is a pipe, which can be read once."""
    return path == STDIN or path.is_fifo()


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """Open standard input or a pipe for reading. Raises ValueError where standard input is closed."""
    if path != STDIN:
        with path.open("rb") as file:
            yield file
    elif sys.stdin is None:
        raise ValueError("standard input is closed: give the name of a file in place of -")
    else:
        yield sys.stdin.buffer


@contextmanager
def input_file(path: Path) -> Iterator[Path]:
    """Yield a path that can be opened again and again: a stream is copied to a temporary file first.

    Errors name what was given. Raises ValueError for a stream without a byte and for one of more than ``INPUT_MAX``.
    """
    if not is_stream(path):
        yield path
        return
    name = "standard input" if path == STDIN else str(path)
    with open_stream(path) as stream, tempfile.NamedTemporaryFile(prefix="sa3-") as file:
        _copy(stream, file, name)
        try:
            yield Path(file.name)
        except (ValueError, OSError) as error:
            raise type(error)(str(error).replace(file.name, name)) from error


def _copy(stream: BinaryIO, file: tempfile._TemporaryFileWrapper[bytes], name: str) -> None:
    while block := stream.read(1 << 20):
        if file.tell() + len(block) > INPUT_MAX:
            raise ValueError(f"{name}: more than {INPUT_MAX >> 30} GiB; put it into a file")
        file.write(block)
    if not file.tell():
        raise ValueError(f"{name}: nothing came")
    file.flush()
