"""Test GPTQ: smaller output error than rounding to nearest, for every width, in the same format."""

from __future__ import annotations

import numpy as np
import pytest

from sa3_mlx.common.quant import gptq as module
from sa3_mlx.common.quant.affine import BITS, Packed, dequantize, encode, quantize, round_to, unpack
from sa3_mlx.common.quant.gptq import compensate, gptq, passes


def layer(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights (48, 128) and inputs to calibrate on and to judge by, correlated and with a few loud channels."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((128, 128)) * (1 + np.arange(128)) ** -0.5
    mixing[:, 5] *= 8
    inputs = (rng.standard_normal((2, 600, 128)) @ mixing.T).astype(np.float32)
    return round_to(rng.standard_normal((48, 128)).astype(np.float32) / 11, "F16"), inputs[0], inputs[1]


def error(weight: np.ndarray, packed: Packed, inputs: np.ndarray) -> float:
    wanted = inputs @ weight.T
    return float(np.linalg.norm(inputs @ dequantize(packed, "F32").T - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("bits", BITS)
def test_output_error_is_smaller_than_that_of_rounding(bits: int) -> None:
    """Compare on inputs that were not calibrated on. Measured: 0.35 to 0.65 of the error of rounding."""
    weight, calibration, held_out = layer(bits)
    hessian = calibration.T.astype(np.float64) @ calibration
    found = gptq(weight, hessian, bits=bits, group=32, storage="F16")
    nearest = quantize(weight, bits=bits, group=32, storage="F16")
    assert found.shape == nearest.shape == weight.shape
    assert error(weight, found, held_out) < 0.8 * error(weight, nearest, held_out)
    np.testing.assert_array_equal(found.scales, round_to(found.scales, "F16"))


def test_white_inputs_leave_nothing_to_make_up_for() -> None:
    """Round every column to nearest on the grid of its group where the Hessian is diagonal."""
    weight, _, _ = layer(0)
    found = gptq(weight, np.eye(128), bits=4, group=64, storage="F16")
    nearest = quantize(weight, bits=4, group=64, storage="F16")
    np.testing.assert_array_equal(found.scales, nearest.scales)
    np.testing.assert_array_equal(found.biases, nearest.biases)
    same = np.mean(dequantize(found, "F32") == dequantize(nearest, "F32"))
    assert same > 0.99  # codes are found on the stored scale here, on the unrounded one by plain quantization


def test_inputs_that_were_always_zero_do_not_matter() -> None:
    weight, calibration, _ = layer(1)
    calibration = calibration.copy()
    calibration[:, 40:50] = 0
    found = gptq(weight, calibration.T.astype(np.float64) @ calibration, bits=4, group=64, storage="F16")
    assert np.isfinite(dequantize(found, "F32")).all()
    assert error(weight, found, calibration) < error(
        weight, quantize(weight, bits=4, group=64, storage="F16"), calibration
    )
    empty = gptq(weight, np.zeros((128, 128)), bits=4, group=64, storage="F16")
    assert error(weight, empty, np.ones((1, 128), np.float32)) < 0.3


def test_a_hessian_that_does_not_fit_is_refused() -> None:
    weight, _, _ = layer(2)
    for hessian in (np.eye(64), np.full((128, 128), np.nan)):
        with pytest.raises(ValueError, match="Hessian of a layer with 128 inputs"):
            gptq(weight, hessian, bits=4, group=64, storage="F16")


def test_the_values_that_were_rounded_lie_on_the_nearest_codes() -> None:
    weight, calibration, _ = layer(4)
    packed, values = compensate(weight, calibration.T.astype(np.float64) @ calibration, bits=4, group=32, storage="F16")
    scales, biases = (np.repeat(a, 32, -1) for a in (packed.scales, packed.biases))
    np.testing.assert_array_equal(encode(values, scales, biases, 4), unpack(packed.words, 4))
    np.testing.assert_array_equal(values[:, 0], weight[:, 0])  # the first column has nothing to make up for
    assert not np.array_equal(values, weight)


def test_layers_are_done_in_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {"a": 128, "b": 64, "c": 128, "d": 300}
    assert list(passes(inputs)) == [list(inputs)]
    monkeypatch.setattr(module, "HESSIAN_BYTES", 4 * 128 * 128 * 2)
    assert list(passes(inputs)) == [["a", "b"], ["c"], ["d"]]
