"""Describe jobs and sounds as the store keeps them and as clients see them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sa3_mlx.common.files.wav import Subtype

State = Literal["queued", "running", "done", "failed", "cancelled", "interrupted"]
KEPT: Subtype = "float"  # samples as the model made them; downloads are converted
SECONDS_MAX = 3600.0  # of a sound that is kept
OPEN: tuple[State, ...] = ("queued", "running")  # not over


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """Hold a job: what was asked for and how far it got."""

    id: str
    created: float  # seconds since 1970
    kind: str
    state: State
    order: dict[str, Any]  # ``Order`` as JSON
    error: str | None = None  # one line, of a failed one
    started: float | None = None
    finished: float | None = None
    sounds: tuple[str, ...] = ()  # that it made

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SoundRecord:
    """Hold a sound, or latents: what it is and how it came to be. Its samples are in the pool under ``file``."""

    id: str
    created: float  # seconds since 1970
    kind: str  # of the job that made it, or "upload"
    name: str  # for people, and of downloads; without an extension
    file: str  # name in the pool
    seconds: float
    samples: int  # frames, where it is latents
    sample_rate: int
    channels: int
    subtype: str  # of the samples in the file
    job: str | None = None
    item: int = 0  # place in the job
    parent: str | None = None  # sound that it was made from
    prompt: str | None = None
    seed: int | None = None
    model: str | None = None
    regions: list[list[float]] = field(default_factory=list)  # seconds that were made anew
    seams: list[dict[str, Any]] = field(default_factory=list)
    peak_db: float | None = None  # None: silent
    starred: bool = False
    provenance: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON, without the file's name in the pool and the long provenance."""
        return {name: value for name, value in asdict(self).items() if name not in ("file", "provenance")}
