"""Keep what was tuned in $SA3_HOME/tuning.json, by machine, system, version of the framework and shape of the model.

The file may come from anybody: one that is not as it should be is not used, and one line says so.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.installed import home
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import Config, ConfigError, require
from sa3_mlx.common.terminal import say

from . import machine
from .choice import Choices, Twin

_BYTES, _ENTRIES, _WORDS, _LETTERS = 1 << 20, 256, 64, 200  # the most that a file holds
_SETTINGS = "MLX_"  # what the variables begin with that a table may set
_told: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Key(Config):
    """Say what a tuning belongs to."""

    twin: Twin
    device: str  # "cpu", "gpu" or the name of a CUDA device
    chip: str
    cores: int
    system: str
    version: str  # of the framework
    shape: str  # of the model, see ``shape_of``

    @property
    def is_here(self) -> bool:
        """Tell whether it is that of this machine as it is now, whatever the device and the model."""
        here = (machine.chip(), machine.cores(), machine.system(), machine.framework(self.twin))
        return (self.chip, self.cores, self.system, self.version) == here


@dataclass(frozen=True, kw_only=True)
class Tuning(Config):
    """Hold what was found fastest: only ways that are not the usual ones."""

    key: Key
    model: str  # its name, for people
    date: str
    sa3: str  # version
    ways: dict[str, str]
    environment: dict[str, str]  # variables to set before the framework is imported
    before: float  # seconds of a clip, all usual
    after: float

    def __post_init__(self) -> None:
        for words in (self.ways, self.environment):
            require(len(words) <= _WORDS, f"more than {_WORDS} entries")
            for word in (*words, *words.values()):
                require(isinstance(word, str) and len(word) <= _LETTERS, "expected short texts")
        for word in (self.model, self.date, self.sa3, *self.key.to_dict().values()):
            require(len(str(word)) <= _LETTERS, "expected short texts")
        for name in self.environment:
            require(name.startswith(_SETTINGS), f"environment has {name[:_LETTERS]!r}: allowed are {_SETTINGS}...")

    def text(self) -> str:
        """Return what was found in one line, for people."""
        words = [f"{name} {way}" for name, way in (self.ways | self.environment).items()]
        return f"{', '.join(words) or 'the usual ways are the fastest'} ({self.model} on {self.key.twin}, {self.date})"


@dataclass(frozen=True, kw_only=True)
class _Table(Config):
    """Hold all entries, the newest last."""

    format: Literal["sa3-tuning/1"] = "sa3-tuning/1"
    entries: tuple[Tuning, ...]

    def __post_init__(self) -> None:
        require(len(self.entries) <= _ENTRIES, f"more than {_ENTRIES} entries")


def table_file() -> Path:
    """Return the file of this home; it need not exist."""
    return home() / "tuning.json"


def shape_of(config: ModelConfig) -> str:
    """Return a hash of the sizes of a model: models that differ in name and weights only share what was tuned."""
    sizes = config.to_dict()
    del sizes["name"], sizes["clap"]  # a model stays as fast as it was when it gets one
    return hashlib.sha256(json.dumps(sizes, sort_keys=True).encode()).hexdigest()[:16]


def key_of(twin: Twin, device: str, config: ModelConfig) -> Key:
    """Return the key of a model on this machine."""
    return Key(
        twin=twin,
        device=device,
        chip=machine.chip(),
        cores=machine.cores(),
        system=machine.system(),
        version=machine.framework(twin),
        shape=shape_of(config),
    )


def read_table() -> list[Tuning]:
    """Return all that was tuned in this home, empty where there is nothing, or nothing that can be used."""
    path = table_file()
    try:
        if not path.is_file():
            return []
        require(path.stat().st_size <= _BYTES, f"more than {_BYTES >> 10} KiB")
        data = read_object(path)
        return list(_Table.from_dict(data, where="table").entries)
    except (ConfigError, OSError) as error:
        _tell(f"note: {path} is not used ({str(error).removeprefix(f'{path}: ')}); 'sa3 tune' makes it again")
        return []


def find(twin: Twin, device: str, config: ModelConfig) -> Tuning | None:
    """Return what was tuned for such a model on this machine, with this version of the framework."""
    table = read_table()
    key = key_of(twin, device, config) if table else None
    return next((entry for entry in table if entry.key == key), None)


def find_ways(choices: Choices, device: str, config: ModelConfig) -> dict[str, str]:
    """Return the ways of ``find`` that this version of sa3 has; empty where nothing was tuned."""
    tuning = find(choices.twin, device, config)
    known = {name: place for name, place in choices.places.items() if not place.environment}
    ways = {} if tuning is None else tuning.ways
    return {name: way for name, way in ways.items() if name in known and way in known[name].ways}


def environment() -> dict[str, str]:
    """Return the variables that were tuned last for MLX on this machine, whatever the model."""
    here = (entry for entry in reversed(read_table()) if entry.key.twin == "mlx" and entry.key.is_here)
    return next((entry.environment for entry in here), {})


def save(tuning: Tuning) -> Path:
    """Put an entry into the file, in place of one of the same key; return the file. Raises WriteError."""
    others = [entry for entry in read_table() if entry.key != tuning.key]
    _write((*others[-_ENTRIES + 1 :], tuning))
    return table_file()


def forget(config: ModelConfig | None) -> int:
    """Remove the entries of a model, or all of them; return how many. A file that cannot be read is removed."""
    table = read_table()
    kept = () if config is None else tuple(entry for entry in table if entry.key.shape != shape_of(config))
    if kept:
        _write(kept)
    else:
        table_file().unlink(missing_ok=True)
    return len(table) - len(kept)


def _write(entries: tuple[Tuning, ...]) -> None:
    table_file().parent.mkdir(parents=True, exist_ok=True)
    write_json(table_file(), _Table(entries=entries).to_dict())


def _tell(text: str) -> None:
    """Say it once in a process."""
    if text not in _told:
        _told.add(text)
        say(text)
