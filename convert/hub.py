"""Find and fetch files of the hub through huggingface_hub: its endpoint, its token, its cache, its environment.

HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to that library. Files lie under ``downloads``
until they are converted; a download that broke off goes on where it was, also in another process, and every file is
compared with the hash that the hub announces.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from sa3_mlx.common.files.atomic import continued_file
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.installed import HUB
from sa3_mlx.common.schema import listed, quoted

OnBytes = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
_RESERVE = 50_000_000  # bytes of a disk that are left free


class DownloadError(OSError):
    """Say in one line why files of the hub could not be had and what to do."""


class AccessRefused(DownloadError):
    """Report a repository that is not there for this user."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """Describe a file as the hub announces it."""

    name: str
    size: int
    hash: str  # "sha256:..." of large files, "git-sha1:..." of those that lie in git itself


@dataclass(frozen=True, kw_only=True)
class Remote:
    """Describe a repository at one revision."""

    repository: str
    revision: str  # 40 hexadecimal digits
    files: Mapping[str, RemoteFile]
    licence: str | None  # as its model card names it

    @property
    def page(self) -> str:
        """Return its address for people."""
        return HUB + self.repository

    def chosen(self, names: Sequence[str]) -> list[RemoteFile]:
        """Return files by name. Raises DownloadError for one that is not there."""
        missing = [name for name in names if name not in self.files]
        if missing:
            raise DownloadError(f"{self.page} has no {listed(missing)} at revision {self.revision[:8]}")
        return [self.files[name] for name in names]


def has_token() -> bool:
    """Tell whether an access token of the hub is on this machine."""
    from huggingface_hub import get_token

    return bool(get_token())


def look(repository: str, revision: str | None) -> Remote:
    """Ask the hub what is in a repository; None is its newest revision. Raises DownloadError."""
    from huggingface_hub import HfApi

    with _told(repository):
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=30)
    files = {}
    for sibling in info.siblings or ():
        path = PurePosixPath(sibling.rfilename)
        if path.is_absolute() or ".." in path.parts or "\\" in sibling.rfilename:
            raise DownloadError(
                f"{repository}: the hub lists a file {quoted(sibling.rfilename)}, which no place is for"
            )
        digest = f"git-sha1:{sibling.blob_id}" if sibling.lfs is None else f"sha256:{sibling.lfs.sha256}"
        files[sibling.rfilename] = RemoteFile(name=sibling.rfilename, size=sibling.size or 0, hash=digest)
    if not isinstance(info.sha, str) or len(info.sha) != 40:
        raise DownloadError(f"{repository}: the hub names no revision")
    licence = None if info.card_data is None else info.card_data.get("license_name") or info.card_data.get("license")
    return Remote(
        repository=repository, revision=info.sha, files=files, licence=None if licence is None else str(licence)
    )


def folder_of(downloads: Path, remote: Remote) -> Path:
    """Return where the files of a repository lie at its revision."""
    return downloads / remote.repository.replace("/", "--") / remote.revision


def missing_bytes(downloads: Path, remote: Remote, names: Sequence[str]) -> int:
    """Return how much of these files is still to be downloaded."""
    folder = folder_of(downloads, remote)
    total = 0
    for file in remote.chosen(names):
        path = folder / file.name
        if not path.is_file() and _cached(remote, file.name) is None:
            part = path.with_name(f".{path.name}.part")
            total += file.size - min(file.size, part.stat().st_size if part.is_file() else 0)
    return total


def check_room(needs: Mapping[Path, int]) -> None:
    """Raise DownloadError where a disk has no room for what folders on it need, together."""
    disks: dict[int, tuple[Path, int]] = {}
    for folder, size in needs.items():
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        device = existing.stat().st_dev
        disks[device] = (existing, disks.get(device, (existing, 0))[1] + size)
    for existing, size in disks.values():
        free = shutil.disk_usage(existing).free
        if free < size + _RESERVE:
            raise DownloadError(
                f"{existing}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; free some space, or set "
                "SA3_HOME to a folder on another disk"
            )


def fetch(remote: Remote, names: Sequence[str], downloads: Path, progress: OnBytes | None) -> Path:
    """Bring files to this disk, verified; return the folder in which they lie under their names.

    Raises DownloadError where the hub or the network refuses and where a file is not what the hub announces; what is
    there of a file that broke off is kept, what is wrong is removed.
    """
    folder, chosen = folder_of(downloads, remote), remote.chosen(names)
    meter = _Meter(progress, "download", chosen)
    for file in chosen:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.unlink(missing_ok=True)  # a link to a file of the hub's cache that is gone
            if (cached := _cached(remote, file.name)) is not None:
                path.symlink_to(cached)
            else:
                _download(remote, file, path, meter)
        meter.end(file)
    meter = _Meter(progress, "verify", chosen)
    for file in chosen:
        path = folder / file.name
        linked = path.is_symlink()
        found = _hash(file, path, meter)
        if found != file.hash and linked:  # the hub's cache is damaged; it is somebody else's
            path.unlink()
            _download(remote, file, path, _Meter(None, "download", [file]))
            found = _hash(file, path, meter)
        if found != file.hash:
            path.unlink()
            raise DownloadError(
                f"{remote.page}: {file.name} is not what the hub announces ({found[:20]}... in place of "
                f"{file.hash[:20]}...); it was removed, run again"
            )
        meter.end(file)
    return folder


def upload(repository: str, files: Sequence[Path], texts: Mapping[str, bytes], *, private: bool) -> str:
    """Upload files and texts under their names in one commit; make the repository where there is none.

    Returns the new revision. Raises DownloadError where the hub refuses, or no access token is there.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not has_token():
        raise DownloadError(f"{repository}: no access token found; log in with 'hf auth login' (it must allow writing)")
    operations = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files]
    operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in texts.items()]
    with _told(repository, "upload"):
        HfApi().create_repo(repository, private=private, exist_ok=True)
        done = HfApi().create_commit(repository, operations, commit_message="sa3 push")
    return str(done.oid)


