"""Findings that are known and not mended yet: target -> kinds of findings. It becomes empty."""

from __future__ import annotations

OPEN: dict[str, tuple[str, ...]] = {}


def is_open(target: str, kind: str) -> bool:
    """Tell whether findings of this kind are known of this target."""
    return kind in OPEN.get(target, ())
