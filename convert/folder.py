"""Write what was read from any foreign layout as a folder of ours, one tensor in memory at a time."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sa3_mlx.common.files.atomic import new_folder, write_bytes, write_json, write_text
from sa3_mlx.common.files.safetensors import (
    STORAGE,
    OnTensor,
    TensorEntry,
    TensorFile,
    all_finite,
    to_bf16_bits,
    watched,
    write_tensors,
)
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, check_tensors, expected_tensors
from sa3_mlx.common.model.config import FORMAT, ModelConfig
from sa3_mlx.common.origin import ORIGIN_FILE, Origin

from .keys import elements
from .report import Report


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """Hold a foreign checkpoint whose names, shapes and types are checked, with all that becomes our folder."""

    label: str  # for the report
    config: ModelConfig
    parts: tuple[str, ...]
    entries: list[TensorEntry]  # under our names
    tokenizer: Callable[[], bytes] | None  # makes the content of tokenizer.json
    dropped: tuple[str, ...]  # tensors that are left out on purpose


def write_ours(incoming: Incoming, out: Path, progress: OnTensor | None, origin: Origin | None) -> Report:
    """Write the folder; nothing is left at ``out`` when a tensor or the disk fails.

    Raises ValueError and OSError with a one-line message.
    """
    start = time.monotonic()
    config, parts = incoming.config, incoming.parts
    check_space(out, incoming.entries)
    with new_folder(out.absolute()) as folder:
        digest = write_tensors(folder / WEIGHTS_FILE, watched(incoming.entries, progress), {"format": FORMAT})
        write_text(folder / CONFIG_FILE, config.to_json())
        if incoming.tokenizer is not None:
            write_bytes(folder / TOKENIZER_FILE, incoming.tokenizer())
        if origin is not None:
            write_json(folder / ORIGIN_FILE, origin.stored())
        with TensorFile.open(folder / WEIGHTS_FILE) as written:
            check_tensors(expected_tensors(config, parts), written.shapes(), str(out))
    return report_of(
        config.name, incoming.label, out, parts, incoming.entries, digest, start=start, dropped=incoming.dropped
    )


def finite(array: np.ndarray, dtype: str, path: Path, name: str) -> np.ndarray:
    """Return the array. Raises ValueError that names the tensor when it has a NaN or an infinity."""
    if not all_finite(array, dtype):
        raise ValueError(f"{path}: tensor {name} has NaN or infinite values; the file is damaged")
    return array


def stored_as(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return floats in the type that stores them (bfloat16 as bit patterns)."""
    return to_bf16_bits(values) if dtype == "BF16" else values.astype(STORAGE[dtype], copy=False)


def check_out(out: Path, *, force: bool, replaceable: Callable[[Path], bool]) -> None:
    """Raise ValueError when ``out`` exists and may not be replaced, before any work."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not force:
        raise ValueError(f"{out}: exists already; give another folder, or --force to replace it")
    if not out.is_dir() or not replaceable(out):
        raise ValueError(f"{out}: exists and is not a converted checkpoint, so it is not replaced")


def check_space(out: Path, entries: list[TensorEntry]) -> None:
    """Raise OSError when the disk has no room for these tensors."""
    parent, size = out.absolute().parent, sum(entry.nbytes for entry in entries)
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < size:
        raise OSError(f"{parent}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")


def report_of(
    name: str,
    source: str,
    out: Path,
    parts: tuple[str, ...],
    entries: list[TensorEntry],
    digest: str,
    *,
    start: float,
    dropped: tuple[str, ...] = (),
) -> Report:
    """Count what was written since ``start``."""
    dtypes: dict[str, int] = {}
    for entry in entries:
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + elements(entry.shape)
    return Report(
        name=name,
        source=source,
        folder=out,
        parts=parts,
        tensors=len(entries),
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        bytes=sum(entry.nbytes for entry in entries),
        hash=digest,
        dropped=dropped,
        seconds=time.monotonic() - start,
    )
