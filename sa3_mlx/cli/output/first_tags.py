"""Translate the first layout of the tags, one flat table, to the layout of today."""

from __future__ import annotations

from typing import Any

from sa3_mlx.common.schema import listed, quoted, require

_CLIP = ("prompt", "negative_prompt", "seconds")
_SAMPLING = ("sampler", "steps", "guidance")
_REQUEST = (
    "monotone",
    "head_room_seconds",
    "crossfade_ms",
    "decode_noise",
    "chunk_frames",
    "encode_chunk_frames",
)
_RUNTIME = ("backend", "device", "compiled", "dtype", "text_dtype")
_OUTPUT = ("format", "peak_db")
_MODEL = {"model": "name", "config": "config", "model_hash": "hash", "adapters": "adapters"}
_OTHERS = ("sa3", "command", "seed", "batch_seeds", "batch_index", "adapters_merged", "input", "input_hash")
FIELDS = frozenset((*_CLIP, *_SAMPLING, *_REQUEST, *_RUNTIME, *_OUTPUT, *_MODEL, *_OTHERS, "noise_level", "regions"))


def is_first(data: dict[str, Any]) -> bool:
    """Return whether these are tags of the first layout, whose ``format`` is that of the samples."""
    return "request" not in data


def upgrade(data: dict[str, Any]) -> dict[str, Any]:
    """Translate tags of the first layout, without a look at the types of their values.

    Raises ConfigError for missing and unknown fields, and where the seed is not the one of its place in the batch.
    """
    wrong = sorted(FIELDS.symmetric_difference(data))
    require(not wrong, f"not those of this version of sa3, differing: {listed(wrong)}")
    seeds, item = data["batch_seeds"], data["batch_index"]
    require(isinstance(seeds, list), f"tags.batch_seeds: expected a list, got {quoted(seeds)}")
    fits = type(item) is int and 0 <= item < len(seeds) and seeds[item] == data["seed"]
    require(fits, "tags.batch_index: does not point at the seed")

    def take(*names: str) -> dict[str, Any]:
        return {name: data[name] for name in names}

    level, regions, name = data["noise_level"], data["regions"], data["input"]
    return {
        "format": "sa3-sound/2",
        **take("sa3", "command"),
        "item": item,
        "request": {
            "items": [take(*_CLIP) | {"seed": seed} for seed in seeds],
            "sampling": take(*_SAMPLING),
            "init": None if level is None else {"noise_level": level},
            "inpaint": None if regions == [] else {"regions": regions},
            **take(*_REQUEST),
        },
        "model": {new: data[old] for old, new in _MODEL.items()} | take("adapters_merged"),
        "runtime": take(*_RUNTIME),
        "output": take(*_OUTPUT),
        "input": None if name is None else {"name": name, "hash": data["input_hash"]},
    }
