"""Test the spectral loss: identities and hand-computed values [T1.4.1] and [T1.9]."""

from __future__ import annotations

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.autoencoder.filters import k_weighting_fir, k_weighting_gain
from sa3_torch.train.autoencoder.spectral import (
    SpectralConfig,
    k_weighted,
    left_right,
    magnitude,
    mid_side,
    spectral_distance,
    spectral_input,
    spectral_terms,
    tight_stft,
    tight_window,
)
from tests.support.learning import learn

DEMO = SpectralConfig(
    sizes=(128, 512),
    overlap=4,
    phase_sizes=(),
    contrast=1.0,
    log_magnitude=2.0,
    complex=0.5,
    frequency=0.0,
    delay=0.0,
    log_scale=0.1,
    k_weighting=False,
    stereo="alternating",
)
FULL = SpectralConfig(
    sizes=(32, 64, 128, 256, 512, 1024, 2048),
    overlap=4,
    phase_sizes=(32, 64, 128, 256, 512, 1024, 2048),
    contrast=1.0,
    log_magnitude=1.0,
    complex=1.0,
    frequency=1.0,
    delay=1.0,
    log_scale=1.0,
    k_weighting=True,
    stereo="stacked",
)
RATE = 44_100
TERMS = ("contrast", "log_magnitude", "complex", "frequency", "delay")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def only(term: str, config: SpectralConfig = FULL) -> SpectralConfig:
    return dataclasses.replace(config, **{name: float(name == term) for name in TERMS})


def terms(prediction: torch.Tensor, reference: torch.Tensor, config: SpectralConfig = FULL) -> dict[str, torch.Tensor]:
    return spectral_terms(prediction, reference, config, spectral_distance, lambda value: value)


def spectral_loss(prediction: torch.Tensor, reference: torch.Tensor, config: SpectralConfig) -> torch.Tensor:
    """Return the weighted sum of the terms, as a stage has it."""
    return torch.stack([config.weights[name] * x for name, x in terms(prediction, reference, config).items()]).sum()


def item_mean(prediction: torch.Tensor, reference: torch.Tensor, config: SpectralConfig) -> float:
    """Return the weighted distance of two spectra over audible items."""
    *rows, audible = spectral_distance(prediction, reference, config, False)
    return float(sum(w * r for w, r in zip(config.weights.values(), rows, strict=True)).sum() / audible.sum())


def three_terms(prediction: torch.Tensor, reference: torch.Tensor, config: SpectralConfig) -> torch.Tensor:
    """Return the distance with which the shipped demo was trained."""
    axes = (1, 2)
    a, b = magnitude(prediction), magnitude(reference)
    audible = (reference.square().sum(-1).mean(axes) > 1e-6).float()
    contrast = ((a - b).square().sum(axes) + 1e-8).sqrt() / ((a + b).square().sum(axes).sqrt() + 1e-2)
    spread = (a.var(axes, keepdim=True) + b.var(axes, keepdim=True)).sqrt().clamp_min(1e-3)
    scale = config.log_scale * spread.detach()
    log_magnitude = (torch.log1p(a / scale) - torch.log1p(b / scale)).abs().mean(axes)
    energy = reference.square().sum(-1).mean(axes, keepdim=True).clamp_min(1e-5)
    square = (prediction - reference).square().sum(-1)
    values = (
        config.contrast * contrast
        + config.log_magnitude * log_magnitude
        + config.complex * torch.log1p(square / energy).mean(axes)
    )
    return (values * audible).sum() / audible.sum().clamp_min(1)


