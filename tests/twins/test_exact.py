"""Every optimisation against the plain form that it replaces: the same numbers, in both twins.

Tolerances are for sums in another order; what only leaves work out is bit-equal.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.model.sampling import Guidance
from sa3_mlx.common.text.tokenizer import collapse_padding
from tests.support.twins import Twin, relative

CLOSE = 5e-6  # measured 1e-7 .. 1.1e-6
SLOTS = 12  # text tokens of the tiny models
COUNTS = (3, 0, 7)  # real tokens of a batch
FULL = (3, SLOTS, 7)  # with a prompt that leaves no slot empty
CONTEXT, LATENT, WIDTH = 48, 16, 128
COMPILED = ("compiled_step", "compiled_pointwise")  # the second one is MLX's
compiler = pytest.mark.skipif(
    sys.platform == "linux" and shutil.which("g++") is None, reason="MLX and PyTorch compile with g++ on Linux"
)


@pytest.fixture(params=["tiny-s", "tiny-l"])
def folder(random_models: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    """Plain attention and chunks, differential attention and a sliding window."""
    return random_models[request.param]


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def _mask(counts: tuple[int, ...]) -> np.ndarray:
    return np.arange(SLOTS)[None] < np.array(counts)[:, None]


def _conditioning(
    twin: Twin,
    counts: tuple[int, ...],
    *,
    collapsed: bool,
    local: np.ndarray | None = None,
    dtype: str = "float32",
) -> Any:
    """Random text states with one vector at padded slots, and a duration token."""
    mask, batch = _mask(counts), len(counts)
    text, padding = _normal(batch, SLOTS, CONTEXT), _normal(CONTEXT, seed=1)
    text = np.where(mask[..., None], text, padding)
    duration = _normal(batch, CONTEXT, seed=2)
    slots, repeats = collapse_padding(mask, dtype) if collapsed else (SLOTS, None)
    context = np.concatenate([text[:, :slots], duration[:, None]], axis=1)
    return twin.module("dit").Conditioning(
        context=twin.array(context),
        repeats=None if repeats is None else twin.array(repeats),
        seconds=twin.array(duration),
        valid=None,
        local=twin.array(np.zeros((batch, 1, 1 + LATENT), np.float32) if local is None else local),
    )


def _velocity(twin: Twin, dit: Any, cond: Any, frames: int = 9) -> np.ndarray:
    batch = len(cond.seconds)
    t = np.linspace(0.3, 0.9, batch, dtype=np.float32)
    return twin.numpy(dit(twin.array(_normal(batch, frames, LATENT)), twin.times(t), dit.prepare(cond)))


def test_padding_is_counted() -> None:
    slots, repeats = collapse_padding(_mask(COUNTS))
    assert slots == 8
    np.testing.assert_array_equal(
        repeats, [[1, 1, 1, 9, 0, 0, 0, 0, 1], [12, 0, 0, 0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 5, 1]]
    )
    np.testing.assert_array_equal(collapse_padding(_mask((SLOTS,)))[1], np.ones((1, SLOTS + 1)))
    slots, repeats = collapse_padding(_mask((3, SLOTS - 1)), "float16")
    assert slots == SLOTS and (repeats[0, 3:5] > 0).all() and repeats[0, 3:5].sum() == 9
    np.testing.assert_array_equal(repeats[:, 5:], [[0] * 7 + [1], [1] * 8])
    assert collapse_padding(_mask((0, 0)))[0] == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("counts", [COUNTS, FULL, (5,), (0,), (SLOTS - 1,), (SLOTS,)])
def test_padding_as_one_key_equals_all_of_it(twin: Twin, folder: Path, counts: tuple[int, ...], dtype: str) -> None:
    """n equal keys are one key with ln n, or two; fillers of a batch, empty prompts and prompts without padding too."""
    dit = twin.load(folder, "dit")
    plain = _velocity(twin, dit, _conditioning(twin, counts, collapsed=False))
    collapsed = _velocity(twin, dit, _conditioning(twin, counts, collapsed=True, dtype=dtype))
    assert relative(collapsed, plain) < CLOSE
    uncounted = replace(_conditioning(twin, counts, collapsed=True), repeats=None)
    assert max(counts) >= SLOTS - 1 or relative(_velocity(twin, dit, uncounted), plain) > 1e-4


@pytest.mark.parametrize(("dtype", "one_key", "bound"), [("float16", 1.9e-3, 1e-5), ("bfloat16", 1.4e-2, 1e-3)])
def test_padding_in_16_bits_has_its_weight(
    twin: Twin, random_models: dict[str, Path], dtype: str, one_key: float, bound: float
) -> None:
    """Largest relative error, n = 1 to 256: measured 1.95e-3 and 1.56e-2 with one key, 2.3e-6 and 1.1e-4 with two."""
    dit, slots = twin.load(random_models["tiny-s"], "dit", dtype), 256
    mask = np.arange(slots)[None] < np.arange(slots)[:, None]

    def error(number_type: str) -> float:
        _, repeats = collapse_padding(mask, number_type)
        zeros = twin.array(np.zeros((*repeats.shape, CONTEXT), np.float32))
        zeros = zeros.to(twin.dtype(dtype)) if twin.name == "torch" else zeros.astype(twin.dtype(dtype))
        cond = twin.module("dit").Conditioning(
            context=zeros, repeats=twin.array(repeats), seconds=zeros[:, 0], valid=None, local=None
        )
        weights = np.exp(twin.numpy(dit.prepare(cond).contexts[0].bias).astype(np.float64))[:, 0, 0]
        padding = weights[:, :-1].sum(axis=1) - mask.sum(axis=1)
        return float(np.abs(padding / (~mask).sum(axis=1) - 1).max())

    assert error(dtype) < bound < one_key < error("float32")


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("kept", [False, True])
def test_guidance_in_one_batch_equals_two_calls(twin: Twin, folder: Path, negative: bool, kept: bool) -> None:
    """The null half without cross-attention, or with a negative prompt; with and without kept audio."""
    dit, guidance = twin.load(folder, "dit"), twin.module("guidance")
    local = _normal(2, 9, 1 + LATENT, seed=5) if kept else None
    cond = _conditioning(twin, (3, 5), collapsed=True, local=local)
    null = cond.unconditional()
    if negative:
        null = replace(cond, context=twin.array(_normal(2, 7, CONTEXT, seed=6)))
    settings, t = Guidance(scale=4.0, apg=0.5), np.float32([0.7, 0.4])
    velocity = guidance.GuidedVelocity(
        dit=dit, cond=dit.prepare(cond), null=dit.prepare(replace(null, local=None)), guidance=settings
    )
    x = twin.array(_normal(2, 9, LATENT))
    plain = [dit(x, twin.times(t), dit.prepare(given)) for given in (cond, null)]
    wanted = guidance.guide(x, twin.times(t), *plain, settings, None)
    assert relative(twin.numpy(velocity(x, t)), twin.numpy(wanted)) < CLOSE


def test_times_known_before_equal_times_met(twin: Twin, folder: Path) -> None:
    """Modulations of a schedule made as one batch; a time that is not among them is made when it is met."""
    dit, module = twin.load(folder, "dit"), twin.module("guidance")
    cond = dit.prepare(_conditioning(twin, COUNTS, collapsed=True))
    times = np.random.default_rng(3).random((4, 3), np.float32)
    make = partial(module.GuidedVelocity, dit=dit, cond=cond, null=None, guidance=Guidance())
    x = twin.array(_normal(3, 9, LATENT))
    for t in (*times, np.float32([0.1, 0.2, 0.3])):
        known, met = (twin.numpy(velocity(x, t)) for velocity in (make(times=times), make(times=None)))
        assert relative(known, met) < CLOSE


def test_the_last_block_without_memory_tokens_equals_the_whole_one(twin: Twin, folder: Path) -> None:
    dit, attention = twin.load(folder, "dit"), twin.module("attention")
    cond = dit.prepare(_conditioning(twin, COUNTS, collapsed=True))
    x, modulation = twin.array(_normal(3, 8 + 9, WIDTH)), twin.array(_normal(3, 6 * WIDTH))
    sequence = twin.module("dit").Sequence(memory=8, table=twin.rope(0, 17), attend=attention.attend)
    whole, last = (
        twin.numpy(dit.layers[1](x, modulation, cond.contexts[1], cond.local[1], sequence, last))
        for last in (False, True)
    )
    assert relative(last, whole[:, 8:]) < CLOSE


def test_an_encoder_that_ends_with_latent_tokens_equals_the_whole_one(twin: Twin, folder: Path) -> None:
    """Even clips, and the repeated ends of shifted chunks."""
    same, module = twin.load(folder, "same"), twin.module("same")
    x = twin.array(_normal(2, 6 * 17, WIDTH))
    run = partial(module.run_blocks, same.encoder.layers, x, same.config, None)
    whole, latents = (twin.numpy(run(latents_only=only)) for only in (False, True))
    assert latents.shape == (2, 6, WIDTH)
    assert relative(latents, whole.reshape(2, 6, 17, WIDTH)[:, :, -1]) < CLOSE


@pytest.mark.parametrize("frames", [5, 6])
def test_new_tokens_projected_once_equal_each_projected(twin: Twin, folder: Path, frames: int) -> None:
    """Noise of zero takes the plain way, where every new token is its own."""
    same = twin.load(folder, "same")
    z = _normal(2, frames, LATENT)
    once = twin.numpy(same.decode(twin.array(z)))
    each = twin.numpy(same.decode(twin.array(z), None, twin.array(np.zeros((2, frames, 16, WIDTH), np.float32))))
    assert relative(once, each) < CLOSE


def test_text_of_real_tokens_equals_text_with_padding(twin: Twin, folder: Path) -> None:
    encoder = twin.load(folder, "text_encoder")
    mask = _mask(COUNTS)
    ids = np.random.default_rng(4).integers(1, 100, mask.shape, dtype=np.int32) * mask
    slots, _ = collapse_padding(mask)
    whole, short = (
        twin.numpy(encoder(twin.array(ids[:, :n].copy()), twin.array(mask[:, :n].copy()))) for n in (SLOTS, slots)
    )
    assert relative(short[mask[:, :slots]], whole[mask]) < CLOSE


@compiler
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_compiled_pointwise_groups_equal_plain_ones(dtype: str) -> None:
    mx = pytest.importorskip("mlx.core")
    layers = pytest.importorskip("sa3_mlx.layers")
    using = pytest.importorskip("sa3_mlx.choices").using
    x, y, z = (mx.array(_normal(3, 7, seed=seed)).astype(getattr(mx, dtype)) for seed in (1, 2, 3))
    groups = {
        layers.silu: (x,),
        layers.gate_silu: (x, y),
        layers.gate_sine: (x, y),
        layers.modulate: (x, y, z),
        layers.add_gated: (x, y, z),
        layers.scale_tanh: (x, y[0, :1], y[0], z[0]),
    }
    found = {}
    for way in ("plain", "compiled"):
        with using({"compiled_pointwise": way}):
            found[way] = [np.array(group(*arrays)) for group, arrays in groups.items()]
    for compiled, plain in zip(found["compiled"], found["plain"], strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=1e-6 if dtype == "float32" else 1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_groups_in_16_bits_round_once(dtype: str) -> None:
    """What is between is fp32: the same bits as fp32, rounded."""
    mx, layers = pytest.importorskip("mlx.core"), pytest.importorskip("sa3_mlx.layers")
    x, y, z = (mx.array(4 * _normal(40, 64, seed=seed)).astype(getattr(mx, dtype)) for seed in (1, 2, 3))
    alpha, row = mx.array([0.7]).astype(x.dtype), z[0]
    groups: list[tuple[Any, tuple[Any, ...]]] = [
        *((layers.silu, (x,)), (layers.gate_silu, (x, y)), (layers.gate_sine, (x, y))),
        *((layers.modulate, (x, y, z)), (layers.add_gated, (x, y, z)), (layers.scale_tanh, (x, alpha, row, y[0]))),
    ]
    for group, arrays in groups:
        found, wide = group(*arrays), group(*(array.astype(mx.float32) for array in arrays))
        assert found.dtype == x.dtype and wide.dtype == mx.float32
        rounded = wide.astype(x.dtype).astype(mx.float32)
        np.testing.assert_array_equal(np.array(found.astype(mx.float32)), np.array(rounded))


@pytest.mark.parametrize("way", ["half", "double"])
def test_chunks_of_other_sizes_equal_the_usual_ones(twin: Twin, folder: Path, way: str) -> None:
    """By the halo; positions of SAME-L restart in every chunk."""
    pipeline = twin.pipeline(folder)
    latents = _normal(300, LATENT)
    usual = pipeline.decode(latents)
    with pipeline.choices.using({"chunks": way}):
        found = pipeline.decode(latents)
    assert 0 < relative(found, usual) < CLOSE  # measured: tiny-s 2.9e-7, tiny-l 5.5e-7


def test_attention_of_pytorch_equals_products_and_softmax() -> None:
    torch = pytest.importorskip("torch")
    attention, choices = Twin("torch").module("attention"), Twin("torch").module("choices")
    q, k, v = (torch.from_numpy(_normal(2, 4, 40, 64, seed=seed)) for seed in (1, 2, 3))
    found = {}
    for way in ("math", "fused"):
        with choices.using({"attention": way}):
            found[way] = attention.attend(q, k, v).numpy()
    assert relative(found["fused"], found["math"]) < 2e-6  # measured 2.7e-7
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()


def test_formulas_by_the_exponential_equal_their_names() -> None:
    """SiLU and tanh in fp32, where the exponential is 0 or infinite too."""
    mx = pytest.importorskip("mlx.core")
    layers = pytest.importorskip("sa3_mlx.layers")
    x = np.float32([-200, -30, -3, -0.5, -1e-3, 0, 1e-3, 0.5, 3, 30, 200])
    one, zero = mx.array([1.0]), mx.array([0.0])
    exact = x.astype(np.float64)
    np.testing.assert_allclose(np.array(layers.scale_tanh(mx.array(x), one, one, zero)), np.tanh(exact), atol=2e-7)
    wanted = exact / (1 + np.exp(-exact))
    np.testing.assert_allclose(np.array(layers.silu(mx.array(x))), wanted, rtol=3e-6, atol=1e-30)


def test_quantized_rows_are_rows_of_the_quantized_product() -> None:
    mx = pytest.importorskip("mlx.core")
    nn = pytest.importorskip("mlx.nn")
    layers = pytest.importorskip("sa3_mlx.layers")
    layer = nn.Linear(64, 96, bias=False)
    x = mx.array(_normal(2, 5, 64))
    for kind in (layer, layers.PackedLinear.from_linear(layer, group_size=32, bits=4)):
        found = np.array(layers.linear_rows(kind, x, 32, 96))
        np.testing.assert_allclose(found, np.array(kind(x))[..., 32:96], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("way", ["small_unpacked", "unpacked"])
def test_products_with_unpacked_weights_equal_packed_ones(way: str, bias: bool, bits: int) -> None:
    """Small products, and one that is too large to be called so; all against the layer of mlx.nn."""
    mx, nn, layers = (pytest.importorskip(name) for name in ("mlx.core", "mlx.nn", "sa3_mlx.layers"))
    using = pytest.importorskip("sa3_mlx.choices").using
    plain = nn.Linear(64, 320, bias=bias)
    layer = layers.PackedLinear.from_linear(plain, group_size=32, bits=bits)
    named = nn.QuantizedLinear.from_linear(plain, group_size=32, bits=bits)
    for tokens in (3, 40, 900):  # 10 tiles of too few rows, 20 tiles, 290 tiles
        x = mx.array(_normal(1, tokens, 64))
        with using({"packed_products": "packed"}):
            packed = np.array(layer(x))
        np.testing.assert_array_equal(packed, np.array(named(x)))
        with using({"packed_products": way}):
            unpacked = np.array(layer(x))
        assert relative(unpacked, packed) < CLOSE
        assert np.array_equal(unpacked, packed) == (way == "small_unpacked" and tokens != 40)


@compiler
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_compiled_steps_equal_plain_ones(
    twin: Twin, folder: Path, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two times through one graph, with guidance too; what the graph holds is not computed again.

    PyTorch's graph is captured and run as it is: generating code for it takes 10 to 30 s, see the next test.
    """
    if twin.name == "torch":
        import torch

        generating, layers = torch.compile, twin.module("layers")

        def captured(function: Any, *, dynamic: bool) -> Any:
            return generating(function, backend="aot_eager", dynamic=dynamic, fullgraph=True)

        monkeypatch.setattr(torch, "compile", captured)
        monkeypatch.setattr(layers, "_generated", layers._generated.__wrapped__)
    _check_compiled(twin, folder, scale)


