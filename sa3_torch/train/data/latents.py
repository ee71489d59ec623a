"""Latents on disk: shards with their index, written piece by piece, read by memory map [T3].

A folder holds ``shard-00000.safetensors`` ..., each one tensor "latents" (rows, C) float32 in which the items lie one
after the other; beside each a ``.json`` with its items; ``silence.safetensors`` with the latent of silence (C,); and,
last, ``index.json``: a folder with an index is complete. ``gate.json`` is what `sa3 data gate` found of it. Every
stored row is a valid frame: a recording of n samples has ceil(n / samples_per_latent) of them, the last one included
when any sample falls into it. So the mask of an item is ``frames`` times True. 16 bits are not offered: they move
latents of size 4 by 2e-3, twice what is allowed.

Shapes: T latent frames, C latent channels.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sa3_mlx.common.files.atomic import WriteError, new_folder, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import array_entry, file_hash, write_tensors
from sa3_mlx.common.schema import listed, quoted

from .clip_cache import read_index
from .entries import parse_entries
from .recordings import check_empty

LATENT_FORMAT = "sa3-latents/2"
GATE_FILE = "gate.json"
SILENCE_FILE = "silence.safetensors"
_HEADER_BYTES = 256  # of a shard, so that it can be filled in when the number of rows is known
_STATISTICS_ROWS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class LatentItem:
    """One encoded recording: rows [offset, offset + frames) of a shard. ``seconds`` is its full duration."""

    id: str
    captions: tuple[str, ...]
    seconds: float
    shard: int
    offset: int
    frames: int
    kind: str
    label: str
    midi: int | None
    split: str
    source: str  # "sha256:..." of the file or of the cached audio
    licence: str = ""
    fields: dict[str, Any] = field(default_factory=dict)


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


class ShardFile:
    """Write a shard: rows are appended, and the header is filled in when it is closed.

    Every method raises WriteError where the disk refuses, so that it is told from a recording that cannot be read.
    """

    def __init__(self, path: Path, channels: int) -> None:
        self.path, self.channels, self.rows = path, channels, 0
        with self._writing():
            self._file = path.open("wb", buffering=0)
            self._put(bytes(_HEADER_BYTES))

    def append(self, latents: Tensor, name: str) -> None:
        """Append latents (T, C) of the item ``name``. Raises ValueError for others."""
        if latents.ndim != 2 or latents.shape[1] != self.channels:
            raise ValueError(f"{name}: latents must be (T, {self.channels}), got {tuple(latents.shape)}")
        if not torch.isfinite(latents).all():
            raise ValueError(f"{name}: latents are not finite")
        with self._writing():
            self._put(latents.detach().float().cpu().contiguous().numpy().astype("<f4").tobytes())
        self.rows += len(latents)

    def rollback(self, rows: int) -> None:
        """Forget what was appended after ``rows``."""
        self.rows = rows
        with self._writing():
            self._file.seek(_HEADER_BYTES + rows * self.channels * 4)
            self._file.truncate()

    def close(self) -> str:
        """Complete the file; return its hash."""
        size = self.rows * self.channels * 4
        header = {"latents": {"dtype": "F32", "shape": [self.rows, self.channels], "data_offsets": [0, size]}}
        text = json.dumps(header, separators=(",", ":")).encode().ljust(_HEADER_BYTES - 8)
        with self._writing():
            self._file.seek(0)
            self._put(struct.pack("<Q", len(text)) + text)
            os.fsync(self._file.fileno())
            self._file.close()
        return file_hash(self.path)

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while len(rest):  # an unbuffered file may take less than all
            rest = rest[self._file.write(rest) :]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteError(self.path, error.strerror or str(error), error.errno) from error


def write_silence(folder: Path, silence: Tensor) -> None:
    """Write ``silence`` (C,), the latent of zeros."""
    values = silence.detach().float().cpu().numpy()
    write_tensors(folder / SILENCE_FILE, [array_entry("silence", np.ascontiguousarray(values))], {})


def write_index(folder: Path, autoencoder: str, shards: int) -> None:
    """Write the index, last: now the folder is complete."""
    silence = file_hash(folder / SILENCE_FILE)
    index = {"format": LATENT_FORMAT, "autoencoder": autoencoder, "shards": shards, "silence": silence}
    write_json(folder / "index.json", index)


def write_latents(
    folder: Path, encoded: Iterable[tuple[LatentItem, Tensor]], *, silence: Tensor, autoencoder: str
) -> LatentSet:
    """Write latents (T, C) that are at hand as one shard, and open it. The places in the items are filled in here.

    ``autoencoder`` is the hash of the autoencoder's weights. Raises ValueError for a folder that holds something.
    """
    check_empty(folder)
    with new_folder(folder) as partial:
        path, items = shard_path(partial, 0), list[dict[str, Any]]()
        shard = ShardFile(path, len(silence))
        for item, latents in encoded:
            place = {"shard": 0, "offset": shard.rows, "frames": len(latents)}
            shard.append(latents, item.id)
            items.append({**asdict(item), **place})
        if not items:
            raise ValueError(f"no latents for {folder}")
        write_json(path.with_suffix(".json"), {"rows": shard.rows, "hash": shard.close(), "items": items})
        write_silence(partial, silence)
        write_index(partial, autoencoder, shards=1)
    return LatentSet(folder, autoencoder=autoencoder)


def _count(folder: Path, autoencoder: str) -> int:
    """Count the shards in the folder, which this autoencoder must have made."""
    index = read_index(folder, LATENT_FORMAT)
    if (made := index.get("autoencoder")) != autoencoder:
        raise ValueError(f"{folder} was encoded by autoencoder {listed([made])}, not by {autoencoder}; encode it again")
    count = index.get("shards")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{folder / 'index.json'}: shards is {quoted(count)}; expected a whole number, at least 1")
    return count


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file, and what to do, in errors of the library."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; encode the recordings again")
    try:
        yield
    except (SafetensorError, OSError, TypeError) as error:  # damaged, truncated, without the tensor, another dtype
        raise ValueError(f"{path}: damaged, truncated or no file of latents; encode the recordings again") from error


class LatentSet:
    """Opened folders; refuses to open one that was encoded by another autoencoder than ``autoencoder`` (a hash).

    ``shards``: how many a folder holds that has no index yet, because it is about to be completed. ``items`` in the
    order of the folders and in which they were encoded, ``channels`` C, ``silence`` (C,).
    """

    def __init__(self, *folders: Path, autoencoder: str, shards: int | None = None) -> None:
        self.folders, self.autoencoder = folders, autoencoder
        counts = [(folder, _count(folder, autoencoder) if shards is None else shards) for folder in folders]
        quiet = folders[0] / SILENCE_FILE
        with _reading(quiet):
            silence: Any = safe_open(quiet, framework="pt")  # the library is untyped
            self.silence: Tensor = silence.get_tensor("silence")
        if self.silence.ndim != 1 or not self.silence.is_floating_point():
            raise ValueError(f"{quiet}: expected the latent of silence (C,), got {tuple(self.silence.shape)}")
        if not torch.isfinite(self.silence).all():
            raise ValueError(f"{quiet}: the latent of silence is not finite; encode the recordings again")
        self.channels = len(self.silence)
        self.items: list[LatentItem] = []
        self._shards: list[Any] = []
        for folder, count in counts:
            for number in range(count):
                self._open_shard(shard_path(folder, number))

    def __str__(self) -> str:
        return ", ".join(map(str, self.folders))

    def _open_shard(self, path: Path) -> None:
        with _reading(path):
            file: Any = safe_open(path, framework="pt")  # memory-mapped
            latents = file.get_slice("latents")
            shape, dtype = list(latents.get_shape()), latents.get_dtype()
        if len(shape) != 2 or dtype != "F32":
            raise ValueError(f"{path}: expected latents (rows, C) in float32; encode the recordings again")
        described = path.with_suffix(".json")
        found = parse_entries(LatentItem, read_object(described).get("items"), f"{described}: items")
        (rows, channels), number = shape, len(self._shards)
        items = [replace(item, shard=number) for item in found]
        needed = max((item.offset + item.frames for item in items), default=0)
        if needed > rows or channels != self.channels:
            raise ValueError(
                f"{path}: has {rows} frames of {channels} channels, its index needs {needed} of "
                f"{self.channels}; encode the recordings again"
            )
        self.items += items
        self._shards.append(latents)

    def read(self, item: LatentItem, start: int = 0, stop: int | None = None) -> Tensor:
        """Read frames [start, stop) of an item -> (T, C) float32."""
        stop = item.frames if stop is None else min(stop, item.frames)
        rows: Tensor = self._shards[item.shard][item.offset + start : item.offset + stop]
        return rows.float()

    def statistics(self, split: str | None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel over one split, or over all -> two (C,) float32; float64 inside."""
        items = [item for item in self.items if split is None or item.split == split]
        pieces = [(item, at) for item in items for at in range(0, item.frames, _STATISTICS_ROWS)]
        count = sum(item.frames for item in items)
        if not count:
            raise ValueError(f"{self}: no frames of split {split}")
        mean = torch.zeros(self.channels, dtype=torch.float64)
        for item, at in pieces:
            mean += self.read(item, at, at + _STATISTICS_ROWS).double().sum(0) / count
        squares = torch.zeros_like(mean)
        for item, at in pieces:
            squares += (self.read(item, at, at + _STATISTICS_ROWS).double() - mean).square().sum(0)
        return mean.float(), (squares / max(count - 1, 1)).sqrt().float()

    def identity(self) -> str:
        """Return "sha256:..." of the hashes that stand beside all shards, in their order.

        Raises FileNotFoundError, and ValueError for a shard without its hash.
        """
        return _identity(self.folders, self.autoencoder)

    def record_gate(self, found: dict[str, Any]) -> None:
        """Note what `sa3 data gate` found of the first folder, with the hashes of what it looked at."""
        folder = self.folders[0]
        checked = {"latents": _identity([folder], self.autoencoder), "autoencoder": self.autoencoder}
        write_json(folder / GATE_FILE, {**checked, **found})

    def check_gate(self) -> None:
        """Raise ValueError unless every folder has passed `sa3 data gate` as it is now."""
        for folder in self.folders:
            path = folder / GATE_FILE
            found = read_object(path) if path.is_file() else None
            checked = {"latents": _identity([folder], self.autoencoder), "autoencoder": self.autoencoder}
            if found is None:
                wrong = "has not been run on these latents"
            elif any(found.get(name) != value for name, value in checked.items()):
                wrong = "looked at other latents than the folder holds now"
            elif found.get("good") is not True:
                told = [quoted(found.get(f"log_mel_{name}"))[:6] for name in ("stored", "online")]
                told += [quoted(found.get(name)) for name in ("wrong_lengths", "items")]
                wrong = "failed: log-mel distance {}, of fresh latents {}; {} of {} lengths are wrong".format(*told)
            else:
                continue
            raise ValueError(
                f"{folder}: `sa3 data gate` {wrong}; run `sa3 data gate {folder} --data SOUNDS --autoencoder MODEL`, "
                "or train on them as they are by --ungated"
            )


