"""What stands under a name is complete, or what stood there before."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from sa3_mlx.common.files.atomic import new_file, new_folder, write_json, write_text


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_appears_at_the_end_and_replaces_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with new_file(tmp_path / "a") as partial:
        partial.write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert (tmp_path / "a").read_text() == "new" and _names(tmp_path) == ["a"]
    write_json(tmp_path / "a", {"ä": [1]})
    assert (tmp_path / "a").read_text(encoding="utf-8") == '{\n "ä": [\n  1\n ]\n}\n'


def test_an_error_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    with pytest.raises(KeyboardInterrupt), new_file(tmp_path / "a") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    full = pytest.raises(OSError, match=r"a: could not be written \(No space left on device\); nothing was left behind")
    with full, new_file(tmp_path / "a"):
        _full()
    assert (tmp_path / "a").read_text() == "old" and _names(tmp_path) == ["a"]


def test_a_folder_appears_at_the_end_and_comes_back_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
