"""What stands under a name is complete, or what stood there before."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa3_mlx.common.files import atomic
from sa3_mlx.common.files.atomic import (
    WriteError,
    locked,
    new_file,
    new_folder,
    remove_partials,
    write_json,
    write_text,
)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _dead() -> int:
    """Return the number of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        return process.pid


def test_a_file_appears_at_the_end_and_replaces_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with new_file(tmp_path / "a") as partial:
        partial.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new" and _names(tmp_path) == ["a"]
    write_json(tmp_path / "a", {"ä": [1]})
    assert (tmp_path / "a").read_text(encoding="utf-8") == '{\n "ä": [\n  1\n ]\n}\n'
    write_json(tmp_path / "a", name := os.fsdecode(b"\xe4.wav"))
    assert json.loads((tmp_path / "a").read_bytes()) == name


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    full = pytest.raises(OSError, match=r"a: could not be written \(No space left on device\); nothing was left behind")
    with full, new_file(tmp_path / "a"):
        _full()
    assert (tmp_path / "a").read_text() == "old" and _names(tmp_path) == ["a"]


@pytest.mark.parametrize("swaps", [True, False])
def test_a_folder_appears_at_the_end_and_comes_back_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    if not swaps:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    for text in ("old", "new"):
        with new_folder(tmp_path / "a") as partial:
            write_text(partial / "x", text)
    assert (tmp_path / "a" / "x").read_text() == "new" and _names(tmp_path) == ["a"]
    full = pytest.raises(OSError, match=r"/a: could not be written \(No space left on device\); nothing")
    with full as caught, new_folder(tmp_path / "a") as partial:
        monkeypatch.setattr(Path, "replace", _full)
        write_text(partial / "x", "half")
    assert "\n" not in str(caught.value) and ".partial" not in str(caught.value)
    assert (tmp_path / "a" / "x").read_text() == "new" and _names(tmp_path) == ["a"]


def test_an_error_is_wrapped_once_and_says_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(WriteError) as caught,
        new_folder(tmp_path / "a") as outer,
        new_folder(outer / "b") as inner,
        new_file(inner / "c"),
    ):
        _full()
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: could not be written (No space left on device); nothing was left behind; free some space"
    )
    assert caught.value.errno == errno.ENOSPC and not _names(tmp_path)


def test_errors_of_other_files_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, new_file(tmp_path / "a"):
        (tmp_path / "input").read_bytes()
    assert not isinstance(caught.value, WriteError) and caught.value.filename == str(tmp_path / "input")
    with pytest.raises(BrokenPipeError), new_file(tmp_path / "a"):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "gone")
    with pytest.raises(WriteError, match=r"it is a link to .*gone, which is not there"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").is_symlink() and _names(tmp_path) == ["a"]


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    name = "ä" * 125 + ".wav"
    write_text(tmp_path / name, "new")
    assert _names(tmp_path) == [name]
    with pytest.raises(WriteError, match="File name too long"):
        write_text(tmp_path / f"{name}xx", "new")


def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = _dead()
    (tmp_path / f".a.wav.{dead}.partial").write_text("half")
    (tmp_path / f".b.{dead}.partial").mkdir()
    (tmp_path / f".b.{dead}.partial" / "x").write_text("half")
    (tmp_path / f".b.{dead}.replaced").mkdir()  # killed between the two renames
    (tmp_path / f".c.{dead}.replaced").mkdir()
    (tmp_path / "c").mkdir()
    kept = [f".d.{os.getppid()}.partial", ".e.partial", ".f", f"g.{dead}.partial"]
    for name in kept:
        (tmp_path / name).write_text("not ours, or in use")
    with new_file(tmp_path / "mine") as partial:
        remove_partials(tmp_path)
        assert partial.exists()
    assert _names(tmp_path) == sorted([*kept, "b", "c", "mine"])
    monkeypatch.chdir(tmp_path)
    Path(f".a.{dead}.partial").touch()
    write_text(Path("mine"), "again")
    assert Path(f".a.{dead}.partial").exists(), "a folder is swept once"


def test_what_another_process_holds_is_left_alone(tmp_path: Path) -> None:
    """Even where its number means nothing here, as in another container."""
    path = tmp_path / f".a.{_dead()}.partial"
    program = (
        f"import fcntl; file = open({str(path)!r}, 'w'); fcntl.flock(file, fcntl.LOCK_EX); print(flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        remove_partials(tmp_path)
        assert path.exists()
        process.communicate(b"\n")
    remove_partials(tmp_path)
    assert not path.exists()


def test_a_folder_is_locked_for_one(tmp_path: Path) -> None:
    taken = pytest.raises(OSError, match=f"{tmp_path}: another process works in this folder; let it end")
    with locked(tmp_path), taken, locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_content_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_files = Path("/proc/self/fd")
    if not open_files.is_dir():
        pytest.skip("names of open files are read from /proc")
    done: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda number: done.append((open_files / str(number)).readlink()))
    with new_folder(tmp_path / "a") as partial:
        write_text(partial / "x", "new")
        assert not done
    assert done == [partial / "x", partial, tmp_path]
