"""Own Metal kernels, translated to C++: their plain form's numbers, inside of the networks too; what is wrong is off.

No Metal device is needed, and none has run them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.metal import Metal, compiler
from tests.support.twins import Twin, relative

mx = pytest.importorskip("mlx.core")
kernels = pytest.importorskip("sa3_mlx.kernels")
from sa3_mlx.choices import using
from sa3_mlx.kernels import checked, heads, window

BOUND = {"float32": 2e-6, "float16": 2e-3}  # measured 7e-8 .. 3.6e-7 and 2.5e-4 .. 6.7e-4
KERNELS = {"head_norm_rope": "kernel", "window_attention": "kernel"}


@pytest.fixture
def metal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Metal:
    """Metal on a CPU; every kernel is on and compiled again."""
    stand_in = Metal(tmp_path)
    monkeypatch.setattr(mx.fast, "metal_kernel", stand_in.metal_kernel)
    heads.compiled.cache_clear()
    window.compiled.cache_clear()
    for kernel in (heads.HEADS, window.NEAR):
        monkeypatch.setattr(kernel, "off", False)
        monkeypatch.setattr(kernel, "_agrees", set())
    return stand_in


@pytest.fixture(autouse=True)
def _forgotten() -> Any:
    yield
    heads.compiled.cache_clear()
    window.compiled.cache_clear()


def _head_variant(norm: str, maps: int, padding: int, dtype: str) -> heads.HeadsVariant:
    return heads.HeadsVariant(heads=3, maps=maps, norm=norm, eps=1e-6, padding=padding, dtype=getattr(mx, dtype))


def _errors(kernel: checked.Checked[Any], variant: Any) -> list[float]:
    arrays = kernel.sample(variant)
    pairs = zip(kernel.kernel(variant, arrays), kernel.plain(variant, arrays), strict=True)
    return [checked._relative(*pair) for pair in pairs]


@compiler
@pytest.mark.parametrize(
    ("norm", "maps", "padding", "dtype"),
    [("rms", 1, 0, "float16"), ("rms", 2, 0, "float32"), ("tanh", 2, 0, "float16"), ("tanh", 2, 17, "float32")],
)
def test_queries_and_keys_equal_their_plain_form(metal: Metal, norm: str, maps: int, padding: int, dtype: str) -> None:
    """Both models' norms and maps; the padding of keys and values is written as zeros."""
    assert max(_errors(heads.HEADS, _head_variant(norm, maps, padding, dtype))) < BOUND[dtype]
    assert metal.runs == 1


@compiler
@pytest.mark.parametrize(
    ("maps", "reach", "tiles", "dtype"),
    [(2, 17, 6, "float32"), (2, 34, 5, "float32"), (1, 17, 6, "float16"), (2, 10, 2, "float16")],
)
def test_near_attention_equals_its_plain_form(metal: Metal, maps: int, reach: int, tiles: int, dtype: str) -> None:
    """Windows of SAME-L, chunks of SAME-S and of the demo; the ends of sequences, and odd numbers of tokens."""
    variant = window.NearVariant(heads=2, maps=maps, reach=reach, tiles=tiles, dtype=getattr(mx, dtype))
    assert max(_errors(window.NEAR, variant)) < BOUND[dtype]
    assert metal.runs == 1


