"""What only an Apple GPU can show: its results against those of the CPU backend. Nobody has run these here.

Run with ``pytest -m metal``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from twins import Twin, relative

pytestmark = pytest.mark.metal
MLX = Twin("mlx")


@contextmanager
def _device(name: str) -> Iterator[Any]:
    """Everything inside runs on "cpu" or "gpu"."""
    mx = pytest.importorskip("mlx.core")
    before = mx.default_device()
    mx.set_default_device(getattr(mx, name))
    try:
        yield mx
    finally:
        mx.set_default_device(before)


def _both(run: Any) -> tuple[np.ndarray, np.ndarray]:
    outputs = []
    for name in ("cpu", "gpu"):
        with _device(name):
            outputs.append(MLX.numpy(run()))
    return outputs[0], outputs[1]


@pytest.mark.parametrize("rows", [17, 1])
def test_window_attention_on_strided_views(rows: int) -> None:
    """The fused kernel reads overlapping views, one query row per group too; differential, batch 2."""
    rng = np.random.default_rng(0)
    shapes = ((2, 6, 5 * rows, 64), (2, 6, 85, 64), (2, 3, 85, 64))
    q, k, v = (MLX.array(rng.standard_normal(shape, np.float32)) for shape in shapes)
    mask = MLX.window_mask(5, 17)[:, :rows]
    cpu, gpu = _both(partial(MLX.module("attention").attend_window, q, k, v, mask))
    assert relative(gpu, cpu) < 2e-3  # TF32 is allowed on some chips


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_with_a_bias_of_the_logits(dtype: str) -> None:
    rng = np.random.default_rng(1)
    shapes = ((2, 4, 30, 64), (2, 4, 9, 64), (2, 4, 9, 64), (2, 1, 1, 9))
    q, k, v, bias = (MLX.array(rng.standard_normal(shape, np.float32)).astype(MLX.dtype(dtype)) for shape in shapes)
    cpu, gpu = _both(partial(MLX.module("attention").attend, q, k, v, bias))
    assert relative(gpu, cpu) < (2e-3 if dtype == "float32" else 1e-2)


@pytest.mark.parametrize("model", ["tiny-s", "tiny-l"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_autoencoder_with_and_without_compiled_groups(
    random_models: dict[str, Path], model: str, compiled: bool
) -> None:
    same, layers = MLX.load(random_models[model], "same"), MLX.module("layers")
    z = MLX.array(np.random.default_rng(2).standard_normal((1, 7, 16), np.float32))
    layers.compile_pointwise(compiled)
    try:
        with _device("gpu"):
            gpu = MLX.numpy(same.decode(z))
    finally:
        layers.compile_pointwise(True)
    layers.compile_pointwise(False)
    try:
        with _device("cpu"):
            cpu = MLX.numpy(same.decode(z))
    finally:
        layers.compile_pointwise(True)
    assert relative(gpu, cpu) < 1e-2
