"""Findings that are known and not mended yet: target -> kinds of findings. It becomes empty."""

from __future__ import annotations

OPEN: dict[str, tuple[str, ...]] = {
    "config": ("a warning",),
    "pipeline": ("a warning",),
    "audio": ("SIGSEGV",),  # of libmpg123, on damaged mp3 files
    "tags": ("a long message", "several lines"),
    "latents": ("a long message",),
    "regions": ("a long message",),
    "options": ("a long message",),
    "calibration": ("hangs",),
    "latent-set": ("a long message",),
    "public-latents": ("TokenError", "a long message", "hangs"),
    "shards": ("a long message", "hangs", "no file is named"),
    "shard-patterns": ("a long message", "hangs", "several lines"),
    "clip-cache": ("TokenError", "a long message"),
    "settings": ("OverflowError", "no file is named"),
    "run-settings": ("OverflowError",),
    "run-checkpoints": ("hangs",),
}


def is_open(target: str, kind: str) -> bool:
    """Tell whether findings of this kind are known of this target."""
    return kind in OPEN.get(target, ())