@compiler
@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(
    ("module", "written", "wrong"),
    [
        (heads, "ushort(16)", "ushort(8)"),
        (heads, "lane < 16 ? -partner", "lane >= 16 ? -partner"),
        (heads, "lane % 16", "lane / 2"),
        (heads, "kind + 3 * (index / HEADS)", "kind + 2 * (index / HEADS)"),
        (window, "<= REACH", "< REACH"),
        (
            window,
            "total += metal::simd_shuffle_xor(total, ushort(8))",
            "total += metal::simd_shuffle_xor(total, ushort(2))",
        ),
        (window, "8 * int(thread_position_in_grid.y) - REACH", "8 * int(thread_position_in_grid.y) - REACH + 1"),
        (window, "const bool seen = key < length &&", "const bool seen ="),
        (window, "weights[tile] - shares", "shares - weights[tile]"),
    ],
)
def test_a_wrong_kernel_is_noticed(module: Any, written: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes that are easily made, one at a time: the comparison at first use finds each of them."""
    assert module.SOURCE.count(written) == 1
    monkeypatch.setattr(module, "SOURCE", module.SOURCE.replace(written, wrong))
    if module is heads:
        problem = heads.HEADS._problem(_head_variant("tanh", 2, 17, "float32"))
    else:
        problem = window.NEAR._problem(window.NearVariant(heads=2, maps=2, reach=17, tiles=6, dtype=mx.float32))
    assert problem is not None and "disagrees" in problem


@compiler
@pytest.mark.parametrize("model", ["tiny-s", "tiny-l"])
def test_networks_with_own_kernels_equal_plain_ones(metal: Metal, model: str, random_models: dict[str, Path]) -> None:
    """A velocity, an encoding and a decoding: plain and differential attention, chunks and windows."""
    twin = Twin("mlx")
    dit, same = twin.load(random_models[model], "dit"), twin.load(random_models[model], "same")
    rng = np.random.default_rng(0)
    cond = twin.module("dit").Conditioning(
        context=twin.array(rng.standard_normal((1, 7, 48), np.float32)),
        repeats=None,
        seconds=twin.array(rng.standard_normal((1, 48), np.float32)),
        valid=None,
        local=twin.array(np.zeros((1, 1, 17), np.float32)),
    )
    x, audio = rng.standard_normal((1, 40, 16), np.float32), rng.standard_normal((1, 6 * 512, 2), np.float32)

    def outputs() -> list[np.ndarray]:
        velocity = dit(twin.array(x), np.float32([0.6]), dit.prepare(cond))
        latents = same.encode(twin.array(audio))
        return [twin.numpy(array) for array in (velocity, latents, same.decode(twin.array(x[:, :6])))]

    plain = outputs()
    assert metal.runs == 0
    for ways in (KERNELS, {"head_norm_rope": "kernel"}, {"head_norm_rope": "kernel", "window_layout": "groups"}):
        before = metal.runs
        with using(ways):
            found = outputs()
        assert metal.runs > before and not heads.HEADS.off and not window.NEAR.off
        assert max(relative(*pair) for pair in zip(found, plain, strict=True)) < 1e-5  # measured 6e-7


def _fake(kernel: Callable[..., Any]) -> checked.Checked[int]:
    def plain(variant: int, arrays: list[Any]) -> list[Any]:
        return [arrays[0] * variant]

    return checked.Checked("of a test", kernel, plain, lambda _: [checked.normal(0, mx.float32, 4, 5)])


def test_a_kernel_that_is_right_stays_on(capsys: pytest.CaptureFixture[str]) -> None:
    """It is compared once for each variant."""
    calls = []

    def right(variant: int, arrays: list[Any]) -> list[Any]:
        calls.append(variant)
        return [arrays[0] * variant * (1 + 1e-6)]

    kernel, x = _fake(right), mx.ones(3)
    for _ in range(2):
        found = kernel(3, [x])
        assert found is not None and np.allclose(np.array(found[0]), 3)
    assert kernel(4, [x]) is not None
    assert calls == [3, 3, 3, 4, 4] and capsys.readouterr().err == ""


def _raises(*_: Any) -> list[Any]:
    raise RuntimeError("[metal::Device] Unable to build metal library from source\nerror: here")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (lambda variant, arrays: [arrays[0] * variant * 1.001], "disagrees with its plain form (1e+02 times"),
        (lambda _, arrays: [arrays[0] * float("nan")], "disagrees"),
        (lambda variant, arrays: [arrays[0][:1] * variant], "disagrees"),
        (_raises, "does not run here ([metal::Device] Unable to build metal library"),
    ],
)
def test_a_kernel_that_is_wrong_or_raises_is_off_with_one_line(
    kernel: Callable[..., Any], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _fake(kernel)
    assert [found(variant, [mx.ones(3)]) for variant in (3, 3, 4)] == [None, None, None]
    note = capsys.readouterr().err
    assert said in note and note.count("\n") == 1 and note.startswith("note: the Metal kernel of a test is off")


def test_without_metal_the_plain_form_computes(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A choice for the kernels where there is no Metal costs two lines and nothing else."""
    if mx.metal.is_available():
        pytest.skip("this machine has Metal")
    for kernel in (heads.HEADS, window.NEAR):
        monkeypatch.setattr(kernel, "off", False)
        monkeypatch.setattr(kernel, "_agrees", set())
    twin = Twin("mlx")
    same = twin.load(random_models["tiny-l"], "same")
    z = twin.array(np.random.default_rng(1).standard_normal((1, 5, 16), np.float32))
    plain = twin.numpy(same.decode(z))
    with using(KERNELS):
        found = twin.numpy(same.decode(z))
    np.testing.assert_array_equal(found, plain)
    assert capsys.readouterr().err.count("No Metal back-end") == 2


@compiler
@pytest.mark.usefixtures("metal")
def test_a_compiled_step_can_begin_with_the_comparison() -> None:
    """What is compared has values, also while a graph is traced whose arrays have none."""
    variant = _head_variant("rms", 1, 0, "float32")

    def step(x: Any) -> Any:
        assert heads.HEADS._problem(variant) is None
        return x + 1

    assert np.array(mx.compile(step)(mx.ones(3))).tolist() == [2, 2, 2]