class _Meter:
    """Tell how much of all files is done, from how much of one is."""

    def __init__(self, progress: OnBytes | None, what: str, files: Sequence[RemoteFile]) -> None:
        self._progress = progress
        self._what = what
        self._total = sum(file.size for file in files)
        self._before = 0

    def __call__(self, done: int) -> None:
        if self._progress is not None:
            self._progress(self._what, self._before + done, self._total)

    def end(self, file: RemoteFile) -> None:
        self._before += file.size
        self(0)


def _cached(remote: Remote, name: str) -> Path | None:
    """Return the file in the hub's own cache, which other programs fill."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(remote.repository, name, revision=remote.revision)
    return Path(found) if isinstance(found, str) else None


def _download(remote: Remote, file: RemoteFile, path: Path, meter: _Meter) -> None:
    """Download a file, or what is missing of it since it broke off."""
    with _told(remote.repository), continued_file(path) as part:
        _append(remote, file, part, meter)


def _append(remote: Remote, file: RemoteFile, part: Path, meter: _Meter) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import get_hf_file_metadata, http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars, logging

    there = part.stat().st_size
    if there > file.size:
        part.write_bytes(b"")
        there = 0
    if there == file.size:
        return
    disable_progress_bars()  # ours shows all files together
    logging.set_verbosity(logging.ERROR)  # it tries again by itself, and says so
    url = hf_hub_url(remote.repository, file.name, revision=remote.revision)
    headers = build_hf_headers()
    location = get_hf_file_metadata(url, headers=headers).location
    if urlsplit(location).netloc != urlsplit(url).netloc:  # of the store of large files, which must not see the token
        headers.pop("authorization", None)
    with part.open("r+b") as stream:
        stream.seek(there)
        http_get(
            location,
            _Watched(stream, meter),  # type: ignore[arg-type]
            resume_size=there,
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.name,
        )


class _Watched:
    """Write to a file and tell how far it is."""

    def __init__(self, stream: Any, meter: _Meter) -> None:
        self._stream = stream
        self._meter = meter

    def write(self, data: bytes) -> int:
        count: int = self._stream.write(data)
        self._meter(self._stream.tell())
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _hash(file: RemoteFile, path: Path, meter: _Meter) -> str:
    """Return the hash of a file, of the kind that the hub announces."""
    if file.hash.startswith("git-sha1:"):  # files in git itself are small
        data = path.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        return f"git-sha1:{digest.hexdigest()}"
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        meter(done)

    return file_hash(path, advance)


@contextmanager
def _told(repository: str, what: str = "download") -> Iterator[None]:
    """Turn whatever the hub's library raises into a DownloadError."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    page = HUB + repository
    try:
        yield
    except DownloadError:
        raise
    except OfflineModeIsEnabled as error:
        raise DownloadError(
            f"{repository}: offline (HF_HUB_OFFLINE is set); connect once, or convert a folder with the files of {page}"
        ) from error
    except HfHubHTTPError as error:  # gated and missing repositories among them
        if error.response is not None and error.response.status_code in (401, 403, 404):
            token = "" if get_token() else " (no access token found)"
            raise AccessRefused(
                f"{repository}: access refused{token}; accept the licence at {page} and log in with 'hf auth login'"
            ) from error
        raise DownloadError(f"{repository}: the hub refused the {what}: {_first_line(error)}") from error
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise DownloadError(
                f"{repository}: could not be written ({error.strerror}); what is there is kept, free "
                "some space and run again"
            ) from error
        raise DownloadError(_broken(repository, what, error)) from error
    except Exception as error:  # whatever its HTTP library raises
        raise DownloadError(_broken(repository, what, error)) from error


def _broken(repository: str, what: str, error: Exception) -> str:
    if type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError"):
        return f"{repository}: cannot reach the hub ({_first_line(error)}); check the network and run again"
    return f"{repository}: {what} failed ({_first_line(error)}); run again, what is there is kept"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