@pytest.mark.slow
@compiler
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_generated_code_of_steps_equals_plain_steps(folder: Path, scale: float) -> None:
    pytest.importorskip("torch")
    _check_compiled(Twin("torch"), folder, scale)


def _check_compiled(twin: Twin, folder: Path, scale: float) -> None:
    dit, choices, guidance = twin.load(folder, "dit"), twin.module("choices"), twin.module("guidance")
    cond = _conditioning(twin, COUNTS, collapsed=True)
    null = cond.unconditional()
    outputs = []
    for way in ("plain", "compiled"):
        with choices.using({name: way for name in choices.CHOICES.places if name in COMPILED}):
            velocity = guidance.GuidedVelocity(
                dit=dit, cond=dit.prepare(cond), null=dit.prepare(null), guidance=Guidance(scale=scale)
            )
            x = twin.array(_normal(len(COUNTS), 9, LATENT))
            outputs.append([twin.numpy(velocity(x, np.full(len(COUNTS), t, np.float32))) for t in (0.9, 0.4)])
    for found, wanted in zip(*outputs, strict=True):
        assert relative(found, wanted) < CLOSE


@pytest.mark.parametrize("mask", [None, "bias", "bool"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_two_maps_over_one_v_equal_doubled_heads(mask: str | None, dtype: str) -> None:
    """Differential attention in two calls that share v, subtracted with the heads merged."""
    mx, attention = pytest.importorskip("mlx.core"), pytest.importorskip("sa3_mlx.attention")
    q, k = (mx.array(_normal(2, 6, 9, 64, seed=seed)).astype(getattr(mx, dtype)) for seed in (1, 2))
    v = mx.array(_normal(2, 3, 9, 64)).astype(q.dtype)
    given = {
        None: None,
        "bias": mx.array(_normal(2, 1, 1, 9)).astype(q.dtype),
        "bool": mx.array(np.arange(9) < 7)[None, None, None],
    }[mask]
    doubled = mx.concatenate([v, v], axis=1)
    maps = mx.fast.scaled_dot_product_attention(q, k, doubled, scale=0.125, mask=given).split(2, axis=1)
    wanted = (maps[0] - maps[1]).transpose(0, 2, 1, 3).reshape(2, 9, 192)
    for way in ("together", "apart"):
        with pytest.importorskip("sa3_mlx.choices").using({"two_maps": way}):
            np.testing.assert_array_equal(np.array(attention.attend(q, k, v, given)), np.array(wanted))


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_local_terms_as_one_sum_equal_those_of_the_frames(frames: int, repeats: int, batch: int) -> None:
    """A column of 0 and 1, or zeros, for the memory tokens; both halves of guidance share the terms."""
    mx, dit = pytest.importorskip("mlx.core"), pytest.importorskip("sa3_mlx.dit")
    memory, x, local = 4, _normal(repeats * batch, 4 + 9, WIDTH), _normal(batch, frames, WIDTH)
    wanted = x.copy()
    wanted[:, memory:] += np.concatenate([local] * repeats)
    padded = local if frames == 1 else np.pad(local, [(0, 0), (memory, 0), (0, 0)])
    np.testing.assert_array_equal(np.array(dit._add_local(mx.array(x), mx.array(padded), memory)), wanted)
    audio_only = dit._add_local(mx.array(x[:, memory:].copy()), mx.array(padded), 0)
    np.testing.assert_array_equal(np.array(audio_only), wanted[:, memory:])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bits", [None, 8])
def test_an_adapter_inside_the_product_equals_one_added_to_it(bits: int | None, dtype: str) -> None:
    """The low-rank product is added where it is made, and the bias where W x is."""
    mx, nn, lora = (pytest.importorskip(name) for name in ("mlx.core", "mlx.nn", "sa3_mlx.lora"))
    layer = nn.Linear(64, 96)
    layer.bias = mx.array(_normal(96))
    layer.set_dtype(getattr(mx, dtype))
    base = layer if bits is None else nn.QuantizedLinear.from_linear(layer, group_size=32, bits=bits)
    x, a, b = (mx.array(_normal(*shape)).astype(getattr(mx, dtype)) for shape in ((2, 5, 64), (8, 64), (96, 8)))
    found = np.array(lora.AdaptedLinear(base, [lora.Update(a, b, {})])(x).astype(mx.float32))
    wanted = np.array((base(x) + (x @ a.T) @ b.T).astype(mx.float32))
    assert relative(found, wanted) < (CLOSE if dtype == "float32" else 2e-3)  # measured 4e-8, 4e-4
