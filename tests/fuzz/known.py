"""Findings that are known and not mended yet: target -> kinds of findings. It becomes empty."""

from __future__ import annotations

OPEN: dict[str, tuple[str, ...]] = {
    "config": ("a warning",),  # of numpy: a shift of the schedule with a huge rate
    "pipeline": ("a warning",),
    "audio": ("SIGSEGV",),  # of libmpg123, on damaged mp3 files
    "tags": ("a long message", "several lines"),
    "options": ("a long message",),
    "calibration": ("hangs",),
    "shard-patterns": ("several lines",),
}


def is_open(target: str, kind: str) -> bool:
    """Tell whether findings of this kind are known of this target."""
    return kind in OPEN.get(target, ())
