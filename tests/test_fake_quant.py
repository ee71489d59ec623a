"""Fake quantization in torch equals the packed format bit for bit, and lets the gradient pass."""

from __future__ import annotations

import numpy as np
import pytest
from test_affine import STORAGES, matrices

from sa3_mlx.spec.affine import BITS, GROUPS, Storage, dequantize, quantize, round_to, unpack

torch = pytest.importorskip("torch")

from sa3_torch.fake_quant import add_fake_quant, codes, fake_quantize, latent_weight  # noqa: E402


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_values_equal_the_packed_ones(bits: int, group: int, storage: Storage) -> None:
    for name, matrix in matrices(group).items():
        weight = matrix.astype(np.float32)
        packed = quantize(round_to(weight, storage), bits=bits, group=group, storage=storage)
        found, scales, biases = codes(torch.from_numpy(weight), bits=bits, group=group, storage=storage)
        np.testing.assert_array_equal(found.numpy(), unpack(packed.words, bits), err_msg=name)
        np.testing.assert_array_equal(scales.numpy(), packed.scales, err_msg=name)
        np.testing.assert_array_equal(biases.numpy(), packed.biases, err_msg=name)
        values = fake_quantize(torch.from_numpy(weight), bits=bits, group=group, storage=storage)
        wanted = dequantize(packed, "F32")
        if storage == "F32":  # the product is rounded, and may be fused with the sum
            np.testing.assert_allclose(values.numpy(), wanted, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())
        else:
            np.testing.assert_array_equal(values.numpy(), wanted, err_msg=name)


def test_the_gradient_passes_straight_through() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = fake_quantize(weight, bits=3, group=32, storage="F16")
    assert not torch.equal(values, weight)
    slope = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    (values * slope).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, slope)


def test_a_layer_computes_with_the_values_of_its_weight() -> None:
    layer = torch.nn.Linear(64, 8)
    before = layer.weight.detach().clone()
    add_fake_quant(layer, bits=4, group=64, storage="F16")
    assert torch.equal(latent_weight(layer), before)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    weight = fake_quantize(before, bits=4, group=64, storage="F16")
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
    layer(x).sum().backward()
    assert latent_weight(layer).grad is not None
    assert len(list(layer.parameters())) == 2


def test_rows_that_groups_do_not_fill_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 48 values cannot be cut into groups of 32"):
        fake_quantize(torch.zeros(2, 48), bits=4, group=32, storage="F16")
    with pytest.raises(ValueError, match="rows of 48 values cannot be cut into groups of 64"):
        add_fake_quant(torch.nn.Linear(48, 2), bits=4, group=64, storage="F16")
