"""Record how a file was made, as the JSON in its comment tag: enough to make it again, bit for bit."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from sa3_mlx.cli.adapters import AdapterRecord
from sa3_mlx.cli.backend import DEVICES, Backend
from sa3_mlx.common.delivery.settings import Delivery
from sa3_mlx.common.files.audio import read_tags
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.generation.events import REQUEST_TAGS
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.measures.choice import Grade
from sa3_mlx.common.model.precision import DTYPES, TEXT_DTYPES
from sa3_mlx.common.schema import Config, ConfigError, quoted, reason, require

from .first_tags import is_first, upgrade

CommandName = Literal["generate", "loop", "vary", "inpaint", "extend", "bridge"]

_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NO_AUDIO: Audio = np.zeros((0, 1), np.float32)


@dataclass(frozen=True, kw_only=True)
class ModelRecord(Config):
    """Name the weights of a made file."""

    name: str  # its installed name, or its path as it was given; of an absolute path the name only
    config: str  # name in its configuration
    hash: str
    adapters: tuple[AdapterRecord, ...]
    adapters_merged: bool

    def __post_init__(self) -> None:
        require(bool(_HASH.fullmatch(self.hash)), f"hash of the model is {quoted(self.hash)}: expected sha256:...")


@dataclass(frozen=True, kw_only=True)
class RuntimeRecord(Config):
    """Name what computed a made file."""

    backend: Backend
    device: str  # as it was asked for; MLX has its own, "auto"
    compiled: bool  # PyTorch's steps and decoder
    dtype: str
    text_dtype: str
    ways: dict[str, str] = field(default_factory=dict)  # tuned ones that may give other bits than the usual ones

    def __post_init__(self) -> None:
        texts = (*self.ways, *self.ways.values())
        require(all(isinstance(text, str) for text in texts), "runtime.ways: expected names of places and their ways")
        for name, allowed in (("device", DEVICES), ("dtype", DTYPES), ("text_dtype", TEXT_DTYPES)):
            value = getattr(self, name)
            require(value in allowed, f"runtime.{name} is {quoted(value)}: allowed are {', '.join(allowed)}")

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """Return what the tags hold: nothing of ways where all are the usual ones."""
        stored = super().to_dict(defaults=defaults)
        return stored if self.ways else {name: value for name, value in stored.items() if name != "ways"}


@dataclass(frozen=True, kw_only=True)
class OutputRecord(Delivery):
    """Say how samples became a file."""

    format: Subtype

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """Return what the tags hold: format and peak, and of the rest what is not usual."""
        stored = {"format": self.format, "peak_db": self.peak_db}
        return stored | super().to_dict(defaults=False) if defaults else super().to_dict(defaults=False)


@dataclass(frozen=True, kw_only=True)
class InputRecord(Config):
    """Name the audio file of a request."""

    name: str  # as it was given; of an absolute path the name only
    hash: str


@dataclass(frozen=True, kw_only=True)
class Provenance(Config):
    """Describe one made file: the request of its batch, which clip of it this is, and what carried it out.

    The whole batch and its chunks belong to it, as they set the rounding.
    """

    format: Literal["sa3-sound/2"] = "sa3-sound/2"
    sa3: str  # version
    command: CommandName
    item: int  # the clip's place in the batch
    request: Request  # sampling is never None here; its audio is empty when it was read from tags
    model: ModelRecord
    runtime: RuntimeRecord
    output: OutputRecord
    input: InputRecord | None
    grade: Grade | None = None  # of what was chosen among several, or is a loop
    second_input: InputRecord | None = None  # of a bridge, where it leads

    def __post_init__(self) -> None:
        require(0 <= self.item < len(self.request.items), f"item is {self.item}: the batch has no such clip")

    @property
    def clip(self) -> Item:
        """Return the clip that is in the file."""
        return self.request.items[self.item]

    @classmethod
    def from_dict(cls, data: object, *, where: str = "tags") -> Self:
        """Read what ``to_dict`` gives, with empty audio. Raises ConfigError, one line that names the field."""
        if isinstance(data, dict) and "request" in data:
            request = Request.from_dict(data["request"], where=f"{where}.request", audio=_NO_AUDIO)
            data = data | {"request": request}
        return super().from_dict(data, where=where)

    def to_dict(self, *, defaults: bool = True) -> dict[str, Any]:
        """Return what the tags hold: nothing of a second input and of a grade where there is none."""
        stored = super().to_dict(defaults=defaults)
        left_out = {"second_input": self.second_input is None, "grade": self.grade is None}
        return {name: value for name, value in stored.items() if not left_out.get(name, False)}

    def to_json(self) -> str:
        """Return the text of the comment tag."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


def read_provenance(path: Path) -> Provenance:
    """Read the tags of an audio file. Raises ValueError for a file that sa3 did not make, or whose tags are damaged."""
    text = read_tags(path)
    if not text.lstrip().startswith("{"):
        raise ValueError(f"{path}: has no tags of sa3, so it does not say how it was made")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its tags are damaged ({reason(error)})") from error
    if data.get("format") == REQUEST_TAGS:
        raise ValueError(f"{path}: a program saved it, and its tags hold the request alone; run that program again")
    if data.get("command") == "decode":
        raise ValueError(
            f"{path}: made by 'sa3 decode', and decoded files have no recipe to rerun; decode LATENTS again"
        )
    try:
        return Provenance.from_dict(upgrade(data) if is_first(data) else data)
    except ConfigError as error:
        raise ValueError(f"{path}: its tags are damaged ({error})") from error


def read_tags_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in the tags of a sound, empty without one. Raises as ``read_tags``."""
    text = read_tags(path)
    try:
        data = json.loads(text) if text.lstrip().startswith("{") else {}
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def read_prompt(path: Path) -> str | None:
    """Return the prompt in the tags of a sound that sa3 or a program with it made, None without one."""
    try:
        data = read_tags_object(path)
        if data.get("format") == REQUEST_TAGS:
            return Request.from_dict(data["request"], audio=_NO_AUDIO).items[data["item"]].prompt or None
        return read_provenance(path).clip.prompt or None
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def find_input(name: str, file: Path) -> Path | None:
    """Find the recorded input of a file: from here, or beside the file."""
    try:
        return next((p for p in (Path(name), file.parent / name, file.parent / Path(name).name) if p.is_file()), None)
    except OSError:  # a name that no file can have
        return None
