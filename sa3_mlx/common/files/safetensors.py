"""Read and write safetensors files one tensor at a time, bfloat16 included, with numpy only.

The numpy side of the safetensors library knows no bfloat16 and wants every tensor in memory to write a file;
checkpoints here reach 10 GB. bfloat16 values appear as their bit patterns (uint16) in ``raw`` and exactly widened to
float32 in ``read``.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from sa3_mlx.common.schema import listed, quoted, reason

from .atomic import new_file

# name in the file -> numpy type that stores it
STORAGE: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
_OF_NUMPY = {storage: name for name, storage in STORAGE.items() if name != "BF16"}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_DIMENSIONS, _MAX_DIMENSION = 32, 2**40  # of a tensor, also of one without values
_BLOCK_BYTES = 1 << 24
_BLOCK_ELEMENTS = 1 << 22


def to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """Return bfloat16 bit patterns (uint16) of floats, rounded to nearest, ties to even; NaN stays NaN."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    """Return the float32 values of bfloat16 bit patterns (uint16), exactly."""
    return (np.ascontiguousarray(bits, dtype=np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def all_finite(values: np.ndarray, dtype: str) -> bool:
    """Tell whether stored float values (bfloat16 as bit patterns) have no NaN and no infinity; block by block."""
    flat = values.reshape(-1)
    for start in range(0, flat.size, _BLOCK_ELEMENTS):
        block = flat[start : start + _BLOCK_ELEMENTS]
        good = (block & np.uint16(0x7F80)) != 0x7F80 if dtype == "BF16" else np.isfinite(block)
        if not good.all():
            return False
    return True


def file_hash(path: str | Path, advance: Callable[[int], object] | None = None) -> str:
    """Return ``"sha256:..."`` of the whole file; ``advance`` is told the bytes of every block."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            if advance is not None:
                advance(len(block))
    return f"sha256:{digest.hexdigest()}"


