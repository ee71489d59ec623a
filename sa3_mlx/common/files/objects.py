"""Read JSON objects that come from anybody: indexes, descriptions, settings, entries of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sa3_mlx.common.schema import ConfigError, reason

JSON_MAX = 1 << 29  # bytes


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Return the object that a JSON text is. Raises ConfigError, one line that begins with ``where``, for all else."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # halves of a character cannot be written again
    except RecursionError as error:
        raise ConfigError(f"{where}: not valid JSON (it is nested too deeply)") from error
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON ({reason(error)})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {type(found).__name__}")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises FileNotFoundError, or ConfigError for anything else, one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > JSON_MAX:
        raise ConfigError(f"{path}: more than {JSON_MAX >> 20} MiB, no file of sa3 is that large")
    return parse_object(path.read_bytes(), str(path))
