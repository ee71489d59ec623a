"""Hold what a server was started with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sa3_mlx.cli.options.model import PrecisionOptions

LOOPBACK = ("127.0.0.1", "localhost", "::1")
BODY_MAX = 1 << 20  # bytes of a JSON body


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Say what is served, where, and within which limits."""

    folder: Path  # of database and files
    adapters: Path  # folder of adapter files, which jobs name
    model: PrecisionOptions  # what computes; its name is the model of jobs that name none
    max_memory: int | None = None  # bytes for everything loaded
    keep_alive: float = 300.0  # seconds until an idle model is freed; below 0 never
    batch_max: int = 8  # clips of waiting jobs that run together
    queue_max: int = 2000  # jobs that wait
    upload_max: int = 512 << 20  # bytes of an upload
    disk_free: int = 1 << 30  # bytes that are left free on the disk
    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None  # that clients must show
    origins: tuple[str, ...] = ()  # of other pages that may use the server
    names: tuple[str, ...] = ()  # further host names that the server is reached by
