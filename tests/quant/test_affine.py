"""Test that the quantizer equals MLX bit for bit: packed words, scales, biases and decoded values."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sa3_mlx import runtime  # noqa: F401 (before mlx)
from sa3_mlx.common.quant.affine import (
    BITS,
    GROUPS,
    Storage,
    dequantize,
    dequantize_stepwise,
    pack,
    quantize,
    round_to,
    unpack,
)

STORAGES: tuple[Storage, ...] = ("F32", "F16", "BF16")
K = np.arange(32, dtype=np.float32)
RAMP = (K - 10) / 16
SPIKE = np.where(K == 5, np.float32(7), np.float32(0))
SIGNS = np.where(K % 2 == 0, np.float32(1), np.float32(-1))
# values, bits, storage, scale, bias, words (lowest first), first decoded values; made with MLX on a CPU
GOLDEN = [
    (RAMP, 2, "F32", -0.65625, 1.3125, "aaaaabff 00055555", [-0.65625] * 4),
    (RAMP, 3, "F32", -0.26249998807907104, 1.3125, "6ddb6fff 36dc925b 00124a49", [-0.52499986] * 4),
    (
        RAMP,
        4,
        "F32",
        -0.13124999403953552,
        1.3125,
        "bccddeef 8899aaab 44556677 00112233",
        [-0.65624988, -0.52499986, -0.52499986, -0.39374995],
    ),
    (RAMP, 5, "F32", -0.0625, 1.3125, "75be77df 3a56d7c6 35cf8465 c74254b6 00443214", [-0.625, -0.5625, -0.5, -0.4375]),
    (
        RAMP,
        6,
        "F32",
        -0.030523255467414856,
        1.3125,
        "77e7bf7f bb6fc73d 863967a6 1765b75f a30e4125 00210620",
        [-0.61046505, -0.54941857, -0.48837209, -0.42732561],
    ),
    (
        RAMP,
        8,
        "F32",
        -0.007586705032736063,
        1.3125,
        "e7eff7ff c6ced6de a5adb5bd 848c949d 636b737c 424a525b 2129313a 00081019",
        [-0.62210977, -0.56141615, -0.50072253, -0.44002891],
    ),
    (
        RAMP,
        4,
        "F16",
        -0.1312255859375,
        1.3125,
        "bccddeef 8899aaab 44556677 00112233",
        [-0.65625, -0.5244140625, -0.5244140625, -0.3935546875],
    ),
    (
        RAMP,
        4,
        "BF16",
        -0.130859375,
        1.3125,
        "bccddeef 8899aaab 44556677 00112233",
        [-0.6484375, -0.515625, -0.515625, -0.390625],
    ),
    (
        -(K + 1) / 32,
        4,
        "F32",
        0.06666667014360428,
        -1.0,
        "bccddeef 78899aab 44556677 00112233",
        [0, -0.0666666, -0.0666666, -0.13333327],
    ),
    (
        (K + 1) / 32,
        4,
        "F32",
        -0.06666667014360428,
        1.0,
        "bccddeef 78899aab 44556677 00112233",
        [0, 0.0666666, 0.0666666, 0.13333327],
    ),
    (0 * K, 4, "F32", -1.0000000116860974e-07, 0, "00000000 " * 4, [0] * 4),
    (0 * K + 0.5, 4, "F32", -1.0000000116860974e-07, 0.5, "00000000 " * 4, [0.5] * 4),
    (SPIKE, 4, "F32", -0.46666666865348816, 7.0, "ff0fffff" + " ffffffff" * 3, [0] * 4),
    (-SPIKE, 4, "F32", 0.46666666865348816, -7.0, "ff0fffff" + " ffffffff" * 3, [0] * 4),
    (SIGNS, 4, "F32", -0.1428571492433548, 1.0, "e0e0e0e0 " * 4, [1, -1, 1, -1]),
    (0 * K + np.float32(1e-9), 4, "F32", -1.0000000116860974e-07, 0, "00000000 " * 4, [0] * 4),
]


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_vectors(case) -> None:
    values, bits, storage, scale, bias, words, decoded = case
    packed = quantize(round_to(values[None].astype(np.float32), storage), bits=bits, group=32, storage=storage)
    assert packed.scales.item() == scale
    assert packed.biases.item() == bias
    assert [f"{word:08x}" for word in packed.words[0].tolist()] == words.split()
    np.testing.assert_allclose(dequantize_stepwise(packed)[0, :4], decoded, rtol=1e-6, atol=1e-9)


def matrices(group: int) -> dict[str, np.ndarray]:
    """Return rows of three groups: drawn from several distributions, and groups made by hand."""
    rng = np.random.default_rng(group)
    shape, normal = (6, 3 * group), rng.standard_normal((6, 3 * group))
    near = rng.standard_normal(shape) * 3e-7
    ties = rng.integers(-8, 8, shape) / 2
    edges = np.zeros((6, 3 * group))
    edges[0, ::2], edges[0, 1::2] = 1, -1  # a tie counts as the high side
    edges[1], edges[2], edges[3] = 0.5, -0.5, 1e-9
    edges[4, 5], edges[5, 5] = 7, -7
    return {
        "normal": normal,
        "laplace": rng.laplace(size=shape),
        "heavy": rng.standard_t(2, shape),
        "negative": -np.abs(normal) - 0.1,
        "positive": np.abs(normal) + 0.1,
        "offset": normal + 40,
        "tiny": 1e-6 * normal,
        "near the smallest scale": near,
        "ties": ties,
        "edges": edges,
        "large": 3e3 * normal,
    }


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_words_scales_biases_and_values_equal_mlx(bits: int, group: int, storage: Storage) -> None:
    mx = pytest.importorskip("mlx.core")
    dtype = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[storage]
    for name, matrix in matrices(group).items():
        values = round_to(matrix.astype(np.float32), storage)
        packed = quantize(values, bits=bits, group=group, storage=storage)
        with mx.stream(mx.cpu):
            words, scales, biases = mx.quantize(mx.array(values).astype(dtype), group_size=group, bits=bits)
            decoded = mx.dequantize(words, scales, biases, group_size=group, bits=bits).astype(mx.float32)
            np.testing.assert_array_equal(packed.words, np.array(words), err_msg=name)
            for ours, theirs in ((packed.scales, scales), (packed.biases, biases)):
                theirs = np.array(theirs.astype(mx.float32))
                np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32), err_msg=name)
            np.testing.assert_array_equal(dequantize_stepwise(packed), np.array(decoded), err_msg=name)


@pytest.mark.parametrize("bits", BITS)
def test_packing_is_a_stream_of_bits_and_has_an_inverse(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 96)).astype(np.uint8)
    words = pack(codes, bits)
    assert words.shape == (3, 96 * bits // 32)
    np.testing.assert_array_equal(unpack(words, bits), codes)
    stream = sum(int(code) << (bits * k) for k, code in enumerate(codes[0]))
    assert [int(word) for word in words[0]] == [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(words.shape[1])]


@pytest.mark.parametrize(("bits", "storage"), list(itertools.product(BITS, ("F16", "BF16"))))
def test_values_in_fp32_need_one_rounding(bits: int, storage: Storage) -> None:
    """Compare with float64 arithmetic, rounded once: with half-precision scales the product is exact."""
    weight = round_to(np.random.default_rng(bits).standard_normal((8, 128)).astype(np.float32), storage)
    packed = quantize(weight, bits=bits, group=64, storage=storage)
    scales, biases = (np.repeat(a, 64, -1).astype(np.float64) for a in (packed.scales, packed.biases))
    exact = scales * unpack(packed.words, bits) + biases
    np.testing.assert_array_equal(dequantize(packed, "F32"), exact.astype(np.float32))
    np.testing.assert_array_equal(dequantize(packed, storage), round_to(exact.astype(np.float32), storage))


def test_zero_is_decoded_as_zero() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)
    weight[:, ::7] = 0
    packed = quantize(weight, bits=4, group=64, storage="F32")
    assert np.abs(dequantize(packed, "F32")[:, ::7]).max() < 1e-6


def test_what_cannot_be_quantized_is_refused() -> None:
    good = np.ones((2, 64), np.float32)
    with pytest.raises(ValueError, match="bits is 7: allowed are 2, 3, 4, 5, 6, 8"):
        quantize(good, bits=7, group=64, storage="F32")
    with pytest.raises(ValueError, match="group is 16: allowed are 32, 64, 128"):
        quantize(good, bits=4, group=16, storage="F32")
    with pytest.raises(ValueError, match="rows of 64 values cannot be cut into groups of 128"):
        quantize(good, bits=4, group=128, storage="F32")
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize(np.where(good > 0, np.float32(np.nan), good), bits=4, group=64, storage="F32")