@dataclass(frozen=True)
class _Slot:
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class TensorFile:
    """Keep a safetensors file open for reading. Use ``TensorFile.open(path)``, best in a ``with`` statement.

    Raises FileNotFoundError, and ValueError (one line) for a file that is truncated or otherwise not valid.
    """

    def __init__(self, path: Path, file: io.BufferedReader, slots: dict[str, _Slot], metadata: dict[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self._file = file
        self._slots = slots

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a file and read its header. Raises as the class says."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        file = path.open("rb")
        try:
            slots, metadata = _read_header(path, file)
        except BaseException:
            file.close()
            raise
        return cls(path, file, slots, metadata)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def names(self) -> list[str]:
        """Return the sorted names of all tensors."""
        return sorted(self._slots)

    def info(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return (dtype such as "F32" or "BF16", shape). Raises KeyError for a name that is not in the file."""
        slot = self._slots[name]
        return slot.dtype, slot.shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, by name."""
        return {name: slot.shape for name, slot in sorted(self._slots.items())}

    def raw(self, name: str) -> np.ndarray:
        """Return the stored values in their own type, a private writable array; bfloat16 as bit patterns (uint16).

        Raises ValueError where the file became shorter meanwhile.
        """
        slot = self._slots[name]
        array = np.empty(slot.shape, dtype=STORAGE[slot.dtype])
        if array.size:
            self._file.seek(slot.offset)
            if self._file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                raise ValueError(f"{self.path}: the file became shorter while it was read (tensor {name})")
        return array

    def read(self, name: str) -> np.ndarray:
        """Return the values; float32 for F32, F16 and BF16 (exact), the stored type for the others."""
        dtype, array = self._slots[name].dtype, self.raw(name)
        if dtype == "BF16":
            return from_bf16_bits(array)
        return array.astype(np.float32) if dtype == "F16" else array

    def table(self, name: str) -> StoredTable:
        """Return a large matrix of which some rows are going to be read."""
        slot = self._slots[name]
        return StoredTable(np.memmap(self._file, STORAGE[slot.dtype], "r", slot.offset, slot.shape), slot.dtype)


class StoredTable:
    """Read rows of a matrix that stays in the file. It outlives the ``TensorFile`` and any change of what has its path.

    Reading the header takes milliseconds, so whoever asks more than once keeps this.
    """

    def __init__(self, values: np.ndarray, dtype: str) -> None:
        self._values = values
        self.dtype = dtype  # as ``TensorFile.info`` names it
        self.width = values.shape[1]

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Return rows as ``TensorFile.read`` gives them; the others are not read."""
        rows = self._values[indices]
        if self.dtype == "BF16":
            return from_bf16_bits(rows)
        return rows.astype(np.float32) if self.dtype == "F16" else np.array(rows)


def read_ahead(path: str | Path, prefix: str) -> None:
    """Read the tensors whose names start so and forget them: the system then has them at hand. For a thread."""
    with TensorFile.open(path) as file:
        for name in file.names():
            if name.startswith(prefix):
                file.raw(name)


def tensors_hash(path: str | Path, prefix: str) -> str:
    """Hash the tensors whose names start so: names, shapes and values, floats rounded to half precision.

    It is the same in every file that holds these values in single or in half precision, whatever else is there: that is
    how a part of a model is known again. Raises ValueError when there are none.
    """
    digest = hashlib.sha256()
    with TensorFile.open(path) as file:
        names = [name for name in sorted(file.names()) if name.startswith(prefix)]
        if not names:
            raise ValueError(f"{path}: has no tensors {prefix}*")
        for name in names:
            values = file.read(name)
            if values.dtype.kind == "f":
                with np.errstate(over="ignore"):
                    values = values.astype(np.float16)
            digest.update(f"{name} {values.dtype.name} {values.shape}\n".encode())
            digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return f"sha256:{digest.hexdigest()}"


def _read_header(path: Path, file: io.BufferedReader) -> tuple[dict[str, _Slot], dict[str, str]]:
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise ValueError(f"{path}: not a safetensors file ({size} bytes; a header alone has more)")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"{path}: not a safetensors file (its header would have {length} bytes)")
    if 8 + length > size:
        raise ValueError(f"{path}: truncated: the header needs {8 + length} bytes, the file has {size}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique_pairs)
        if not isinstance(header, dict):
            raise TypeError("not an object")
        metadata = _parse_metadata(header.pop("__metadata__", {}))
        slots = {name: _parse_slot(name, entry, 8 + length) for name, entry in header.items()}
    except RecursionError as error:
        raise ValueError(f"{path}: invalid safetensors header: it is nested too deeply") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: invalid safetensors header: {reason(error)}") from error
    end = 8 + length
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].offset, _slot_bytes(item[1]))):
        if slot.offset != end:
            raise ValueError(
                f"{path}: invalid safetensors header: tensor {quoted(name)} does not follow the one before it"
            )
        end += _slot_bytes(slot)
    if end > size:
        raise ValueError(f"{path}: truncated: {end} bytes expected, the file has {size}; download or copy it again")
    if end < size:
        raise ValueError(f"{path}: {size - end} bytes too long: {end} bytes expected, the file has {size}")
    return slots, metadata


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{listed([name])} appears twice")
    return result


def _parse_metadata(metadata: object) -> dict[str, str]:
    """Check that it is what the format allows; the libraries that read the tensors stumble over anything else."""
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError(f"its __metadata__ is {quoted(metadata)}, must be an object of texts")
    return metadata


def _parse_slot(name: str, entry: object, data_start: int) -> _Slot:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise TypeError(f"tensor {quoted(name)} is {quoted(entry)}, must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORAGE:
        raise ValueError(f"tensor {quoted(name)} has dtype {listed([dtype])}; supported: {', '.join(STORAGE)}")
    if not (_are_sizes(shape, _MAX_DIMENSION) and len(shape) <= _MAX_DIMENSIONS):
        raise ValueError(f"tensor {quoted(name)} has shape {quoted(shape)}, which is none, or has a negative size")
    if not (_are_sizes(offsets, 2**63) and len(offsets) == 2):
        raise ValueError(f"tensor {quoted(name)} has data_offsets {quoted(offsets)}, must be two sizes")
    slot, (begin, end) = _Slot(dtype, tuple(shape), data_start + offsets[0]), offsets
    if end - begin != _slot_bytes(slot):
        raise ValueError(
            f"tensor {quoted(name)} has {end - begin} bytes, its shape {quoted(shape)} needs {_slot_bytes(slot)}"
        )
    return slot


def _are_sizes(values: object, most: int) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < most for value in values)


def _slot_bytes(slot: _Slot) -> int:
    return math.prod(slot.shape) * STORAGE[slot.dtype].itemsize


@dataclass(frozen=True)
class TensorEntry:
    """Announce one tensor to write.

    ``load`` is called once, when its turn comes, and returns the array of the given shape in its storage type
    (``STORAGE[dtype]``, bfloat16 as uint16 bit patterns).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all values."""
        return math.prod(self.shape) * STORAGE[self.dtype].itemsize


def array_entry(name: str, array: np.ndarray, dtype: str | None = None) -> TensorEntry:
    """Return an entry for an array in memory, in its own type or converted: floats to any of F64, F32, F16, BF16.

    uint16 with dtype "BF16" are taken as bit patterns.
    """
    dtype = dtype or _OF_NUMPY[array.dtype]

    def load() -> np.ndarray:
        if dtype == "BF16" and array.dtype != np.uint16:
            return to_bf16_bits(array)
        return array if array.dtype == STORAGE[dtype] else array.astype(STORAGE[dtype])

    return TensorEntry(name, dtype, tuple(array.shape), load)


OnTensor = Callable[[int, int, str], None]  # bytes written, bytes in all, tensor that comes next


def watched(entries: list[TensorEntry], progress: OnTensor | None) -> list[TensorEntry]:
    """Return the same entries; each reports its turn."""
    if progress is None:
        return entries
    total, done = sum(entry.nbytes for entry in entries), 0

    def watch(entry: TensorEntry) -> TensorEntry:
        def load() -> np.ndarray:
            nonlocal done
            progress(done, total, entry.name)
            done += entry.nbytes
            return entry.load()

        return replace(entry, load=load)

    return [watch(entry) for entry in entries]


def write_tensors(path: str | Path, entries: Iterable[TensorEntry], metadata: dict[str, str]) -> str:
    """Write a safetensors file and return its hash (``file_hash`` of it).

    Tensors are loaded, written and dropped one after the other; the file appears as a whole. Order: wide types first
    (so that every tensor is aligned), then by name. Raises ValueError for a name given twice and for an entry that
    does not load as announced, OSError where the disk refuses.
    """
    path = Path(path)
    ordered = sorted(entries, key=lambda entry: (-STORAGE[entry.dtype].itemsize, entry.name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for entry in ordered:
        if entry.name in header:
            raise ValueError(f"{path}: tensor {entry.name} given twice")
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with new_file(path) as partial, partial.open("wb") as file:
        for data in itertools.chain((struct.pack("<Q", len(text)), text), map(_entry_bytes, ordered)):
            file.write(data)
            digest.update(data)
    return f"sha256:{digest.hexdigest()}"


def _entry_bytes(entry: TensorEntry) -> memoryview | bytes:
    array = entry.load()
    if array.dtype != STORAGE[entry.dtype] or tuple(array.shape) != tuple(entry.shape):
        raise ValueError(
            f"tensor {entry.name}: announced {entry.dtype} {tuple(entry.shape)}, got {array.dtype} {array.shape}"
        )
    if not array.size:
        return b""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
