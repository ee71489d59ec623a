"""Keep the windows of a piece on the disk while it is made, so that it goes on after a stop at any moment.

A folder beside the result holds ``piece.json``, what is made and by what, and a file of latents (frames, C) for each
window. Each file appears whole or not at all.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from sa3_mlx.common.files.atomic import locked, write_bytes, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.generation.events import Latents
from sa3_mlx.common.schema import listed

FORMAT = "sa3-windows/1"
PIECE_FILE = "piece.json"


class WindowStore(Protocol):
    """Keep what windows have made, in their order."""

    def read(self, index: int) -> Latents | None: ...
    def write(self, index: int, latents: Latents) -> None: ...


class FolderStore:
    """Keep windows as files of a folder: open it with ``open``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @contextmanager
    def open(cls, folder: Path, piece: dict[str, Any], *, anew: bool) -> Iterator[Self]:
        """Yield the store of a piece, which ``piece``, JSON, describes; no other process can open it meanwhile.

        ``anew``: replace one of another piece. Raises ValueError for a folder of another piece, or one that is none of
        ours, and OSError where another process works in it or the disk refuses.
        """
        described = {"format": FORMAT, **piece}
        if folder.exists() and (differing := _differing(folder, described)):
            if not anew or differing == [PIECE_FILE]:
                raise ValueError(
                    f"{folder}: has windows of another piece (it differs in {listed(differing)}); give the command "
                    "that began it, or remove the folder"
                )
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        with locked(folder):
            if not (folder / PIECE_FILE).is_file():
                write_json(folder / PIECE_FILE, described)
            yield cls(folder)

    def read(self, index: int) -> Latents | None:
        """Return what a window has made, None where it is not there. Raises ValueError for a damaged file."""
        path = self._path(index)
        if not path.is_file():
            return None
        try:
            latents: Latents = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path}: is damaged; remove it, and it is made again") from error
        return latents

    def write(self, index: int, latents: Latents) -> None:
        """Keep what a window has made. Raises WriteError where the disk refuses."""
        data = io.BytesIO()
        np.save(data, latents)
        write_bytes(self._path(index), data.getvalue())

    def count(self) -> int:
        """Count the windows that are there."""
        return sum(1 for _ in self.folder.glob("*.npy"))

    def remove(self) -> None:
        """Remove the folder, when the piece is whole."""
        shutil.rmtree(self.folder)

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"


def folder_of(path: Path) -> Path:
    """Return the folder beside a result that keeps its windows while it is made."""
    return path.with_name(path.name + ".windows")


def stored_seed(folder: Path) -> int | None:
    """Return the seed of the piece that a folder keeps, None where it keeps none."""
    try:
        seed = read_object(folder / PIECE_FILE)["request"]["items"][0]["seed"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return seed if type(seed) is int else None


def _differing(folder: Path, piece: dict[str, Any]) -> list[str]:
    """Name in what a folder's piece is another one; the file itself where it cannot be read."""
    if not (folder / PIECE_FILE).is_file():
        return [] if folder.is_dir() and not any(folder.iterdir()) else [PIECE_FILE]
    try:
        found = read_object(folder / PIECE_FILE)
    except (OSError, ValueError):
        return [PIECE_FILE]
    if found.get("format") != FORMAT:
        return [PIECE_FILE]
    names = []
    for name, value in piece.items():
        other = found.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            names += [f"{name}.{key}" for key in value if value[key] != other.get(key)]
        elif value != other:
            names.append(name)
    return names
