"""The index of a checkpoint as JSON: reading one runs no code of whoever wrote it.

torch.distributed.checkpoint pickles what says where each tensor lies. Here it is ``index.json``; the tensors themselves
are read without unpickling anything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.schema import Config, quoted, require

INDEX_FILE = "index.json"
PICKLED = ".metadata"  # of earlier versions
FORMAT = "sa3-checkpoint/1"
_MOST = 1 << 62  # of a size and of a place in a file


@dataclass(frozen=True, kw_only=True)
class _Chunk(Config):
    """Describe a part of a tensor that one process wrote."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_sizes(*self.offsets, *self.sizes)


@dataclass(frozen=True, kw_only=True)
class _Tensor(Config):
    """Describe a tensor as a whole."""

    dtype: str
    size: tuple[int, ...]
    chunks: tuple[_Chunk, ...]

    def __post_init__(self) -> None:
        _check_sizes(*self.size)
        require(isinstance(getattr(torch, self.dtype, None), torch.dtype), f"{quoted(self.dtype)} is no number type")


@dataclass(frozen=True, kw_only=True)
class _Stored(Config):
    """Say where a chunk lies: ``length`` bytes of ``file`` from ``start`` on."""

    name: str
    offset: tuple[int, ...] | None
    index: int | None
    file: str
    start: int
    length: int

    def __post_init__(self) -> None:
        _check_sizes(self.start, self.length, *(self.offset or ()))
        require(Path(self.file).name == self.file, f"{quoted(self.file)} is not a file of the checkpoint")


@dataclass(frozen=True, kw_only=True)
class _Index(Config):
    """Hold all that ``index.json`` says."""

    format: str
    tensors: dict[str, Any]  # name -> _Tensor
    paths: dict[str, Any]  # name -> table and name in it
    stored: tuple[_Stored, ...]

    def __post_init__(self) -> None:
        require(self.format == FORMAT, f"format is {quoted(self.format)}, this version reads {FORMAT!r}")
        for name, path in self.paths.items():
            known = isinstance(path, list) and all(isinstance(part, str) for part in path)
            require(known, f"paths.{quoted(name)} is {quoted(path)}; expected a list of texts")


def _check_sizes(*sizes: int) -> None:
    for size in sizes:
        require(0 <= size < _MOST, f"{quoted(size)} is no size and no place in a file")


class IndexWriter(FileSystemWriter):
    """Write tensors as the library does, and their index as JSON."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, once all processes have written their tensors."""
        stored = {result.index: result.storage_data for group in results for result in group}
        index = _Index(
            format=FORMAT,
            tensors={name: _tensor(found).to_dict() for name, found in metadata.state_dict_metadata.items()},
            paths={name: list(path) for name, path in (metadata.planner_data or {}).items()},
            stored=tuple(_stored(index, info) for index, info in stored.items()),
        )
        write_json(Path(self.path) / INDEX_FILE, index.to_dict())


class IndexReader(FileSystemReader):
    """Read tensors as the library does, by the JSON index."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read the index. Raises FileNotFoundError, or ConfigError for one that is damaged, one line."""
        path = Path(self.path) / INDEX_FILE
        index = _Index.from_dict(read_object(path), where=str(path))
        tensors = {name: _Tensor.from_dict(found, where=f"{path}: {name}") for name, found in index.tensors.items()}
        return Metadata(
            state_dict_metadata={name: _tensor_metadata(tensor) for name, tensor in tensors.items()},
            planner_data={name: tuple(path) for name, path in index.paths.items()},
            storage_data={
                MetadataIndex(entry.name, entry.offset, entry.index): _StorageInfo(
                    relative_path=entry.file, offset=entry.start, length=entry.length
                )
                for entry in index.stored
            },
            storage_meta=StorageMeta(load_id=self.load_id),
        )


def _tensor(found: object) -> _Tensor:
    if not isinstance(found, TensorStorageMetadata):
        raise TypeError(f"a checkpoint holds tensors only, not {type(found).__name__}")
    return _Tensor(
        dtype=str(found.properties.dtype).removeprefix("torch."),
        size=tuple(found.size),
        chunks=tuple(_Chunk(offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes)) for chunk in found.chunks),
    )


def _tensor_metadata(tensor: _Tensor) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=getattr(torch, tensor.dtype)),
        size=torch.Size(tensor.size),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.sizes))
            for chunk in tensor.chunks
        ],
    )


def _stored(index: MetadataIndex, info: _StorageInfo) -> _Stored:
    return _Stored(
        name=index.fqn,
        offset=None if index.offset is None else tuple(index.offset),
        index=index.index,
        file=info.relative_path,
        start=info.offset,
        length=info.length,
    )
