"""Say where the weights of a folder come from: ``origin.json`` beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.schema import Config, require

ORIGIN_FILE = "origin.json"
_FORMAT = "sa3-origin/1"


@dataclass(frozen=True, kw_only=True)
class OriginFile(Config):
    """Name a file that was downloaded, with the hash that the hub announced and that was checked."""

    name: str
    hash: str


@dataclass(frozen=True, kw_only=True)
class OriginLicence(Config):
    """Name a licence of the weights."""

    id: str
    name: str
    page: str


@dataclass(frozen=True, kw_only=True)
class Origin(Config):
    """Name the repository of the hub, its revision, and the licences of what lies there."""

    repository: str
    revision: str
    files: tuple[OriginFile, ...]
    licences: tuple[OriginLicence, ...]

    def stored(self) -> dict[str, object]:
        """Return what the file holds."""
        return {"format": _FORMAT, **self.to_dict()}


def read_origin(folder: Path) -> Origin | None:
    """Read the file of a folder; None where there is none. Raises ConfigError for a damaged one."""
    path = folder / ORIGIN_FILE
    if not path.is_file():
        return None
    data = read_object(path)
    require(data.pop("format", None) == _FORMAT, f"{path}: its format is not {_FORMAT!r}")
    return Origin.from_dict(data, where=str(path))
