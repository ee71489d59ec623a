"""Strict loading of checkpoint folders in both twins: what does not fit is listed, in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.files.safetensors import TensorEntry, to_bf16_bits, write_tensors
from sa3_mlx.common.model.checkpoint import PARTS, expected_tensors
from sa3_mlx.common.quant.format import check_folder
from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import weight, write_checkpoint
from tests.support.twins import Twin

CONFIG = TINY["tiny-s"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("weights"), CONFIG)


def _rewrite(folder: Path, out: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> Path:
    shutil.copytree(folder, out)

    def load(name: str, shape: tuple[int, ...]) -> Any:
        values = weight(name, shape)
        return to_bf16_bits(values) if dtype == "BF16" else values

    entries = [
        TensorEntry(name=name, dtype=dtype, shape=shape, load=lambda name=name, shape=shape: load(name, shape))
        for name, shape in shapes.items()
    ]
    write_tensors(out / "model.safetensors", entries, {"format": "sa3/1"})
    return out


@pytest.mark.parametrize("part", PARTS)
def test_every_part_holds_what_the_file_holds(twin: Twin, folder: Path, part: str) -> None:
    module = twin.load(folder, part)
    if twin.name == "torch":
        loaded = {name: twin.numpy(tensor) for name, tensor in module.state_dict().items()}
        assert not any(parameter.requires_grad for parameter in module.parameters())
    else:
        from mlx.utils import tree_flatten

        loaded = {name: twin.numpy(array) for name, array in tree_flatten(module.parameters())}
        assert not tree_flatten(module.trainable_parameters())
    expected = expected_tensors(CONFIG, [part])
    if part == "text_encoder":  # the table stays in the file
        table = expected.pop("text_encoder.embed_tokens.weight")
        rows = twin.numpy(module.embed_tokens(twin.array(np.array([[5, 0, table[0] - 1], [0, 0, 7]]))))
        np.testing.assert_array_equal(rows, weight("text_encoder.embed_tokens.weight", table)[[[5, 0, -1], [0, 0, 7]]])
    assert {f"{part}.{name}" for name in loaded} == set(expected)
    for name, shape in expected.items():
        np.testing.assert_array_equal(loaded[name.removeprefix(part + ".")], weight(name, shape))


def test_the_type_is_that_of_the_file_or_the_one_asked_for(twin: Twin, folder: Path, tmp_path: Path) -> None:
    half = _rewrite(folder, tmp_path / "half", expected_tensors(CONFIG), "BF16")
    assert twin.load(half, "dit", None).project_in.weight.dtype == twin.dtype("bfloat16")
    assert twin.load(half, "dit", "float32").project_in.weight.dtype == twin.dtype("float32")
    assert twin.load(folder, "dit", "float16").memory_tokens.dtype == twin.dtype("float16")


def test_missing_unexpected_and_mis_shaped_tensors_are_listed(twin: Twin, folder: Path, tmp_path: Path) -> None:
    shapes = expected_tensors(CONFIG)
    del shapes["dit.project_out.weight"]
    shapes |= {"dit.project_up.weight": (3, 4), "dit.layers.1.ff.proj_in.bias": (7,)}
    broken = _rewrite(folder, tmp_path / "broken", shapes)
    with pytest.raises(ValueError, match=r"3 tensor\(s\) do not fit") as caught:
        twin.load(broken, "dit")
    message = str(caught.value)
    assert "\n" not in message
    for line in (
        "missing: dit.project_out.weight",
        "unexpected: dit.project_up.weight",
        "dit.layers.1.ff.proj_in.bias",
    ):
        assert line in message
    assert twin.load(broken, "same") is not None  # another part of the same file is whole
    with pytest.raises(ValueError, match=r"missing: dit\.project_out\.weight"):
        check_folder(broken, CONFIG)
    check_folder(folder, CONFIG)


def test_a_folder_without_weights_is_not_found(twin: Twin, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        twin.load(tmp_path, "dit")


def test_a_truncated_file_is_refused(twin: Twin, folder: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(folder, short)
    data = (folder / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        twin.load(short, "same")


def test_mlx_reads_a_tensor_when_it_is_first_used(folder: Path) -> None:
    """Loading a part costs no memory; the decoder can be opened long before it runs."""
    mx = pytest.importorskip("mlx.core")
    before = mx.get_active_memory()
    module = Twin("mlx").load(folder, "dit")
    assert mx.get_active_memory() - before < 100_000
    mx.eval(module.parameters())
    assert mx.get_active_memory() - before > 2_000_000
