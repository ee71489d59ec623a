"""The MLX twin on an Apple GPU: the same networks and clips as on a CPU. Run with ``pytest -m metal`` on a Mac.

The tolerances are expectations: no Apple GPU was at hand to measure them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_small_models import run_small_model
from tiny import TINY
from tiny_checkpoint import write_checkpoint
from twins import Twin, load_cases, relative

from sa3_mlx.spec.request import Item, Request

pytestmark = pytest.mark.metal
NETWORK = 1e-3  # relative L2 in fp32
CLIP = 1e-2
REQUEST = Request(items=(Item(prompt="soft rain", seconds=0.8, seed=3),), steps=4, sampler="pingpong")


@pytest.fixture
def gpu() -> Iterator[None]:
    """The GPU as the default device of one test; skips where there is none."""
    mx = pytest.importorskip("mlx.core")
    if not mx.metal.is_available():
        pytest.skip("no Apple GPU")
    before = mx.default_device()
    mx.set_default_device(mx.gpu)
    yield
    mx.set_default_device(before)


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
