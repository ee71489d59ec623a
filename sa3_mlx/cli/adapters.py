"""Read adapters from the command line, ``--lora FILE[:STRENGTH[:FROM-TO]]``, and record them in made files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sa3_mlx.common.adapters.applied import Applied, check_adapter
from sa3_mlx.common.adapters.format import ADAPTER_FORMAT, PEFT_FILE, Adapter, open_adapter_file, read_adapter
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import Config, quoted

_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_LORA = re.compile(rf"(.+?)(?::([-+]?{_NUMBER})(?::({_NUMBER})-({_NUMBER}))?)?")


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """Hold what the user gave: a file, its strength, the times in which it is on."""

    path: Path
    name: str  # for the tags
    strength: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        times = "" if self.interval == (0.0, 1.0) else f":{low:g}-{high:g}"
        return f"{self.path}" + (f":{self.strength:g}{times}" if times or self.strength != 1 else "")


@dataclass(frozen=True, kw_only=True)
class AdapterRecord(Config):
    """Name one adapter of a made file."""

    file: str  # as it was given; of an absolute path the name only
    hash: str
    strength: float
    interval: tuple[float, float]  # FROM, TO


def parse_lora(text: str) -> LoraFile:
    """Read FILE[:STRENGTH[:FROM-TO]]. Raises ValueError for a strength or an interval that no adapter can have."""
    found = _LORA.fullmatch(text)
    if found is None:
        raise ValueError(f"{quoted(text)}: expected FILE[:STRENGTH[:FROM-TO]], such as bell.safetensors:0.8:0.2-1")
    path, strength, low, high = Path(found[1]), found[2], found[3], found[4]
    file = LoraFile(
        path=path / PEFT_FILE if path.is_dir() else path,
        name=path.name if path.is_absolute() else str(path),
        strength=float(strength or 1),
        interval=(0.0, 1.0) if low is None else (float(low), float(high)),
    )
    if not 0 <= file.interval[0] <= file.interval[1] <= 1:
        raise ValueError(
            f"{quoted(text)}: FROM-TO are times with 0 <= FROM <= TO <= 1; 1 is noise, where sampling begins"
        )
    return file


def open_adapters(files: Sequence[LoraFile], config: ModelConfig) -> tuple[Applied, ...]:
    """Read files of either layout, checked against the model. Raises FileNotFoundError and ValueError, one line."""
    return tuple(
        Applied(adapter=_open(file.path, config), strength=file.strength, interval=file.interval) for file in files
    )


def _open(path: Path, config: ModelConfig) -> Adapter:
    """Read a file, with the converter's help where it is of the official layout."""
    with open_adapter_file(path) as file:
        ours = file.metadata.get("format") == ADAPTER_FORMAT
    if not ours:
        from sa3_convert import open_adapter

        return open_adapter(path, config)
    adapter = read_adapter(path)
    try:
        check_adapter(adapter, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return adapter


def record(file: LoraFile) -> AdapterRecord:
    """Return what the tags say of an adapter."""
    return AdapterRecord(file=file.name, hash=file_hash(file.path), strength=file.strength, interval=file.interval)


def describe(applied: Applied) -> str:
    """Say type, layers, strength and times."""
    adapter, (low, high) = applied.adapter, applied.interval
    times = "" if applied.always else f", on from t = {high:g} to {low:g}"
    return f"{adapter.config.type}, {len(adapter.layers)} layers, strength {applied.strength:g}{times}"
