"""Keep files under the hash of their content: what is there is whole, and nothing is there twice."""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from sa3_mlx.common.files.atomic import new_file, remove_partials

_NAME = re.compile(r"[0-9a-f]{64}\.(wav|audio|safetensors)")
_BLOCK = 1 << 20


class Full(OSError):
    """Report that the disk has too little room; the message is one line."""


class Pool:
    """Hold the files of one server. Names are hashes and an ending of ours: no name of a client becomes a path."""

    def __init__(self, folder: Path, disk_free: int) -> None:
        self._files, self._incoming, self._exports = folder / "files", folder / "incoming", folder / "exports"
        self._disk_free = disk_free
        for path in (self._files, self._incoming, self._exports):
            path.mkdir(parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Return the path of a file. Raises ValueError for a name that no file can have."""
        if not _NAME.fullmatch(name):
            raise ValueError("no such file")
        return self._files / name[:2] / name

    def check_room(self, size: int = 0) -> None:
        """Raise Full where ``size`` more bytes would leave too little room on the disk."""
        free = shutil.disk_usage(self._files).free
        if free - size < self._disk_free:
            need = (size + self._disk_free) / 1e9
            raise Full(f"the disk has {free / 1e9:.2f} GB free, {need:.2f} GB are needed; free some space")

    def sweep(self, used: Collection[str]) -> None:
        """Remove what a killed server has left: unfinished files, and those that no sound has. Exports go too."""
        for folder in (self._incoming, self._exports):
            for path in folder.iterdir():
                path.unlink()
        for path in self._files.glob("*/*"):
            if path.name.startswith("."):
                remove_partials(path.parent)
            elif path.name not in used:
                path.unlink()

    def remove(self, name: str) -> None:
        """Remove a file."""
        self.path(name).unlink(missing_ok=True)

    @contextmanager
    def new(self, suffix: str) -> Iterator[Path]:
        """Yield a path to write a file to; ``add`` takes it over, else it is removed."""
        path = self._incoming / f"{secrets.token_hex(12)}{suffix}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def add(self, path: Path, digest: str | None = None) -> str:
        """Take over a whole file that ``new`` gave a path for; return its name."""
        if digest is None:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = digest + path.suffix
        target = self.path(name)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
        return name

    def export(self, name: str) -> Path:
        """Return where a converted copy of a file belongs; it is made when it is asked for, and can go at any time."""
        return self._exports / name

    def trim_exports(self, limit: int) -> list[Path]:
        """Remove the oldest copies beyond ``limit`` bytes, and return them."""
        entries = sorted(((path.stat().st_atime, path) for path in self._exports.iterdir()), reverse=True)
        total, gone = 0, list[Path]()
        for _, path in entries:
            total += path.stat().st_size
            if total > limit:
                path.unlink(missing_ok=True)
                gone.append(path)
        return gone


class Upload:
    """Take a file piece by piece and hash it; nothing is left unless ``take`` was called. For a ``with`` statement."""

    def __init__(self, pool: Pool, limit: int) -> None:
        self._pool, self._limit, self._hash, self.size = pool, limit, hashlib.sha256(), 0
        self._stack = ExitStack()
        self.path = self._stack.enter_context(pool.new(".audio"))
        self._file_stack = ExitStack()
        partial = self._file_stack.enter_context(new_file(self.path))
        self._file = self._file_stack.enter_context(partial.open("wb"))

    def write(self, data: bytes) -> None:
        """Take the next bytes. Raises ValueError beyond the limit, Full where the disk is."""
        if self.size // _BLOCK != (self.size + len(data)) // _BLOCK or not self.size:
            self._pool.check_room(len(data))
        self.size += len(data)
        if self.size > self._limit:
            raise ValueError(f"the file is larger than {self._limit >> 20} MiB, which is the limit of uploads")
        self._hash.update(data)
        self._file.write(data)

    def finish(self) -> Path:
        """Return the path of the whole file, which ``take`` puts into the pool."""
        if not self.size:
            raise ValueError("the file is empty; send the bytes of a sound")
        self._file_stack.close()
        return self.path

    def take(self) -> str:
        """Put the finished file into the pool; return its name."""
        return self._pool.add(self.path, self._hash.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._file_stack.__exit__(kind, error, None)
        finally:
            self._stack.close()
