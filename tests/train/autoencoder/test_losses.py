"""Test losses of the autoencoder and of flow matching: identities and hand-computed values [T1.9], [T4.9]."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

from sa3_torch.train.autoencoder.losses import soft_norm_loss, waveform_loss
from sa3_torch.train.flow.losses import flow_loss


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_soft_norm_loss_of_white_latents_and_of_doubled_ones() -> None:
    z = noise(8, 4096, 256)
    assert float(soft_norm_loss(z)) == pytest.approx(0.0, abs=0.01)
    expected = (4 - math.log(4) - 1) * 1.4  # 2.259
    assert float(soft_norm_loss(2 * z)) == pytest.approx(expected, rel=0.01)


def test_soft_norm_loss_gives_constant_latents_a_gradient() -> None:
    z = torch.full((2, 6, 3), 0.5, requires_grad=True)
    soft_norm_loss(z).backward()
    assert float(z.grad.abs().sum()) > 0


def test_waveform_loss_of_silence_is_about_one_and_ignores_the_level() -> None:
    x = noise(3, 1000, 2)
    silent = waveform_loss(torch.zeros_like(x), x)
    assert float(silent) == pytest.approx(1.0, abs=1e-3)
    assert float(waveform_loss(torch.zeros_like(x), 0.1 * x)) == pytest.approx(0.99, abs=0.01)


def test_flow_loss_by_hand() -> None:
    prediction = torch.zeros(2, 3, 2)
    target = torch.tensor([[[1.0, 1], [2, 2], [9, 9]], [[3, 3], [0, 4], [9, 9]]])
    generate = torch.tensor([[True, False, False], [True, True, False]])
    keep = torch.tensor([[False, True, False], [False, False, False]])
    # item 0: generated 1, kept 4; item 1: generated (9 + 8) / 2, kept none
    assert float(flow_loss(prediction, target, generate, keep, 0.5)) == pytest.approx((1 + 8.5) / 2 + 0.5 * (4 + 0) / 2)


def test_flow_loss_ignores_padding() -> None:
    generate = torch.tensor([[True, True, False]])
    keep = torch.zeros_like(generate)
    a, b = noise(1, 3, 4), noise(1, 3, 4, seed=1)
    changed = a.clone()
    changed[:, 2] = 100.0
    assert float(flow_loss(a, b, generate, keep, 1.0)) == float(flow_loss(changed, b, generate, keep, 1.0))
