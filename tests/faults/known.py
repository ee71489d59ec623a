"""Problems that are known and not mended yet: command -> kinds of problems. It becomes empty."""

from __future__ import annotations

OPEN: dict[str, tuple[str, ...]] = {}


def is_open(command: str, kind: str) -> bool:
    """Tell whether problems of this kind are known of this command."""
    return kind in OPEN.get(command, ())
