"""Archives of arrays: what numpy and MLX write is read, and whatever is damaged or hostile is one line."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from sa3_convert.port.npz import ArrayFile, Blob, write_arrays

from sa3_mlx.common.files.safetensors import array_entry
from tests.support.foreign.port_files import npy

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.linspace(-1, 1, 7, dtype=np.float16),
    "fortran": np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4)),
    "single": np.float32(2.5).reshape(()),
    "empty": np.zeros((1, 0, 1), np.float32),
    "bytes": np.frombuffer(b"{}", np.uint8),
}


def members(path: Path, contents: dict[str, bytes], **options: int) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_saves_is_read(save, tmp_path):
    save(tmp_path / "a.npz", **ARRAYS)
    with ArrayFile.open(tmp_path / "a.npz") as file:
        assert file.names() == sorted(ARRAYS)
        for name, wanted in ARRAYS.items():
            found = file.read(name)
            np.testing.assert_array_equal(found, wanted)
            assert found.flags.c_contiguous and file.shape(name) == wanted.shape
        assert [file.dtype(name) for name in ("a.weight", "half", "bytes")] == ["F32", "F16", "uint8"]
        assert file.read_bytes("bytes", 10) == b"{}"


def test_what_mlx_saves_is_read(tmp_path):
    mx = pytest.importorskip("mlx.core")
    mx.savez(str(tmp_path / "a.npz"), a=mx.arange(6).reshape(2, 3).astype(mx.float16).T)
    with ArrayFile.open(tmp_path / "a.npz") as file:
        np.testing.assert_array_equal(file.read("a"), np.arange(6, dtype=np.float16).reshape(2, 3).T)


def test_what_is_written_is_read_by_numpy_and_has_the_same_bytes_again(tmp_path):
    entries = [array_entry("a.b", ARRAYS["a.weight"]), array_entry("none", ARRAYS["empty"]), Blob("META", b"{}")]
    for name in ("a.npz", "b.npz"):
        write_arrays(tmp_path / name, entries)
    found = dict(np.load(tmp_path / "a.npz", allow_pickle=False))
    assert list(found) == ["a.b", "none", "META"]
    np.testing.assert_array_equal(found["a.b"], ARRAYS["a.weight"])
    assert found["META"].tobytes() == b"{}" and found["none"].shape == (1, 0, 1)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_entry_that_loads_something_else_leaves_no_file(tmp_path):
    entry = array_entry("a", ARRAYS["a.weight"])
    with pytest.raises(ValueError, match="announced F32"):
        write_arrays(tmp_path / "a.npz", [type(entry)("a", "F32", (2, 2), entry.load)])
    assert list(tmp_path.iterdir()) == []


def _bomb(path: Path) -> Path:
    """A gigabyte of zeros in a megabyte, under a header that claims four numbers."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as stream:
        stream.write(npy(np.zeros(4, np.float32)))
        for _ in range(64):
            stream.write(bytes(1 << 20))
    return path


OBJECT = npy(np.array([{"a": 1}], object), allow_pickle=True)
GOOD = npy(np.arange(64, dtype=np.float32))
HOSTILE = {
    "not_a_zip": (lambda p: p.write_bytes(b"<html>Not here</html>"), "not an .npz archive"),
    "empty": (lambda p: p.write_bytes(b""), "not an .npz archive"),
    "objects": (lambda p: members(p, {"a.npy": OBJECT}), "Python objects"),
    "bomb": (_bomb, "its type and shape need"),
    "parent": (lambda p: members(p, {"../a.npy": GOOD}), "not the name of an array"),
    "absolute": (lambda p: members(p, {"/elsewhere/a.npy": GOOD}), "not the name of an array"),
    "other_file": (lambda p: members(p, {"run.py": b"1"}), "not the name of an array"),
    "truncated_member": (lambda p: members(p, {"a.npy": GOOD[:-8]}), "its type and shape need"),
    "longer_member": (lambda p: members(p, {"a.npy": GOOD + b"more"}), "its type and shape need"),
    "no_header": (lambda p: members(p, {"a.npy": b"\x93NUMPY"}), "no valid header"),
    "strange_header": (
        lambda p: members(p, {"a.npy": b"\x93NUMPY\x01\x00\x0a\x00__import__"}),
        "no valid header",
    ),
    "huge_shape": (
        lambda p: members(p, {"a.npy": GOOD.replace(b"(64,)", b"(1" + b"0" * 30 + b",)")[: len(GOOD)]}),
        "no valid header",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_when_they_are_opened(kind, tmp_path):
    make, words = HOSTILE[kind]
    make(tmp_path / "a.npz")
    tracemalloc.start()
    with pytest.raises(ValueError, match=words) as error:
        ArrayFile.open(tmp_path / "a.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "a.npz" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert peak < 16e6  # the bomb has 64 MB


def test_a_name_given_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", GOOD)
        archive.writestr("a.npy", GOOD)
    with pytest.raises(ValueError, match="a is there twice"):
        ArrayFile.open(tmp_path / "a.npz")


def test_a_changed_byte_is_found_when_the_array_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.arange(1 << 16, dtype=np.float32))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[data.index(np.float32(40_000).tobytes())] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with ArrayFile.open(tmp_path / "a.npz") as file, pytest.raises(ValueError, match="array 'a' cannot be read"):
        file.read("a")


def test_a_cut_archive_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", **ARRAYS)
    data = (tmp_path / "a.npz").read_bytes()
    for length in range(0, len(data) - 1, 37):
        (tmp_path / "b.npz").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"b\.npz: not an \.npz archive"):
            ArrayFile.open(tmp_path / "b.npz")


@pytest.mark.parametrize("dtype", [np.int32, np.complex64, ">f4"])
def test_other_types_are_named_as_numpy_does(dtype, tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3, dtype))
    with ArrayFile.open(tmp_path / "a.npz") as file:
        assert file.dtype("a") == str(np.dtype(dtype))
        with pytest.raises(ValueError, match="must be bytes"):
            file.read_bytes("a", 100)
