"""Losses of the autoencoder and of flow matching: identities and hand-computed values (training spec 1.9, 4.9)."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

from sa3_torch.train.losses import (  # noqa: E402
    SpectralConfig,
    flow_loss,
    mid_side,
    soft_norm_loss,
    spectral_distance,
    spectral_loss,
    tight_stft,
    tight_window,
    waveform_loss,
)

CONFIG = SpectralConfig(sizes=(128, 512), overlap=4, contrast=1.0, log_magnitude=2.0, complex=0.5, log_scale=0.1)
SIZES = (32, 64, 128, 256, 512, 1024, 2048)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("overlap", [2, 4])
@pytest.mark.parametrize("size", SIZES)
def test_tight_stft_keeps_the_energy(size: int, overlap: int) -> None:
    x = torch.zeros(3, 16384)
    x[:, 4096:-4096] = noise(3, 16384 - 8192)
    energy = tight_stft(x, size, size // overlap).double().square().sum((1, 2, 3))
    assert torch.allclose(energy, x.double().square().sum(1), rtol=1e-5)


def test_tight_window_squares_sum_to_one() -> None:
    window = torch.from_numpy(tight_window(512, 128)).square().reshape(4, 128).sum(0)
    assert torch.allclose(window, torch.ones(128), atol=1e-6)


def test_loss_of_equal_signals_is_zero() -> None:
    x = noise(2, 8192)
    assert float(spectral_loss(x, x, CONFIG, spectral_distance)) == pytest.approx(0.0, abs=1e-5)


def test_gradient_on_silence_is_finite() -> None:
    x = torch.zeros(2, 8192, requires_grad=True)
    spectral_loss(x, torch.zeros(2, 8192), CONFIG, spectral_distance).backward()
    assert torch.isfinite(x.grad).all()


def test_silent_items_do_not_count() -> None:
    sound, silence = tight_stft(noise(1, 4096), 512, 128), torch.zeros(1, 29, 257, 2)
    output = tight_stft(noise(1, 4096, seed=1), 512, 128)
    alone = spectral_distance(output, sound, CONFIG)
    beside = spectral_distance(torch.cat([output, 1e-3 * output]), torch.cat([sound, silence]), CONFIG)
    assert float(beside) == pytest.approx(float(alone), rel=1e-5)


def test_complex_distance_sees_polarity_and_the_magnitude_terms_do_not() -> None:
    x = noise(2, 8192)
    spectrum = tight_stft(x, 512, 128)
    flipped = spectral_distance(-spectrum, spectrum, CONFIG)
    energy = spectrum.square().sum(-1)
    only_complex = 0.5 * torch.log1p(4 * energy / energy.mean((1, 2), keepdim=True)).mean()
    assert float(flipped) == pytest.approx(float(only_complex), rel=1e-4)


def test_a_loud_item_does_not_change_the_distance_of_a_quiet_one() -> None:
    quiet, other = tight_stft(0.1 * noise(1, 4096), 512, 128), tight_stft(0.1 * noise(1, 4096, seed=1), 512, 128)
    loud = tight_stft(noise(1, 4096, seed=2), 512, 128)
    alone = spectral_distance(quiet, other, CONFIG)
    beside = spectral_distance(torch.cat([quiet, loud]), torch.cat([other, loud]), CONFIG)
    assert float(2 * beside) == pytest.approx(float(alone), rel=1e-3)


def test_loss_is_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        value = spectral_loss(noise(2, 4096), noise(2, 4096, seed=1), CONFIG, spectral_distance)
    assert value.dtype == torch.float32


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


def test_mid_side_is_the_plain_sum_and_difference() -> None:
    audio = noise(2, 10, 2)
    assert torch.equal(mid_side(audio)[0], audio[0, :, 0] + audio[0, :, 1])
    assert torch.equal(mid_side(audio)[2], audio[0, :, 0] - audio[0, :, 1])


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
