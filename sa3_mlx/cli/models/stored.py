"""Describe what training and other commands leave on the disk, from its indexes alone: no PyTorch, nothing is loaded.

Indexes may come from anybody: what is missing or of another type is an error of one line.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sa3_mlx.common.adapters.format import ADAPTER_FORMAT, METADATA_KEY
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import TensorFile, file_hash
from sa3_mlx.common.model.checkpoint import CONFIG_FILE
from sa3_mlx.common.schema import quoted, reason

Facts = dict[str, Any]
INDEX_FILE, SETTINGS_FILE = "index.json", "settings.json"
_TAIL = 1 << 16  # bytes of a log in which its last rows are


def describe_folder(folder: Path) -> Facts | None:
    """Return what is in a folder that sa3 wrote, models aside; None for others. Raises ValueError if it is damaged."""
    if (folder / SETTINGS_FILE).is_file():
        return _checked(folder / SETTINGS_FILE, _run)
    if (folder / INDEX_FILE).is_file():
        return describe_index(folder / INDEX_FILE)
    if (folder / "plan.json").is_file():
        return _checked(folder / "plan.json", _unfinished)
    if (folder / CONFIG_FILE).is_file() and read_object(folder / CONFIG_FILE).get("format") == "sa3-clap/1":
        return _checked(folder / CONFIG_FILE, _clap)
    return None


def describe_index(path: Path) -> Facts:
    """Return what an index lists. Raises ValueError for one of another format and for a damaged one."""
    readers = {
        "sa3-clips/1": _clips,
        "sa3-latents/2": _latents,
        "sa3-shards/1": _shards,
        "sa3-evaluation/2": _evaluation,
        "sa3-tuning/1": _tuning,
    }
    read = readers.get(str(read_object(path).get("format")))
    if read is None:
        found = quoted(read_object(path).get("format"))
        raise ValueError(f"{path}: its format is {found}; expected one that sa3 writes: {', '.join(readers)}")
    return _checked(path, read)


def _checked(path: Path, read: Callable[[Path, dict[str, Any]], Facts]) -> Facts:
    data = read_object(path)
    try:
        return read(path, data)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{path}: damaged, or of another version of sa3 ({type(error).__name__}: {reason(error)})"
        ) from error


def _clips(path: Path, data: dict[str, Any]) -> Facts:
    clips, rate = data["clips"], data["sample_rate"]
    return {
        "kind": "clip cache",
        "folder": str(path.parent),
        "clips": len(clips),
        "minutes": round(sum(clip["samples"] for clip in clips) / rate / 60, 2),
        "sample rate": rate,
        "with captions": sum(bool(clip["captions"]) for clip in clips),
        "kinds": dict(Counter(str(clip["kind"]) for clip in clips)),
        "splits": dict(Counter(str(clip["split"]) for clip in clips)),
        "licences": dict(Counter(str(clip["licence"]) or "unknown" for clip in clips)),
        "made from": data["about"],
    }


def _latents(path: Path, data: dict[str, Any]) -> Facts:
    folder = path.parent
    items = [item for number in range(data["shards"]) for item in _shard_items(folder, number)]
    details = read_object(folder / "details.json") if (folder / "details.json").is_file() else {}
    shown = ("model", "sample_rate", "samples_per_latent", "copies", "seed", "recordings")
    return {
        "kind": "latents",
        "folder": str(folder),
        "items": len(items),
        "frames": sum(item["frames"] for item in items),
        "shards": data["shards"],
        "autoencoder": data["autoencoder"],
        **{name.replace("_", " "): details[name] for name in shown if name in details},
        "kinds": dict(Counter(str(item["kind"]) for item in items)),
        "splits": dict(Counter(str(item["split"]) for item in items)),
        "left out": {name: len(names) for name, names in details.items() if isinstance(names, list) and _names(names)},
    }


def _names(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def _shard_items(folder: Path, number: int) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = read_object(folder / f"shard-{number:05d}.json")["items"]
    return items


def _unfinished(path: Path, data: dict[str, Any]) -> Facts:
    done = len(list(path.parent.glob("shard-*.json")))
    return {
        "kind": "latents, not finished",
        "folder": str(path.parent),
        "shards": done,
        "plan": {name: value for name, value in data.items() if isinstance(value, str | int | float)},
        "next": "the same 'sa3 pre-encode' command goes on where it was stopped",
    }


def _shards(path: Path, data: dict[str, Any]) -> Facts:
    shards, cut = data["shards"], "overlap_seconds" in data
    return {
        "kind": "shards of pieces of recordings" if cut else "shards of recordings",
        "index": str(path),
        "shards": len(shards),
        "pieces" if cut else "recordings": sum(shard["samples"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "left out": {reason: len(names) for reason, names in data["left_out"].items()},
    }


def _evaluation(path: Path, data: dict[str, Any]) -> Facts:
    return {
        "kind": "evaluation",
        "file": str(path),
        "date": data["date"],
        "seeds": data["seeds"],
        "options": data["options"],
        "models": list(dict.fromkeys(f"{row['model']} {row['setting']}" for row in data["rows"])),
    }


def _tuning(path: Path, data: dict[str, Any]) -> Facts:
    return {
        "kind": "tuning",
        "file": str(path),
        "models": [f"{entry['model']} {entry['date']}" for entry in data["entries"]],
    }


def _run(path: Path, data: dict[str, Any]) -> Facts:
    folder, rows = path.parent, _last_rows(path.parent / "log.jsonl")
    checked = next((found for row in rows if (found := _numbers(row, "validation/"))), {})
    return {
        "kind": "run",
        "folder": str(folder),
        "step": rows[0].get("step", 0) if rows else 0,
        "steps": data["train"]["steps"],
        "checkpoints": sorted(step.parent.name for step in folder.glob("checkpoints/step-*/progress.json")),
        "model": str(folder / "model") if (folder / "model").is_dir() else "not yet",
        "terms": _numbers(rows[0], "") if rows else {},
        "validation": checked,
        "settings": data,
    }


def _numbers(row: dict[str, Any], prefix: str) -> dict[str, float]:
    """Return the numbers of a row whose names are a word after the prefix."""
    named = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
    return {name: round(value, 4) for name, value in named.items() if isinstance(value, float) and "/" not in name}


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """Return the last rows of a log, the newest first; a torn line is left out."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
        lines = file.read().decode("utf-8", "replace").splitlines()
    rows = []
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _clap(path: Path, data: dict[str, Any]) -> Facts:
    return {"kind": "latent CLAP", "folder": str(path.parent), "config": data}


