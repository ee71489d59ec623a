"""How a file was made, as the JSON in its comment tag: enough to make it again, bit for bit."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from sa3_mlx.cli.adapters import AdapterRecord
from sa3_mlx.cli.backend import Backend
from sa3_mlx.common.files.audio import read_tags
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.model.sampling import Guidance
from sa3_mlx.common.schema import Config, ConfigError

Command = Literal["generate", "vary", "inpaint", "extend"]

_HASH = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Provenance(Config):
    """One made file. ``batch_seeds`` and ``batch_index``: the batch it was computed in, which sets its rounding, as
    do the chunks."""

    sa3: str  # version
    command: Command
    prompt: str
    negative_prompt: str | None
    seconds: float
    seed: int
    steps: int
    sampler: str
    guidance: Guidance
    model: str  # its installed name, or its path as it was given; of an absolute path the name alone
    config: str  # name in its configuration
    model_hash: str
    backend: Backend
    device: str  # as it was asked for; MLX has its own, "auto"
    compiled: bool  # PyTorch's steps and decoder
    dtype: str
    text_dtype: str
    adapters: tuple[AdapterRecord, ...]
    adapters_merged: bool
    input: str | None  # as it was given; of an absolute path the name alone
    input_hash: str | None
    noise_level: float | None
    monotone: bool
    regions: tuple[tuple[float, float], ...]
    crossfade_ms: float | None
    head_room_seconds: float | None
    decode_noise: bool
    chunk_frames: int | None
    encode_chunk_frames: int | None
    batch_seeds: tuple[int, ...]
    batch_index: int
    format: Subtype
    peak_db: float | None

    def __post_init__(self) -> None:
        if not _HASH.fullmatch(self.model_hash):
            raise ConfigError(f"model_hash is {self.model_hash!r}: expected sha256:...")
        if not 0 <= self.batch_index < len(self.batch_seeds) or self.batch_seeds[self.batch_index] != self.seed:
            raise ConfigError("batch_index does not point at the seed")
        if any(len(region) != 2 for region in self.regions):
            raise ConfigError(f"regions are {self.regions}: expected (start, end) each")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False)


def read_provenance(path: Path) -> Provenance:
    """From the tags of an audio file. Raises ValueError for a file that sa3 did not make, or whose tags are damaged."""
    text = read_tags(path)
    if not text.lstrip().startswith("{"):
        raise ValueError(f"{path}: has no tags of sa3, so it does not say how it was made")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its tags are damaged ({error})") from error
    if isinstance(data, dict) and data.get("command") == "decode":
        raise ValueError(
            f"{path}: made by 'sa3 decode', and decoded files have no recipe to rerun; decode LATENTS again"
        )
    names = {field.name for field in fields(Provenance)}
    if not isinstance(data, dict) or set(data) != names:
        wrong = sorted(names.symmetric_difference(data)) if isinstance(data, dict) else ["not an object"]
        raise ValueError(f"{path}: its tags are not those of this version of sa3 (differing: {', '.join(wrong)})")
    try:
        return Provenance.from_dict(data, where="tags")
    except ConfigError as error:
        raise ValueError(f"{path}: its tags are damaged ({error})") from error


def find_input(name: str, file: Path) -> Path | None:
    """The recorded input of a file: from here, or beside the file."""
    return next((p for p in (Path(name), file.parent / name, file.parent / Path(name).name) if p.is_file()), None)
