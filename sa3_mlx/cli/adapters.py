"""Adapters on the command line: ``--lora FILE[:STRENGTH[:FROM-TO]]``, and how a made file records them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sa3_mlx.common.adapters.format import Applied
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import Config, ConfigError

_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_LORA = re.compile(rf"(.+?)(?::([-+]?{_NUMBER})(?::({_NUMBER})-({_NUMBER}))?)?")


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What the user gave: a file, its strength, the times in which it is on."""

    path: Path
    name: str  # for the tags
    strength: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class AdapterRecord(Config):
    """One adapter of a made file."""

    file: str  # as it was given; of an absolute path the name alone
    hash: str
    strength: float
    interval: tuple[float, ...]  # FROM, TO

    def __post_init__(self) -> None:
        if len(self.interval) != 2:
            raise ConfigError(f"interval of adapter {self.file} is {self.interval}: expected FROM, TO")


def parse_lora(text: str) -> LoraFile:
    """Raises ValueError for an empty text, a strength or an interval that no adapter can have."""
    found = _LORA.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r}: expected FILE[:STRENGTH[:FROM-TO]], such as bell.safetensors:0.8:0.2-1")
    path, strength, low, high = Path(found[1]), found[2], found[3], found[4]
    file = LoraFile(
        path=path,
        name=path.name if path.is_absolute() else str(path),
        strength=float(strength or 1),
        interval=(0.0, 1.0) if low is None else (float(low), float(high)),
    )
    if not 0 <= file.interval[0] <= file.interval[1] <= 1:
        raise ValueError(f"{text!r}: FROM-TO are times with 0 <= FROM <= TO <= 1; 1 is noise, where sampling begins")
    return file


def open_adapters(files: Sequence[LoraFile], config: ModelConfig) -> tuple[Applied, ...]:
    """Files of either layout, checked against the model. Raises FileNotFoundError and ValueError, one line."""
    from sa3_convert import open_adapter

    return tuple(
        Applied(adapter=open_adapter(file.path, config), strength=file.strength, interval=file.interval)
        for file in files
    )


def record(file: LoraFile) -> AdapterRecord:
    return AdapterRecord(file=file.name, hash=file_hash(file.path), strength=file.strength, interval=file.interval)


def describe(applied: Applied) -> str:
    """In words: type, layers, strength, times."""
    adapter, (low, high) = applied.adapter, applied.interval
    times = "" if applied.always else f", on from t = {high:g} to {low:g}"
    return f"{adapter.config.type}, {len(adapter.layers)} layers, strength {applied.strength:g}{times}"
