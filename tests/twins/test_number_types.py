"""What "auto" means for the types of the networks, and that the weights of a pipeline have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sa3_mlx.common.model.precision import Precision, choose_precision
from tests.support.twins import Twin


@pytest.mark.parametrize(
    ("dtype", "text", "on_gpu", "wanted"),
    [
        ("auto", "auto", False, ("float32", "float32")),
        ("auto", "auto", True, ("float16", None)),
        ("bfloat16", "auto", False, ("bfloat16", "float32")),
        ("float32", "bfloat16", True, ("float32", "bfloat16")),
    ],
)
def test_auto_depends_on_the_device(dtype: str, text: str, on_gpu: bool, wanted: tuple[str, str | None]) -> None:
    found = choose_precision(dtype, text, on_gpu=on_gpu)
    assert (found.dtype, found.text_dtype) == wanted
    assert (found.bytes, found.text_bytes) == (4 if wanted[0] == "float32" else 2, 4 if wanted[1] == "float32" else 2)


@pytest.mark.parametrize(("dtype", "text", "named"), [("half", "auto", "dtype is 'half'"), ("auto", "float16", "text")])
def test_other_names_are_refused(dtype: str, text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        choose_precision(dtype, text, on_gpu=False)


def test_parts_have_the_types_of_the_pipeline(twin: Twin, random_models: dict[str, Path]) -> None:
    load = twin.module("pipeline").Pipeline.load
    pipeline = load(random_models["tiny-s"], dtype="float16", text_dtype="bfloat16")
    assert pipeline.precision == Precision(dtype="float16", text_dtype="bfloat16")
    assert pipeline.load_part("dit").project_in.weight.dtype == twin.dtype("float16")
    assert pipeline.load_part("text_encoder").norm.weight.dtype == twin.dtype("bfloat16")
    assert pipeline.load_part("conditioner").seconds_embed.weight.dtype == twin.dtype("float32")
