"""Read JSON objects that come from anybody: indexes, descriptions, settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

JSON_MAX = 1 << 29  # bytes


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises FileNotFoundError, or ValueError for anything else, one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size > JSON_MAX:
        raise ValueError(f"{path}: more than {JSON_MAX >> 20} MiB, no file of sa3 is that large")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({' '.join(str(error).split())})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
