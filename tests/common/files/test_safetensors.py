"""The safetensors reader and writer: exact values, streaming, and a clear word about every damaged file."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sa3_mlx.common.files.safetensors import (
    TensorEntry,
    TensorFile,
    array_entry,
    file_hash,
    from_bf16_bits,
    to_bf16_bits,
    write_tensors,
)


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    return {
        "a.half": random.standard_normal((3, 5)).astype(np.float16),
        "b.single": random.standard_normal((2, 3, 4)).astype(np.float32),
        "c.empty": np.zeros((1, 0, 1), np.float32),
        "d.scalar": np.array(2.5, np.float32),
        "e.tokens": np.arange(7, dtype=np.int64),
        "f.mask": np.array([1, 0, 1], np.uint8),
    }


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_files_of_the_safetensors_library_read_equal(tmp_path, arrays):
    save_file(arrays, tmp_path / "x.safetensors", metadata={"who": "library"})
    with TensorFile.open(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"who": "library"}
        assert file.names() == sorted(arrays)
        for name, array in arrays.items():
            assert file.info(name)[1] == array.shape
            np.testing.assert_array_equal(file.raw(name), array)
            assert file.raw(name).dtype == array.dtype


def test_the_safetensors_library_reads_our_files_equal(tmp_path, arrays):
    digest = write_tensors(tmp_path / "x.safetensors", [array_entry(n, a) for n, a in arrays.items()], {"k": "v"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert sorted(loaded) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert digest == file_hash(tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_order_of_the_entries_does_not_change_the_file(tmp_path, arrays):
    entries = [array_entry(name, array) for name, array in arrays.items()]
    assert write_tensors(tmp_path / "a", entries, {}) == write_tensors(tmp_path / "b", reversed(entries), {})


def test_every_tensor_is_aligned_to_its_type(tmp_path):
    write_tensors(tmp_path / "x", [array_entry("a", np.ones(3, np.uint8)), array_entry("b", np.ones(2, np.int64))], {})
    raw = (tmp_path / "x").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert (8 + length) % 8 == 0
    assert header["b"]["data_offsets"] == [0, 16]


def test_bfloat16_widens_exactly_and_rounds_to_nearest_even(tmp_path):
    bits = np.arange(0, 1 << 16, dtype=np.uint16)
    finite = bits[(bits & 0x7F80) != 0x7F80]
    np.testing.assert_array_equal(to_bf16_bits(from_bf16_bits(finite)), finite)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF], np.uint32).view(np.float32)
    np.testing.assert_array_equal(to_bf16_bits(ties), np.array([0x3F80, 0x3F82, 0x3F81, 0x3F80], np.uint16))
    assert np.isnan(from_bf16_bits(to_bf16_bits(np.array([np.nan], np.float32)))).all()
    write_tensors(tmp_path / "x", [array_entry("w", ties.reshape(2, 2), "BF16")], {})
    with TensorFile.open(tmp_path / "x") as file:
        assert file.info("w") == ("BF16", (2, 2))
        np.testing.assert_array_equal(file.read("w").ravel(), from_bf16_bits(to_bf16_bits(ties)))


def test_half_widens_to_single_on_read(tmp_path, arrays):
    write_tensors(tmp_path / "x", [array_entry("h", arrays["a.half"])], {})
    with TensorFile.open(tmp_path / "x") as file:
        assert file.read("h").dtype == np.float32
        np.testing.assert_array_equal(file.read("h"), arrays["a.half"].astype(np.float32))


def test_tensors_are_loaded_one_at_a_time_and_in_file_order(tmp_path):
    order: list[str] = []

    def entry(name: str) -> TensorEntry:
        return TensorEntry(name, "F32", (2,), lambda: order.append(name) or np.zeros(2, np.float32))

    write_tensors(tmp_path / "x", (entry(name) for name in "cab"), {})
    assert order == ["a", "b", "c"]


def test_a_failing_load_leaves_nothing_and_keeps_the_old_file(tmp_path):
    write_tensors(tmp_path / "x", [array_entry("a", np.ones(3, np.float32))], {})
    before = (tmp_path / "x").read_bytes()
    bad = TensorEntry("b", "F32", (4,), lambda: np.ones(5, np.float32))
    with pytest.raises(ValueError, match="tensor b: announced F32"):
        write_tensors(tmp_path / "x", [bad], {})
    assert (tmp_path / "x").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_name_given_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tensor a given twice"):
        write_tensors(tmp_path / "x", [array_entry("a", np.ones(3, np.float32))] * 2, {})
    assert not list(tmp_path.iterdir())


GOOD = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (GOOD, b"1234", "truncated"),
        (GOOD, b"1234567890", "2 bytes too long"),
        ({"w": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, b"12", "dtype F8_E4M3"),
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678", "needs 12"),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, b"12345678", "negative"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, b"1" * 12, "does not follow"),
        ({"w": {"dtype": "F32", "shape": [2]}}, b"12345678", "data_offsets"),
        ([1, 2], b"", "not an object"),
        (b"{not json", b"", "invalid safetensors header"),
        (b'{"a": 1, "a": 2}', b"", "a appears twice"),
        (b'{"a": 1}', b"", "tensor 'a' is 1, must have dtype, shape and data_offsets"),
        (b'{"__metadata__": [1]}', b"", r"its __metadata__ is \[1\], must be an object of texts"),
        (b'{"__metadata__": {"a": 1}}', b"", "its __metadata__ is {'a': 1}, must be an object of texts"),
        (b"[" * 100_000, b"", "nested too deeply"),
        (b'{"a": {"dtype": "F32", "shape": [0, 1%s], "data_offsets": [0, 0]}}' % (b"0" * 60), b"", "has shape"),
        (b'{"%s": {"dtype": [], "shape": [], "data_offsets": [0, 0]}}' % (b"x" * 10_000), b"", "has dtype"),
    ],
)
def test_damaged_files_are_named_in_one_line(tmp_path, header, data, message):
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ValueError, match=message) as caught:
        TensorFile.open(path)
    assert "bad.safetensors" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 64, b"\x40" + bytes(7) + b"{}"])
def test_files_that_are_not_safetensors_are_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError, match=r"not a safetensors file|truncated"):
        TensorFile.open(tmp_path / "x")


def test_a_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        TensorFile.open(tmp_path / "nothing")