def describe_tensors(path: Path) -> Facts:
    """Return what is in a safetensors file: an adapter, encoded latents, weights of a model or something else.

    Raises FileNotFoundError, and ValueError for a file that is damaged.
    """
    with TensorFile.open(path) as file:
        tags, shapes = file.metadata, file.shapes()
    facts: Facts = {"file": str(path), "hash": file_hash(path)}
    if tags.get("format") == ADAPTER_FORMAT:
        try:
            entry = json.loads(tags[METADATA_KEY])
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its adapter entry is missing or not valid JSON ({error})") from error
        layers = sorted({name.rpartition(".")[0] for name in shapes})
        adapter = entry.pop("adapter", {}) if isinstance(entry, dict) else {}
        return {"kind": "adapter", **facts, **adapter, **entry, "layers": len(layers), "parameters": _count(shapes)}
    if "lora_config" in tags:
        return {
            "kind": "adapter of the official layout",
            **facts,
            "parameters": _count(shapes),
            "next": f"sa3 lora info {shlex.quote(str(path))} --model NAME",
        }
    if list(shapes) == ["latents"]:
        frames, channels = shapes["latents"] if len(shapes["latents"]) == 2 else (0, 0)
        return {"kind": "encoded sound", **facts, "frames": frames, "channels": channels, **_others(tags)}
    return {"kind": "tensors", **facts, "tensors": len(shapes), "parameters": _count(shapes), **tags}


def _others(tags: dict[str, str]) -> Facts:
    return {name.replace("_", " "): value for name, value in tags.items() if name != "format"}


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def describe_tar(path: Path) -> Facts:
    """Return what is in one shard of recordings. Raises ValueError for a file that is no tar or ends too early."""
    try:
        with tarfile.open(path, "r:") as tar:
            names = [member.name for member in tar if member.isfile()]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as a shard ({error})") from error
    kinds = Counter(name.rpartition(".")[2] for name in names)
    recordings = len({name.partition(".")[0] for name in names})
    return {"kind": "shard of recordings", "file": str(path), "recordings": recordings, "files": dict(kinds)}
