"""The MLX twin on an Apple GPU: the same operations, networks and clips as on a CPU.

Run with ``pytest -m metal`` on a Mac. The tolerances are expectations: no Apple GPU was at hand to measure them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.generation.events import Sampled
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.presets import PRESETS
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


# Shapes of the released models: (M, K, N) of products with M tokens, of the DiTs in fp16 and of SAME in fp32. Tiny ones
# take other kernels: only these show whether the matrix units of the installed wheel are right.
DIT_PRODUCTS = ((118, 1024, 3072), (387, 1024, 8192), (387, 4096, 1024), (1356, 1536, 12288), (1356, 6144, 1536))
SAME_PRODUCTS = ((2210, 768, 3840), (3264, 1536, 7680), (3264, 4608, 1536))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, "float16") for shape in DIT_PRODUCTS] + [(shape, "float32") for shape in SAME_PRODUCTS],
)
def test_products_of_the_size_of_the_models(shape: tuple[int, int, int], dtype: str) -> None:
    """Against float64 on the host; a weight is read transposed, as by every layer."""
    rows, size, columns = shape
    rng, kind = np.random.default_rng(3), MLX.dtype(dtype)
    x, weight = (MLX.array(rng.standard_normal((n, size), np.float32)).astype(kind) for n in (rows, columns))
    wanted = MLX.numpy(x).astype(np.float64) @ MLX.numpy(weight).astype(np.float64).T
    assert relative(MLX.numpy(x @ weight.T), wanted) < (OPERATION if dtype == "float32" else 5e-3)


@pytest.mark.usefixtures("gpu")
def test_a_compiled_step_in_16_bits_at_387_tokens() -> None:
    """A block of the width of small, 30 s: 323 frames and 64 memory tokens; against the plain step in fp32 there."""
    mx, dit_module = MLX.module("runtime").mx, MLX.module("dit")
    config = PRESETS["small-music"].require_diffusion().dit
    dit = dit_module.DiT(replace(config, depth=2), 256, 768)
    rng = np.random.default_rng(4)

    def velocity(dtype: Any) -> Any:
        dit.set_dtype(dtype)
        text, noise, repeats = (MLX.array(values).astype(dtype) for values in (context, start, counts))
        cond = dit_module.Conditioning(
            context=text, repeats=repeats.astype(mx.float32), seconds=text[:, 0], valid=None, local=None
        )
        prepared, modulation = dit.prepare(cond), dit.modulation(np.float32([0.6]), text[:, 0] @ project.astype(dtype))
        mx.eval(dit.parameters(), prepared.contexts[0].keys)
        step = mx.compile(lambda x, m: dit.velocity(x, m, prepared)) if dtype == mx.float16 else None
        return (step or partial(dit.velocity, prepared=prepared))(noise, modulation)

    context, start = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 27, 768), (1, 323, 256)))
    counts = np.float32([[*[1] * 24, 231.5, 0.5, 1]])
    project = MLX.array(rng.standard_normal((768, config.width), np.float32) / 768**0.5)
    plain, half = (MLX.numpy(velocity(dtype)) for dtype in (mx.float32, mx.float16))
    assert plain.shape == (1, 323, 256) and relative(half, plain) < 2e-2


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("rows", [387, 8])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bias_of_minus_infinity_takes_keys_away(rows: int, dtype: str) -> None:
    """Fillers of a batch; more than eight rows and at most eight take different kernels."""
    rng, kind, attend = np.random.default_rng(5), MLX.dtype(dtype), MLX.module("attention").attend
    q, k, v = (MLX.array(rng.standard_normal((2, 4, n, 64), np.float32)).astype(kind) for n in (rows, 27, 27))
    bias = np.zeros((2, 1, 1, 27), np.float32)
    bias[0, ..., 20:], bias[1, ..., 24], bias[1, ..., 26] = -np.inf, np.log(231), -np.inf
    found = MLX.numpy(attend(q, k, v, MLX.array(bias).astype(kind)))
    few = MLX.numpy(attend(q[:1], k[:1, :, :20], v[:1, :, :20], MLX.array(bias[:1, ..., :20]).astype(kind)))
    assert np.isfinite(found).all() and relative(found[:1], few) < (OPERATION if dtype == "float32" else 1e-2)
    with _device("cpu"):
        wanted = MLX.numpy(attend(*(x.astype(MLX.dtype("float32")) for x in (q, k, v)), MLX.array(bias)))
    assert relative(found, wanted) < (OPERATION if dtype == "float32" else 1e-2)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dit_is_freed_on_the_gpu_without_the_collector(
    random_models: dict[str, Path], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sa3_mlx.pipeline import Pipeline
    from sa3_mlx.runtime import mx

    pipeline, parts = Pipeline.load(random_models["tiny-s"], dtype=dtype), dict[str, weakref.ref[Any]]()
    read = pipeline._read

    def kept(part: str, *, streamed: bool) -> Any:
        module = read(part, streamed=streamed)
        parts[part] = weakref.ref(module)
        return module

    monkeypatch.setattr(pipeline, "_read", kept)
    gc.collect()
    gc.disable()
    try:
        before = mx.get_active_memory()
        for event in pipeline.stream(REQUEST, residency="phase"):
            if isinstance(event, Sampled):
                mx.synchronize()
                assert parts["dit"]() is None and parts["text_encoder"]() is None
                assert mx.get_active_memory() - before < 10**6
    finally:
        gc.enable()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_second_thread_makes_the_same_clip(random_models: dict[str, Path], model: str, dtype: str) -> None:
    """Made and used here, then there, then there first: steps and pointwise groups compiled in either thread."""
    from sa3_mlx.pipeline import Pipeline

    with ThreadPoolExecutor(max_workers=1) as pool:

        def there(run: Callable[[], Any]) -> Any:
            def on_the_gpu() -> Any:
                with _device("gpu"):
                    return run()

            return pool.submit(on_the_gpu).result()

        pipeline = Pipeline.load(random_models[model], dtype=dtype)
        wanted = pipeline.generate(REQUEST).audio[0]
        np.testing.assert_array_equal(there(lambda: pipeline.generate(REQUEST)).audio[0], wanted)
        other = there(lambda: Pipeline.load(random_models[model], dtype=dtype))
        np.testing.assert_array_equal(there(lambda: other.generate(REQUEST)).audio[0], wanted)
        np.testing.assert_array_equal(other.generate(REQUEST).audio[0], wanted)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("model", TINY)
def test_launching_ahead_changes_no_bit_on_the_gpu(random_models: dict[str, Path], model: str) -> None:
    from sa3_mlx.choices import using
    from sa3_mlx.pipeline import Pipeline

    request = replace(REQUEST, items=(Item(prompt="soft rain", seconds=3.0, seed=3),), chunk_frames=16)
    sounds = []
    for way in ("single", "ahead"):
        with using({"launches": way}):
            sounds.append(Pipeline.load(random_models[model]).generate(request).audio[0])
    np.testing.assert_array_equal(sounds[1], sounds[0])


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("norm", "maps", "padding"), [("rms", 1, 0), ("rms", 2, 0), ("tanh", 2, 0), ("tanh", 2, 17)])
def test_own_kernels_of_heads_agree_with_their_plain_form(norm: str, maps: int, padding: int, dtype: str) -> None:
    from sa3_mlx.kernels.heads import HEADS, HeadsVariant

    kind = MLX.dtype(dtype)
    assert HEADS._problem(HeadsVariant(heads=12, maps=maps, norm=norm, eps=1e-6, padding=padding, dtype=kind)) is None


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("maps", "reach", "tiles"), [(2, 17, 6), (2, 34, 5), (1, 17, 6), (2, 10, 2)])
def test_the_own_kernel_of_near_attention_agrees_with_its_plain_form(
    maps: int, reach: int, tiles: int, dtype: str
) -> None:
    from sa3_mlx.kernels.window import NEAR, NearVariant

    assert NEAR._problem(NearVariant(heads=12, maps=maps, reach=reach, tiles=tiles, dtype=MLX.dtype(dtype))) is None


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize(
    "ways",
    [
        {"head_norm_rope": "kernel"},
        {"head_norm_rope": "kernel", "window_attention": "kernel"},
        {"window_layout": "heads"},
        {"two_maps": "together"},
        {"compiled_step": "plain"},
    ],
)
def test_other_ways_make_the_same_clip(random_models: dict[str, Path], model: str, ways: dict[str, str]) -> None:
    from sa3_mlx.choices import using

    usual = MLX.pipeline(random_models[model]).generate(REQUEST)
    with using(ways):
        other = MLX.pipeline(random_models[model]).generate(REQUEST)
    assert relative(other.latents[0], usual.latents[0]) < CLIP
