"""Read and write .npz archives one array at a time, from anybody: no pickle, no array larger than its caller expects.

An archive is a zip file of .npy members. What a member claims to be (type, shape, bytes) is read when the archive is
opened; the values are read when they are asked for, block by block into the array that is returned.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.lib import format as npy

from sa3_mlx.common.files.atomic import new_file
from sa3_mlx.common.files.safetensors import STORAGE, TensorEntry
from sa3_mlx.common.schema import listed, quoted, reason

_MEMBERS_MAX = 10_000
_HEADER_MAX = 10_000  # bytes, numpy's own limit
_BLOCK = 1 << 22  # bytes
_TYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16"}
_FORMATS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OSError,
    LookupError,
    TypeError,
    SyntaxError,
    OverflowError,
    MemoryError,
)


@dataclass(frozen=True)
class _Member:
    info: zipfile.ZipInfo
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int  # bytes of the .npy header


class ArrayFile:
    """Keep an .npz archive open for reading. Use ``ArrayFile.open(path)``, best in a ``with`` statement.

    Raises FileNotFoundError, and ValueError (one line) for an archive that is damaged, has objects in it, or members
    that are no arrays or have strange names.
    """

    def __init__(self, path: Path, archive: zipfile.ZipFile, members: dict[str, _Member]) -> None:
        self.path = path
        self._archive = archive
        self._members = members

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open an archive and read the headers of its members. Raises as the class says."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        with _named(path, "not an .npz archive, or a damaged one"):
            archive = zipfile.ZipFile(path)
        try:
            return cls(path, archive, _members(path, archive))
        except BaseException:
            archive.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._archive.close()

    def names(self) -> list[str]:
        """Return the sorted names of all arrays."""
        return sorted(self._members)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that the header of an array claims."""
        return self._members[name].shape

    def dtype(self, name: str) -> str:
        """Return "F64", "F32" or "F16", or else numpy's own name of the type."""
        dtype = self._members[name].dtype
        return _TYPES.get(dtype.str, str(dtype))

    def read(self, name: str) -> np.ndarray:
        """Return an array, C-contiguous and the caller's own. Raises ValueError where its bytes are damaged."""
        member = self._members[name]
        array = np.empty(member.shape[::-1] if member.fortran else member.shape, member.dtype)
        target = _as_bytes(array)
        with (
            _named(self.path, f"array {quoted(name)} cannot be read; download or copy the file again"),
            self._archive.open(member.info) as stream,
        ):
            stream.read(member.start)
            done = 0
            while done < len(target):
                count = stream.readinto(target[done : done + _BLOCK])  # type: ignore[attr-defined]
                if not count:
                    raise EOFError("it ends too early")
                done += count
            if stream.read(1):  # at the end the sum of all bytes is checked too
                raise ValueError("it is longer than its header says")
        return np.ascontiguousarray(array.T) if member.fortran else array

    def read_bytes(self, name: str, most: int) -> bytes:
        """Return what an array of single bytes holds. Raises ValueError for another type, and above ``most`` bytes."""
        member = self._members[name]
        size = math.prod(member.shape) * member.dtype.itemsize
        if member.dtype.kind not in "uiS" or (member.dtype.kind in "ui" and member.dtype.itemsize != 1):
            raise ValueError(f"{self.path}: {name} is {member.dtype} {member.shape}, must be bytes")
        if size > most:
            raise ValueError(f"{self.path}: {name} has {size} bytes, no file of this kind has more than {most}")
        return self.read(name).tobytes()


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, _Member]:
    infos = archive.infolist()
    if len(infos) > _MEMBERS_MAX:
        raise ValueError(f"{path}: {len(infos)} members; at most {_MEMBERS_MAX} are read")
    found: dict[str, _Member] = {}
    for info in infos:
        name = info.filename.removesuffix(".npy")
        if not info.filename.endswith(".npy") or not name or set(name) & set("/\\\0") or ".." in name:
            raise ValueError(f"{path}: member {quoted(info.filename)} is not the name of an array")
        if name in found:
            raise ValueError(f"{path}: array {listed([name])} is there twice")
        with _named(path, f"array {quoted(name)} has no valid header"):
            found[name] = _member(info, archive)
    return found


def _member(info: zipfile.ZipInfo, archive: zipfile.ZipFile) -> _Member:
    if info.flag_bits & 1:
        raise ValueError("it is encrypted")
    with archive.open(info) as stream:
        version = npy.read_magic(stream)
        if version not in _FORMATS:
            raise ValueError(f"its version is {version}")
        shape, fortran, dtype = _FORMATS[version](stream, max_header_size=_HEADER_MAX)
        start = stream.tell()
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which can run code")
    if not all(0 <= size < 2**40 for size in shape) or len(shape) > 32:
        raise ValueError(f"its shape is {quoted(shape)}")
    size = start + math.prod(shape) * dtype.itemsize
    if info.file_size != size:
        raise ValueError(f"it has {info.file_size} bytes, its type and shape need {size}")
    return _Member(info, dtype, tuple(shape), bool(fortran) and len(shape) > 1, start)


@contextmanager
def _named(path: Path, words: str) -> Iterator[None]:
    """Turn whatever zipfile, zlib and numpy raise at damage into a ValueError that names the archive."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{path}: {words} ({reason(error)})") from error


@dataclass(frozen=True)
class Blob:
    """Announce bytes to write, as an array of uint8."""

    name: str
    data: bytes


def write_arrays(path: Path, entries: Iterable[TensorEntry | Blob]) -> None:
    """Write an .npz archive, uncompressed; arrays are loaded, written and dropped one after the other.

    The file appears as a whole, and equal contents give equal bytes. Raises ValueError for an entry that does not load
    as announced, OSError where the disk refuses.
    """
    with new_file(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for entry in entries:
            info = zipfile.ZipInfo(f"{entry.name}.npy")  # of 1980, whenever it is written
            info.external_attr = 0o644 << 16
            with archive.open(info, "w", force_zip64=True) as stream:
                if isinstance(entry, Blob):
                    _write(stream, np.frombuffer(entry.data, np.uint8))
                    continue
                array = entry.load()
                if array.dtype != STORAGE[entry.dtype] or array.shape != entry.shape:
                    raise ValueError(f"array {entry.name}: announced {entry.dtype} {entry.shape}, got {array.shape}")
                _write(stream, array)


def _as_bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _write(stream: IO[bytes], array: np.ndarray) -> None:
    header: dict[str, Any] = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
    writer: Callable[[IO[bytes], dict[str, Any]], None] = npy.write_array_header_1_0
    writer(stream, header)
    if array.size:
        flat = _as_bytes(np.ascontiguousarray(array))
        for start in range(0, len(flat), _BLOCK):
            stream.write(flat[start : start + _BLOCK])
