"""Write files and folders as a whole: what stands under a name is complete, or what stood there before.

Every write of ours goes through here. The new content is made beside the old under a hidden name that ends in the
process number and ``.partial``, and takes its place by one rename.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def partial_path(path: Path) -> Path:
    """Name a neighbour of ``path`` for content that is not complete yet."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def remove_partials(folder: Path) -> None:
    """Remove what processes that were killed have left in a folder that nobody else writes to."""
    for path in folder.glob(".*.partial"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file there replaces ``path`` at the end, and is removed after an error.

    Raises OSError, one line that names ``path``, where the disk refuses.
    """
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces ``path`` at the end, and is removed after an error.

    A folder that stood at ``path`` is moved aside first and comes back where the exchange fails.
    Raises OSError, one line that names ``path``, where the disk refuses.
    """
    partial, replaced = partial_path(path), path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rename(replaced)
        try:
            partial.rename(path)
        except OSError:
            if replaced.exists():
                replaced.rename(path)
            raise
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file as a whole. Raises OSError where the disk refuses."""
    with new_file(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as a whole. Raises OSError where the disk refuses."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file as a whole, indented. Raises OSError where the disk refuses."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def _refused(path: Path, error: OSError) -> OSError:
    first = error.__cause__ if isinstance(error.__cause__, OSError) else error  # of a file inside of a new folder
    reason = first.strerror or str(first)
    return type(error)(f"{path}: could not be written ({reason}); nothing was left behind")