def verify_latents(folder: Path, progress: Callable[[Sequence[Path]], Iterable[Path]] = iter) -> int:
    """Read all files of a folder through and compare them with the hashes beside them; return how many shards.

    Opening compares none, as that would read everything. ``progress`` goes through the files, with a bar for example.
    Raises ValueError for a file that has changed; then the folder has not passed the gate, either.
    """
    index = read_index(folder, LATENT_FORMAT)
    count = _count(folder, str(index.get("autoencoder")))
    hashes = {shard_path(folder, number): _described(folder, number)["hash"] for number in range(count)}
    if "silence" in index:  # not in that of an earlier version
        hashes[folder / SILENCE_FILE] = index["silence"]
    for path in progress(list(hashes)):
        with _reading(path):
            found = file_hash(path)
        if found != hashes[path]:
            (folder / GATE_FILE).unlink(missing_ok=True)
            raise ValueError(
                f"{path}: has changed since it was written ({found[:15]}... in place of {quoted(hashes[path])[1:16]}"
                "...); get a good copy, or remove the folder and encode the recordings again"
            )
    return count


def _described(folder: Path, number: int) -> dict[str, Any]:
    """Read what stands beside a shard. Raises ValueError where hash or items are missing."""
    path = shard_path(folder, number).with_suffix(".json")
    about = read_object(path)
    if not isinstance(about.get("hash"), str) or "items" not in about:
        raise ValueError(f"{path}: hash is {quoted(about.get('hash'))}; encode the recordings again")
    return about


def _identity(folders: Iterable[Path], autoencoder: str) -> str:
    """Return the hash of what stands beside the shards of folders."""
    found = hashlib.sha256()
    for folder in folders:
        for number in range(_count(folder, autoencoder)):
            about = _described(folder, number)
            found.update(json.dumps([about["hash"], about["items"]], sort_keys=True).encode("utf-8"))
    return f"sha256:{found.hexdigest()}"
