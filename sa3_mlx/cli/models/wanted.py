"""Work out what ``sa3 get`` downloads for a model: repository, revision, files and licences."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sa3_convert.beside import BESIDE_FILE
from sa3_convert.hub import DownloadError, Remote, has_token, look
from sa3_convert.model_config import TEXT_SUBFOLDER
from sa3_convert.port.layout import file_names

from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.installed import HUB, home, installed, known_name
from sa3_mlx.common.licences import RELEASED, STABILITY, Licence, named
from sa3_mlx.common.model.checkpoint import CLAP_FILE, CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.presets import PRESETS, REPOSITORIES
from sa3_mlx.common.origin import ORIGIN_FILE, Origin, OriginFile, OriginLicence
from sa3_mlx.common.schema import listed

Layout = Literal["port", "official", "ours"]
Source = Literal["auto", "optimized", "original"]
OPTIMIZED = "stabilityai/stable-audio-3-optimized"  # anonymous: no account, no token
_OPTIMIZED_FOLDER = "MLX"
_BESIDE = ("model_config.json", BESIDE_FILE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_OURS = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)
_OURS_TOO = (CLAP_FILE, ORIGIN_FILE, "parents.json", "quantization.json")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Hold what is to be downloaded for a model."""

    name: str  # to install it under
    layout: Layout
    remote: Remote
    files: tuple[str, ...]
    licences: tuple[Licence, ...]

    @property
    def size(self) -> int:
        """Return the bytes of all files; the converted model has as many, but for headers."""
        return sum(file.size for file in self.remote.chosen(self.files))

    def origin(self) -> Origin:
        """Return what is remembered beside the weights."""
        return Origin(
            repository=self.remote.repository,
            revision=self.remote.revision,
            files=tuple(OriginFile(name=file.name, hash=file.hash) for file in self.remote.chosen(self.files)),
            licences=tuple(OriginLicence(id=found.id, name=found.name, page=found.page) for found in self.licences),
        )

    def place(self, folder: Path) -> Path:
        """Return what the converter is given, in the folder of downloads: the file of the DiT, or the folder."""
        return folder / self.files[0] if self.layout == "port" else folder


def find_wanted(model: str, source: Source, revision: str | None, name: str | None) -> Wanted:
    """Ask the hub for a released model, by its name or id, or for USER/REPO in our format.

    Raises FileNotFoundError for what is neither, ValueError for a name that no folder can have and a source that does
    not have the model, DownloadError where the hub refuses.
    """
    model = known_name(model)
    repository = model.removeprefix(HUB).strip("/")
    if model not in REPOSITORIES and not _HUB_ID.fullmatch(repository):
        what = "there are no public weights of this model" if model in PRESETS else "no released model has that name"
        raise FileNotFoundError(f"{model}: {what}; there are {', '.join(REPOSITORIES)}, and USER/REPO of the hub")
    chosen = name or (model if model in REPOSITORIES else repository.split("/")[1].lower())
    if Path(chosen).name != chosen or chosen.startswith("."):
        raise ValueError(f"name {chosen!r} is not the name of a folder")
    if model not in REPOSITORIES:
        return _ours(repository, revision, chosen)
    layout = _source_of(model, source)
    repository = OPTIMIZED if layout == "port" else REPOSITORIES[model]
    remote = look(repository, revision or recorded_revision(repository))
    files = _port_files(model, remote) if layout == "port" else _official_files(model)
    licences = RELEASED if PRESETS[model].diffusion is not None else (STABILITY,)
    remote.chosen(files)  # all of them are there
    return Wanted(name=chosen, layout=layout, remote=remote, files=files, licences=licences)


def _source_of(model: str, source: Source) -> Layout:
    """Choose the anonymous repository, or with a token the original one; an autoencoder is in that one only."""
    if PRESETS[model].diffusion is None:
        if source == "optimized":
            raise ValueError(f"{model}: is in the original repository only; leave --source out")
        return "official"
    if source == "auto":
        return "official" if has_token() else "port"
    return "port" if source == "optimized" else "official"


def _port_files(model: str, remote: Remote) -> tuple[str, ...]:
    """Name the files, that of the DiT first; and what 'sa3 convert --to-mlx-npz' writes beside, where it is there."""
    names = [f"{_OPTIMIZED_FOLDER}/{name}" for name in (*file_names(PRESETS[model]).values(), *_BESIDE)]
    return tuple(name for name in names if name in remote.files or not name.endswith(".json"))


def _official_files(model: str) -> tuple[str, ...]:
    text = [f"{TEXT_SUBFOLDER}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)]
    return ("model_config.json", WEIGHTS_FILE, *(text if PRESETS[model].diffusion is not None else ()))


def _ours(repository: str, revision: str | None, name: str) -> Wanted:
    remote = look(repository, revision or recorded_revision(repository))
    missing = [file for file in _OURS[:2] if file not in remote.files]
    if missing:
        raise DownloadError(f"{remote.page} has no {listed(missing)}: not a model that 'sa3 push' wrote")
    files = tuple(file for file in (*_OURS, *_OURS_TOO) if file in remote.files)
    return Wanted(name=name, layout="ours", remote=remote, files=files, licences=(named(remote.licence, remote.page),))


def is_installed(name: str) -> bool:
    """Tell whether a model has this name already."""
    return name in installed()


# --- revisions --------------------------------------------------------------------------------------------------------


def recorded_revision(repository: str) -> str | None:
    """Return the revision of a repository that this machine took first; later downloads take it again."""
    return _revisions().get(repository)


def record_revision(remote: Remote) -> None:
    """Remember the revision. Raises OSError where the disk refuses."""
    path = _revisions_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {**_revisions(), remote.repository: remote.revision})


def _revisions() -> Mapping[str, str]:
    try:
        return {str(key): str(value) for key, value in read_object(_revisions_file()).items()}
    except (OSError, ValueError):  # there is none, or it is damaged: the newest one is taken and recorded
        return {}


def _revisions_file() -> Path:
    return home() / "revisions.json"
