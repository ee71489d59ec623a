"""Fake quantization in torch equals the packed format bit for bit, and lets the gradient pass."""

from __future__ import annotations

import numpy as np
import pytest

from sa3_mlx.common.quant.affine import BITS, GROUPS, Storage, dequantize, quantize, round_to
from tests.quant.test_affine import STORAGES, matrices

torch = pytest.importorskip("torch")

from sa3_torch.fake_quant import FakeQuant, add_fake_quant, fake_quant, latent_weight


def quant(weight: np.ndarray, bits: int, group: int, storage: Storage) -> FakeQuant:
    return FakeQuant(bits=bits, group=group, storage=storage, shape=weight.shape)


def random_weight(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_values_equal_the_packed_ones(bits: int, group: int, storage: Storage) -> None:
    for name, matrix in matrices(group).items():
        weight = matrix.astype(np.float32)
        packed = quantize(round_to(weight, storage), bits=bits, group=group, storage=storage)
        found = quant(weight, bits, group, storage)
        own = found.packed(torch.from_numpy(weight))
        np.testing.assert_array_equal(own.words, packed.words, err_msg=name)
        np.testing.assert_array_equal(own.scales, packed.scales, err_msg=name)
        np.testing.assert_array_equal(own.biases, packed.biases, err_msg=name)
        values = found(torch.from_numpy(weight))
        wanted = dequantize(packed, "F32")
        if storage == "F32":  # the product is rounded, and may be fused with the sum
            np.testing.assert_allclose(values.numpy(), wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
        else:
            np.testing.assert_array_equal(values.numpy(), wanted, err_msg=name)
        found.freeze(torch.from_numpy(weight))
        assert torch.equal(found(torch.from_numpy(weight)), values), name  # freezing changes nothing by itself


def test_the_gradient_passes_straight_through() -> None:
    weight = random_weight(0, 4, 64).requires_grad_()
    values = FakeQuant(bits=3, group=32, storage="F16", shape=(4, 64))(weight)
    assert not torch.equal(values, weight)
    slope = random_weight(1, 4, 64)
    (values * slope).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, slope)


def test_a_frozen_grid_stays_and_stops_the_gradient_outside_of_its_range() -> None:
    start = random_weight(0, 4, 64)
    found = FakeQuant(bits=4, group=32, storage="F16", shape=(4, 64))
    found.freeze(start)
    scales, biases = found.scales.clone(), found.biases.clone()
    weight = start.clone()
    weight[0, 0], weight[1, 40], weight[2, 3] = 9.0, -9.0, weight[2, 3] + 0.2
    weight.requires_grad_()
    values = found(weight)
    values.sum().backward()
    assert weight.grad is not None
    assert weight.grad[0, 0] == weight.grad[1, 40] == 0
    assert weight.grad[2, 3] == 1 and float(weight.grad.mean()) > 0.9
    assert torch.equal(found.scales, scales) and torch.equal(found.biases, biases)
    packed = found.packed(weight)
    np.testing.assert_array_equal(packed.scales, scales.half().float().numpy())
    np.testing.assert_array_equal(dequantize(packed, "F32"), values.detach().numpy())
    assert values[0, 0] == values[0, :32].max() and values[1, 40] == values[1, 32:].min()  # clamped to the ends


def test_the_grid_of_packed_weights_can_be_kept() -> None:
    """Use a grid that was made for other values."""
    weight = random_weight(3, 4, 64).half().float()
    packed = quantize((1.5 * weight).half().float().numpy(), bits=4, group=32, storage="F16")
    found = FakeQuant(bits=4, group=32, storage="F16", shape=(4, 64))
    found.hold(packed)
    own = found.packed(weight)
    np.testing.assert_array_equal(own.scales, packed.scales)
    np.testing.assert_array_equal(own.biases, packed.biases)
    assert float((found(weight) - weight).abs().max()) <= float(found.scales.abs().max())


def test_a_layer_computes_with_the_values_of_its_weight() -> None:
    layer = torch.nn.Linear(64, 8)
    before = layer.weight.detach().clone()
    add_fake_quant(layer, bits=4, group=64, storage="F16")
    assert torch.equal(latent_weight(layer), before)
    x = random_weight(2, 3, 64)
    weight = fake_quant(layer)(before)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
    layer(x).sum().backward()
    assert latent_weight(layer).grad is not None
    assert len(list(layer.parameters())) == 2


def test_rows_that_groups_do_not_fill_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 48 values cannot be cut into groups of 32"):
        FakeQuant(bits=4, group=32, storage="F16", shape=(2, 48))
    with pytest.raises(ValueError, match="rows of 48 values cannot be cut into groups of 64"):
        add_fake_quant(torch.nn.Linear(48, 2), bits=4, group=64, storage="F16")
