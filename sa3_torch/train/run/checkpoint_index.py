"""The index of a checkpoint as JSON: reading one runs no code of whoever wrote it.

torch.distributed.checkpoint pickles what says where each tensor lies. Here it is ``index.json``; the tensors themselves
are read without unpickling anything else.
"""

from __future__ import annotations

import json
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

INDEX_FILE = "index.json"
PICKLED = ".metadata"  # of earlier versions
FORMAT = "sa3-checkpoint/1"


class IndexWriter(FileSystemWriter):
    """Write tensors as the library does, and their index as JSON."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, once all processes have written their tensors."""
        stored = {result.index: result.storage_data for group in results for result in group}
        data = {
            "format": FORMAT,
            "tensors": {name: _tensor(found) for name, found in metadata.state_dict_metadata.items()},
            "paths": {name: list(path) for name, path in (metadata.planner_data or {}).items()},
            "stored": [_entry(index, info) for index, info in stored.items()],
        }
        write_json(Path(self.path) / INDEX_FILE, data)


class IndexReader(FileSystemReader):
    """Read tensors as the library does, by the JSON index."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Read the index. Raises OSError, and ValueError, KeyError or TypeError for one that is damaged."""
        data = json.loads((Path(self.path) / INDEX_FILE).read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"{INDEX_FILE}: format is {data['format']!r}, this version reads {FORMAT!r}")
        return Metadata(
            state_dict_metadata={name: _parse_tensor(found) for name, found in data["tensors"].items()},
            planner_data={name: tuple(path) for name, path in data["paths"].items()},
            storage_data=dict(_parse_entry(entry) for entry in data["stored"]),
            storage_meta=StorageMeta(load_id=self.load_id),
        )


def _tensor(found: object) -> dict[str, Any]:
    if not isinstance(found, TensorStorageMetadata):
        raise TypeError(f"a checkpoint holds tensors only, not {type(found).__name__}")
    return {
        "dtype": str(found.properties.dtype).removeprefix("torch."),
        "size": list(found.size),
        "chunks": [{"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)} for chunk in found.chunks],
    }


def _parse_tensor(found: dict[str, Any]) -> TensorStorageMetadata:
    dtype = getattr(torch, found["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{INDEX_FILE}: {found['dtype']!r} is no number type")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=torch.Size(found["size"]),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(chunk["offsets"]), sizes=torch.Size(chunk["sizes"]))
            for chunk in found["chunks"]
        ],
    )


def _entry(index: MetadataIndex, info: _StorageInfo) -> dict[str, Any]:
    return {
        "name": index.fqn,
        "offset": None if index.offset is None else list(index.offset),
        "index": index.index,
        "file": info.relative_path,
        "start": info.offset,
        "length": info.length,
    }


def _parse_entry(entry: dict[str, Any]) -> tuple[MetadataIndex, _StorageInfo]:
    if Path(entry["file"]).name != entry["file"]:
        raise ValueError(f"{INDEX_FILE}: {entry['file']!r} is not a file of the checkpoint")
    index = MetadataIndex(entry["name"], entry["offset"], entry["index"])
    return index, _StorageInfo(relative_path=entry["file"], offset=entry["start"], length=entry["length"])
