"""The MLX twin on an Apple GPU: the same operations, networks and clips as on a CPU.

Run with ``pytest -m metal`` on a Mac. The tolerances are expectations: no Apple GPU was at hand to measure them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Sampling
from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.twins import Twin, load_cases, relative
from tests.twins.test_small_models import run_small_model

pytestmark = pytest.mark.metal
NETWORK = 1e-3  # relative L2 in fp32
OPERATION = 2e-3  # TF32 is allowed on some chips
CLIP = 1e-2
REQUEST = Request(
    items=(Item(prompt="soft rain", seconds=0.8, seed=3),), sampling=Sampling(sampler="pingpong", steps=4)
)
MLX = Twin("mlx")


@contextmanager
def _device(name: str) -> Iterator[None]:
    """Everything inside runs on "cpu" or "gpu"."""
    mx = pytest.importorskip("mlx.core")
    before = mx.default_device()
    mx.set_default_device(getattr(mx, name))
    try:
        yield
    finally:
        mx.set_default_device(before)


@pytest.fixture
def gpu() -> Iterator[None]:
    """The GPU as the default device of one test; skips where there is none."""
    if not pytest.importorskip("mlx.core").metal.is_available():
        pytest.skip("no Apple GPU")
    with _device("gpu"):
        yield


def _both(run: Callable[[], Any]) -> tuple[np.ndarray, np.ndarray]:
    """What ``run`` gives on the CPU and on the GPU."""
    outputs = []
    for name in ("cpu", "gpu"):
        with _device(name):
            outputs.append(MLX.numpy(run()))
    return outputs[0], outputs[1]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("rows", [17, 1])
def test_window_attention_on_strided_views(rows: int) -> None:
    """The fused kernel reads overlapping views, one query row per group too; differential, batch 2."""
    rng = np.random.default_rng(0)
    shapes = ((2, 6, 5 * rows, 64), (2, 6, 85, 64), (2, 3, 85, 64))
    q, k, v = (MLX.array(rng.standard_normal(shape, np.float32)) for shape in shapes)
    mask = MLX.window_mask(5, 17)[:, :rows]
    cpu, gpu = _both(partial(MLX.module("attention").attend_window, q, k, v, mask))
    assert relative(gpu, cpu) < OPERATION


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_attention_with_a_bias_of_the_logits(dtype: str) -> None:
    rng = np.random.default_rng(1)
    shapes = ((2, 4, 30, 64), (2, 4, 9, 64), (2, 4, 9, 64), (2, 1, 1, 9))
    q, k, v, bias = (MLX.array(rng.standard_normal(shape, np.float32)).astype(MLX.dtype(dtype)) for shape in shapes)
    cpu, gpu = _both(partial(MLX.module("attention").attend, q, k, v, bias))
    assert relative(gpu, cpu) < (OPERATION if dtype == "float32" else 1e-2)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_autoencoder_with_and_without_compiled_groups(
    random_models: dict[str, Path], model: str, compiled: bool
) -> None:
    same, using = MLX.load(random_models[model], "same"), MLX.module("choices").using
    z = MLX.array(np.random.default_rng(2).standard_normal((1, 7, 16), np.float32))
    outputs = []
    for name, fused in (("gpu", compiled), ("cpu", False)):
        with using({"compiled_pointwise": "compiled" if fused else "plain"}), _device(name):
            outputs.append(MLX.numpy(same.decode(z)))
    assert relative(outputs[0], outputs[1]) < 1e-2


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("model", TINY)
def test_networks_on_the_gpu_equal_the_kept_outputs(model: str, tmp_path: Path) -> None:
    kept = load_cases(Path("nowhere"), f"small-{model}", "outputs")
    found = run_small_model(Twin("mlx"), write_checkpoint(tmp_path, TINY[model]))
    errors = {name: relative(values, kept[name]) for name, values in found.items()}
    assert max(errors.values()) < NETWORK, errors


@pytest.mark.parametrize("model", TINY)
def test_a_clip_made_on_the_gpu_equals_that_of_the_cpu(
    random_models: dict[str, Path], model: str, request: pytest.FixtureRequest
) -> None:
    wanted = Twin("mlx").pipeline(random_models[model]).generate(REQUEST)
    request.getfixturevalue("gpu")
    found = Twin("mlx").pipeline(random_models[model]).generate(REQUEST)
    assert relative(found.latents[0], wanted.latents[0]) < CLIP


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_makes_finite_audio_on_the_gpu(random_models: dict[str, Path], dtype: str) -> None:
    from sa3_mlx.pipeline import Pipeline

    audio = Pipeline.load(random_models["tiny-s"], dtype=dtype).generate(REQUEST).audio[0]
    assert np.isfinite(audio).all() and np.abs(audio).max() > 1e-3
