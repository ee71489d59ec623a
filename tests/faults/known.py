"""Problems that are known and not mended yet: command -> kinds of problems. It becomes empty."""

from __future__ import annotations

OPEN: dict[str, tuple[str, ...]] = {
    "data shards": (
        "blocked",
        "half-written",
    ),
    "data export-latents": (
        "blocked",
        "half-written",
        "raw words",
    ),
    "train lora": ("traceback",),
    "data import": (
        "half-written",
        "lost",
        "race",
    ),
    "train pretrain": ("traceback",),
    "decode": (
        "false success",
        "half-written",
        "traceback",
    ),
    "train autoencoder": ("traceback",),
    "generate flac": (
        "false success",
        "half-written",
        "traceback",
    ),
}


def is_open(command: str, kind: str) -> bool:
    """Tell whether problems of this kind are known of this command."""
    return kind in OPEN.get(command, ())