def test_without_the_phase_terms_the_loss_is_that_of_the_demo() -> None:
    reference = noise(4, 8192) * torch.tensor([[1.0], [0.1], [1e-5], [0.01]])  # the third is silent
    prediction = (0.3 * noise(4, 8192, seed=1)).requires_grad_()
    old = torch.stack(
        [three_terms(tight_stft(prediction, n, n // 4), tight_stft(reference, n, n // 4), DEMO) for n in DEMO.sizes]
    ).mean()
    new = spectral_loss(prediction, reference, DEMO)
    assert float(new.detach()) == pytest.approx(float(old.detach()), rel=1e-6)
    gradients = [torch.autograd.grad(value, prediction)[0] for value in (old, new)]
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("overlap", [2, 4])
@pytest.mark.parametrize("size", FULL.sizes)
def test_tight_stft_keeps_the_energy(size: int, overlap: int) -> None:
    x = torch.zeros(3, 16384)
    x[:, 4096:-4096] = noise(3, 16384 - 8192)
    energy = tight_stft(x, size, size // overlap).double().square().sum((1, 2, 3))
    assert torch.allclose(energy, x.double().square().sum(1), rtol=1e-5)


def test_tight_window_squares_sum_to_one() -> None:
    window = torch.from_numpy(tight_window(512, 128)).square().reshape(4, 128).sum(0)
    assert torch.allclose(window, torch.ones(128), atol=1e-6)


@pytest.mark.parametrize("level", [1.0, 1e-2])
def test_terms_of_equal_signals_are_zero(level: float) -> None:
    x = level * noise(2, 8192)
    for name, value in terms(x, x).items():
        assert float(value) == pytest.approx(0.0, abs=1e-4 if name == "contrast" else 0.0), name


def test_gradient_is_finite_where_prediction_or_reference_is_silent() -> None:
    for reference in (torch.zeros(2, 4096), noise(2, 4096)):
        x = torch.zeros(2, 4096, requires_grad=True)
        spectral_loss(x, reference, FULL).backward()
        assert torch.isfinite(x.grad).all()


def test_silent_items_do_not_count() -> None:
    sound, output = noise(1, 4096), noise(1, 4096, seed=1)
    alone = terms(output, sound)
    beside = terms(torch.cat([output, 1e-3 * output]), torch.cat([sound, torch.zeros(1, 4096)]))
    for name in TERMS:
        assert float(beside[name]) == pytest.approx(float(alone[name]), rel=1e-5), name


def test_a_loud_item_does_not_change_the_terms_of_a_quiet_one() -> None:
    quiet, other, loud = 0.1 * noise(1, 4096), 0.1 * noise(1, 4096, seed=1), noise(1, 4096, seed=2)
    alone, beside = terms(quiet, other), terms(torch.cat([quiet, loud]), torch.cat([other, loud]))
    for name in TERMS:
        assert float(2 * beside[name]) == pytest.approx(float(alone[name]), rel=1e-3), name


def test_polarity_changes_the_complex_distance_alone() -> None:
    x = noise(2, 8192)
    values = terms(-x, x)
    assert float(values["complex"]) > 1
    for name in ("log_magnitude", "frequency", "delay"):
        assert float(values[name]) == 0.0, name
    assert float(values["contrast"]) < 1e-4


def test_complex_distance_of_a_flipped_signal_by_hand() -> None:
    spectrum = tight_stft(noise(2, 8192), 512, 128)
    energy = spectrum.square().sum(-1)
    only_complex = 0.5 * torch.log1p(4 * energy / energy.mean((1, 2), keepdim=True)).mean()
    assert item_mean(-spectrum, spectrum, DEMO) == pytest.approx(float(only_complex), rel=1e-4)


def test_global_phase_leaves_the_phase_terms_at_zero() -> None:
    spectrum = tight_stft(noise(2, 8192), 512, 128)
    c, s = math.cos(0.7), math.sin(0.7)
    re, im = spectrum.unbind(-1)
    turned = torch.stack([c * re - s * im, s * re + c * im], dim=-1)
    *rows, _ = spectral_distance(turned, spectrum, FULL, True)
    values = dict(zip(TERMS, (float(row.mean()) for row in rows), strict=True))
    assert values["frequency"] == pytest.approx(0, abs=1e-6) and values["delay"] == pytest.approx(0, abs=1e-6)
    assert values["complex"] > 0.1


def test_shift_of_a_tone_by_one_hop_keeps_the_contrast_and_changes_the_complex_distance() -> None:
    time = torch.arange(8192 + 32) / RATE
    x = torch.sin(2 * torch.pi * 997 * time)[None]
    config = dataclasses.replace(FULL, sizes=(128,), phase_sizes=(128,))
    values = terms(x[:, :8192], x[:, 32:], config)
    assert float(values["contrast"]) < 0.05
    assert float(values["complex"]) > 0.1


def test_frequency_term_of_two_tones_is_that_of_their_phase_advance() -> None:
    """Compare tones within one bin of size 64: the phase advances of a hop differ by 2 pi df hop / rate."""
    time, hop = torch.arange(4096) / RATE, 16
    low, high = (torch.sin(2 * torch.pi * f * time)[None] for f in (5 * RATE / 64, 5 * RATE / 64 + 100))
    config = dataclasses.replace(only("frequency"), sizes=(64,), phase_sizes=(64,))
    expected = 1 - math.cos(2 * math.pi * 100 * hop / RATE)
    assert float(terms(low, high, config)["frequency"]) == pytest.approx(expected, rel=0.05)


def test_delay_term_of_two_impulses_is_that_of_their_distance() -> None:
    """Move an impulse by d samples: neighbouring bins of a window of N turn against each other by 2 pi d / N."""
    a, b = torch.zeros(1, 4096), torch.zeros(1, 4096)
    a[0, 2048], b[0, 2050] = 1.0, 1.0
    config = dataclasses.replace(only("delay"), sizes=(64,), phase_sizes=(64,))
    expected = 1 - math.cos(2 * math.pi * 2 / 64)
    assert float(terms(a, b, config)["delay"]) == pytest.approx(expected, rel=1e-3)


def test_terms_without_weight_are_left_out() -> None:
    a, b = noise(1, 4096), noise(1, 4096, seed=1)
    config = dataclasses.replace(FULL, delay=0.0, complex=0.25)
    values = terms(a, b, config)
    assert set(values) == {"contrast", "log_magnitude", "complex", "frequency"}


def test_two_halves_of_a_batch_average_to_the_whole_with_the_common_count() -> None:
    a, b = noise(4, 4096), noise(4, 4096, seed=1)
    b[3] = 0.0  # three audible items: two in the first half, one in the second
    halves = [
        spectral_terms(a[i : i + 2], b[i : i + 2], FULL, spectral_distance, lambda _: torch.tensor(1.5)) for i in (0, 2)
    ]
    for name, value in terms(a, b).items():
        assert float(halves[0][name] + halves[1][name]) / 2 == pytest.approx(float(value), rel=1e-5), name


def test_loss_is_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        audio = spectral_input(noise(1, 4096, 2), FULL, RATE, 0)
        value = spectral_loss(audio, spectral_input(noise(1, 4096, 2, seed=1), FULL, RATE, 0), FULL)
    assert value.dtype == torch.float32 and audio.dtype == torch.float32


@pytest.mark.parametrize("term", [*TERMS, "all"])
def test_each_term_alone_and_all_together_learn_one_batch(term: str) -> None:
    config = dataclasses.replace(FULL if term == "all" else only(term), sizes=(64, 256), phase_sizes=(64, 256))
    reference = noise(2, 2048)
    output = (0.5 * noise(2, 2048, seed=1)).requires_grad_()
    first, last = learn([output], lambda: spectral_loss(output, reference, config), steps=60, rate=0.1)
    assert last < 0.4 * first, (first, last)


def test_k_weighting_is_one_at_1_khz_and_follows_the_analogue_filter() -> None:
    taps = torch.from_numpy(k_weighting_fir(RATE)).double()
    assert torch.equal(taps, taps.flip(0))
    for hz, tolerance_db in ((1000, 1e-3), (60, 1.2), (110, 1.5), (300, 0.5), (2000, 0.5), (5000, 0.5), (15000, 0.5)):
        angle = 2 * math.pi * hz / RATE * torch.arange(257)
        gain = float(torch.complex((taps * angle.cos()).sum(), (taps * angle.sin()).sum()).abs())
        ideal = float(k_weighting_gain(torch.tensor([float(hz)], dtype=torch.float64).numpy())[0])
        ideal /= float(k_weighting_gain(torch.tensor([1000.0], dtype=torch.float64).numpy())[0])
        assert abs(20 * math.log10(gain / ideal)) < tolerance_db, hz


def test_k_weighting_has_no_delay() -> None:
    impulse = torch.zeros(2, 1001)
    impulse[:, 500] = 1.0
    filtered = k_weighted(impulse, RATE)
    assert filtered.shape == impulse.shape and int(filtered[1].abs().argmax()) == 500


def test_mid_side_is_the_plain_sum_and_difference() -> None:
    audio = noise(2, 10, 2)
    assert torch.equal(mid_side(audio)[0], audio[0, :, 0] + audio[0, :, 1])
    assert torch.equal(mid_side(audio)[2], audio[0, :, 0] - audio[0, :, 1])


def test_stacked_input_holds_left_right_mid_and_side() -> None:
    audio = noise(2, 512, 2)
    plain = dataclasses.replace(FULL, k_weighting=False)
    assert torch.equal(spectral_input(audio, plain, RATE, 0), torch.cat([left_right(audio), mid_side(audio)]))
    assert torch.equal(spectral_input(audio, DEMO, RATE, 0), left_right(audio))
    assert torch.equal(spectral_input(audio, DEMO, RATE, 1), mid_side(audio))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap": 3}, "multiples of overlap"),
        ({"phase_sizes": (99,)}, "those of sizes"),
        ({"phase_sizes": ()}, "need a size"),
        ({"delay": -1.0}, "at least 0"),
        ({"log_scale": 0.0}, "above 0"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(FULL, **change)


def test_audio_shorter_than_the_windows_is_refused() -> None:
    with pytest.raises(ValueError, match="windows of 2048 need 2560"):
        terms(noise(1, 2048), noise(1, 2048))
