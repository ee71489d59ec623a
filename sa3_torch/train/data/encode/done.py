"""What of an encoding is done: the complete shards, as they stand beside their latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sa3_mlx.common.schema import Config
from sa3_torch.train.data.entries import parse_entries
from sa3_torch.train.data.latents import LatentItem


@dataclass(frozen=True, kw_only=True)
class Done(Config):
    """Describe a complete shard, as it stands beside it."""

    rows: int
    hash: str
    next: int  # the first recording after it
    recordings: str = ""  # digest of those in it
    failures: tuple[str, ...]
    silent: tuple[str, ...]
    duplicates: tuple[str, ...]
    without_caption: tuple[str, ...]
    items: tuple[dict[str, Any], ...]

    def sources(self, where: str) -> set[str]:
        """Return the hashes of what is in it. Raises ValueError for entries that are no items."""
        return {item.source for item in parse_entries(LatentItem, list(self.items), f"{where}: items")}


@dataclass
class EncodeProgress:
    """Content of the complete shards; every list of names is part of the details."""

    next: int = 0  # the first recording that is not done
    shards: int = 0
    items: list[dict[str, Any]] = field(default_factory=list)  # of the open shard
    seen: set[str] = field(default_factory=set)  # hashes of sources
    failures: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)

    def lists(self) -> dict[str, list[str]]:
        return {name: getattr(self, name) for name in ("failures", "silent", "duplicates", "without_caption")}
