"""How a file was made, as the JSON in its comment tag: enough to make it again, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_mlx.spec.audio import read_tags
from sa3_mlx.spec.request import Guidance
from sa3_mlx.spec.wav import Subtype

_HASH = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """One made file. ``batch_seeds`` and ``batch_index``: the batch it was computed in, which sets its rounding, as
    do the chunks."""

    sa3: str  # version
    command: str
    prompt: str
    negative_prompt: str | None
    seconds: float
    seed: int
    steps: int
    sampler: str
    guidance: Guidance
    model: str
    model_hash: str
    backend: str
    dtype: str
    text_dtype: str
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

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def read_provenance(path: Path) -> Provenance:
    """From the tags of an audio file. Raises ValueError for a file that sa3 did not make, or whose tags are damaged."""
    text = read_tags(path)
    if not text.lstrip().startswith("{"):
        raise ValueError(f"{path}: has no tags of sa3, so it does not say how it was made")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its tags are damaged ({error})") from error
    names = {field.name for field in dataclasses.fields(Provenance)}
    if not isinstance(data, dict) or set(data) != names:
        wrong = sorted(names.symmetric_difference(data)) if isinstance(data, dict) else ["not an object"]
        raise ValueError(f"{path}: its tags are not those of this version of sa3 (differing: {', '.join(wrong)})")
    try:
        return _parse(data)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: its tags are damaged ({error})") from error


def _parse(data: dict[str, Any]) -> Provenance:
    guidance = dict(data["guidance"])
    low, high = guidance["interval"]
    made = Provenance(**(data | {
        "guidance": Guidance(**(guidance | {"interval": (float(low), float(high))})),
        "regions": tuple((float(start), float(end)) for start, end in data["regions"]),
        "batch_seeds": tuple(data["batch_seeds"]),
    }))  # fmt: skip
    for name in ("prompt", "model", "backend", "dtype", "text_dtype", "sampler", "format", "command"):
        if not isinstance(data[name], str):
            raise ValueError(f"{name} is {data[name]!r}: expected text")
    if not _HASH.fullmatch(made.model_hash):
        raise ValueError("model_hash is not a sha256")
    if not 0 <= made.batch_index < len(made.batch_seeds) or made.batch_seeds[made.batch_index] != made.seed:
        raise ValueError("batch_index does not point at the seed")
    return made
