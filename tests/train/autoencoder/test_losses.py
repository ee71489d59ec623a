"""Test losses of the autoencoder and of flow matching: identities and hand-computed values [T1.9], [T4.9]."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

from sa3_torch.train.autoencoder.losses import silence_loss, soft_norm_loss, waveform_loss
from sa3_torch.train.flow.losses import flow_loss


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_silence_loss_sees_what_is_made_where_there_is_silence() -> None:
    quiet, loud = torch.zeros(2, 4096, 2), 0.1 * noise(2, 4096, 2)
    made = (0.01 * noise(2, 4096, 2, seed=1)).requires_grad_()
    loss = silence_loss(made, quiet)
    energies = [made[..., 0], made[..., 1], made.sum(-1), made[..., 0] - made[..., 1]]
    expected = sum(math.log1p(float(x[item].detach().square().mean()) / 1e-6) for x in energies for item in (0, 1)) / 8
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert float((made.grad * made).sum()) > 0  # it goes down where the signal does
    assert float(silence_loss(made, loud)) == 0 and float(silence_loss(quiet, quiet)) == 0
    mono = loud.mean(-1, keepdim=True).expand(-1, -1, 2)
    assert float(silence_loss(loud, mono)) > 0  # the side is silent


def test_the_mean_of_slices_is_the_silence_loss_of_all() -> None:
    made, wanted = noise(4, 512, 2), noise(4, 512, 2) * torch.tensor([1.0, 0, 1e-5, 1])[:, None, None]
    parts = [silence_loss(made[i : i + 1], wanted[i : i + 1]) for i in range(4)]
    assert float(torch.stack(parts).mean()) == pytest.approx(float(silence_loss(made, wanted)), rel=1e-6)


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
