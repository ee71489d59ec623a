"""Write files and folders as a whole: what stands under a name is complete, or what stood there before.

Every write of ours goes through here. The new content is made beside the old under a hidden name,
``.NAME.PROCESS.partial``, is brought to the disk, and takes its place by one rename. Whoever writes holds a lock
(flock) on it: one that nobody holds was left by a process that was killed, and the next process that writes to the same
folder removes it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LEFT_BY = re.compile(r"\.(.+)\.(\d+)\.(partial|replaced)", re.DOTALL)  # name, number of the process
_NAME_BYTES = 255  # the longest name of a file
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EACCES: "choose another folder",
    errno.EPERM: "choose another folder",
    errno.EROFS: "choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "make the folder first",
}
_swept: set[Path] = set()  # folders in which this process has removed what others left


class WriteError(OSError):
    """Report that the disk refuses ``path``; the message is one line with the reason and what to do."""

    def __init__(self, path: Path, reason: str, number: int | None) -> None:
        remedy = _REMEDIES.get(number or 0)
        super().__init__(
            f"{path}: could not be written ({reason}); nothing was left behind" + (f"; {remedy}" if remedy else "")
        )
        self.reason, self.errno = reason, number


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; the file there replaces ``path`` at the end, and is removed after an error.

    Raises WriteError where the disk refuses, and for a link that leads nowhere.
    """
    partial = _hidden(path, "partial")
    with _refusing(path, partial):
        if path.is_symlink() and not path.exists():
            raise OSError(errno.EEXIST, f"it is a link to {path.readlink()}, which is not there")
        _sweep_once(path.parent)
        with _held(partial, os.open(partial, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o666)):
            yield partial
            _settle(partial)
            partial.replace(path)
            _sync_name(path)


@contextmanager
def continued_file(path: Path) -> Iterator[Path]:
    """Yield a file to append to, ``.NAME.part``; at the end it becomes ``path``. After an error it stays as it is.

    The next call finds it again, in any process; another one at the same time is refused. For what is long and can be
    checked as a whole, such as a download. Raises OSError where the disk refuses, or another process works on it.
    """
    part = path.with_name(f".{path.name}.part")
    with _closing(os.open(part, os.O_RDONLY | os.O_CREAT, 0o666)) as descriptor:
        if _lock(descriptor) is False:
            raise OSError(f"{path}: another process downloads it; let it end")
        yield part
        _settle(part)
        part.replace(path)
        _sync_name(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it replaces ``path`` at the end, and is removed after an error.

    Raises WriteError where the disk refuses.
    """
    partial = _hidden(path, "partial")
    with _refusing(path, partial):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep_once(path.parent)
        partial.mkdir()
        with _held(partial, os.open(partial, os.O_RDONLY)):
            yield partial
            _settle(partial)
            if not os.path.lexists(path):
                partial.rename(path)
            elif not _exchange(partial, path):
                _replace_in_two_steps(partial, path)
            _sync_name(path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file as a whole. Raises WriteError where the disk refuses."""
    with new_file(path) as partial:
        partial.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file as a whole. Raises WriteError where the disk refuses."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file as a whole, indented. Raises WriteError where the disk refuses."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    if any("\ud800" <= character <= "\udfff" for character in text):  # of names of files that are not UTF-8
        text = json.dumps(data, indent=1)
    write_text(path, text + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that ask for this lock out of a folder, which must exist; it ends with the process at last.

    Raises OSError, one line that names the folder, where another process has it.
    """
    with _closing(os.open(folder, os.O_RDONLY)) as descriptor:
        if _lock(descriptor) is False:
            raise OSError(f"{folder}: another process works in this folder; let it end, or choose another folder")
        yield


def is_partial(name: str) -> bool:
    """Tell whether a name is one that ``new_file`` and ``new_folder`` give to what is not complete."""
    return name.endswith(".partial") and bool(_LEFT_BY.fullmatch(name))


def remove_partials(folder: Path) -> None:
    """Remove what processes that were killed have left in a folder, and bring back what they had moved aside."""
    for path in folder.glob(".*"):
        if found := _LEFT_BY.fullmatch(path.name):
            original = path.with_name(found[1])
            with suppress(OSError):  # somebody else may have removed it, or may have to
                if _in_use(path, int(found[2])):
                    continue
                if found[3] == "replaced" and not os.path.lexists(original):
                    path.rename(original)
                else:
                    _remove(path)


def _sweep_once(folder: Path) -> None:
    folder = folder.absolute()
    if folder not in _swept and not _unfinished(folder):
        _swept.add(folder)
        remove_partials(folder)


def _hidden(path: Path, kind: str) -> Path:
    """Name a neighbour of ``path``, whose own name may be as long as names can be."""
    ending = f".{os.getpid()}.{kind}"
    name = path.name.encode("utf-8", "surrogateescape")[: _NAME_BYTES - 1 - len(ending)]
    return path.with_name(f".{name.decode('utf-8', 'ignore')}{ending}")


def _unfinished(path: Path) -> bool:
    """Tell whether a path lies in a folder that is not complete itself, and is settled with it."""
    return any(map(is_partial, path.parts))


@contextmanager
def _held(partial: Path, descriptor: int) -> Iterator[None]:
    """Hold the lock on a partial file or folder, and remove what is there at the end."""
    try:
        with _closing(descriptor):
            _lock(descriptor)
            yield
    finally:
        _remove(partial)


@contextmanager
def _closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Take the lock on an open file or folder; False where another process has it, None where locks do not work."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _in_use(path: Path, process: int) -> bool:
    """Tell whether somebody may still be writing: the lock is seen from other containers, a process is not."""
    with _closing(os.open(path, os.O_RDONLY)) as descriptor:
        if _lock(descriptor) is False:
            return True
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _settle(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk; what lies in an unfinished folder waits for it."""
    if _unfinished(path.parent):
        return
    for folder, _, names in os.walk(path):
        for name in (*names, "."):
            _sync(Path(folder, name))
    if path.is_file():
        _sync(path)


def _sync_name(path: Path) -> None:
    if not _unfinished(path.parent):
        _sync(path.parent)


def _sync(path: Path) -> None:
    with _closing(os.open(path, os.O_RDONLY)) as descriptor:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # of file systems that have nothing to bring anywhere
                raise


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; return whether the system and the file system can do it."""
    try:
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(library.renamex_np(os.fsencode(first), os.fsencode(second), 2) == 0)  # RENAME_SWAP
        here = -100  # AT_FDCWD: names count from the current folder
        return bool(library.renameat2(here, os.fsencode(first), here, os.fsencode(second), 2) == 0)  # RENAME_EXCHANGE
    except (OSError, AttributeError):
        return False


def _replace_in_two_steps(partial: Path, path: Path) -> None:
    """Put ``partial`` in place of ``path``; where a process is killed in between, the old one is brought back later."""
    replaced = _hidden(path, "replaced")
    path.rename(replaced)
    try:
        partial.rename(path)
    except OSError:
        replaced.rename(path)
        raise
    _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _refusing(path: Path, partial: Path) -> Iterator[None]:
    """Turn errors of the disk into a WriteError that names ``path``; those of other files stay what they are."""
    try:
        yield
    except BrokenPipeError:
        raise
    except WriteError as error:  # of a file inside of a new folder
        raise WriteError(path, error.reason, error.errno) from error
    except OSError as error:
        if isinstance(error.filename, str | bytes):
            named = Path(os.fsdecode(error.filename))
            if named not in (path, *path.parents) and partial not in (named, *named.parents):
                raise
        raise WriteError(path, error.strerror or str(error), error.errno) from error
