"""Test discriminators and their losses [T1.5] and [T1.9]."""

from __future__ import annotations

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.autoencoder.discriminators import (
    ConvolutionalConfig,
    DiscriminatorsConfig,
    TransformerConfig,
    View,
    build,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
)
from sa3_torch.train.autoencoder.discriminators.transformer import Resampler, padded_window_mask
from sa3_torch.train.autoencoder.stage import AutoencoderConfig
from sa3_torch.train.autoencoder.transforms import wavelet
from sa3_torch.train.run.settings import load_settings
from tests.support.learning import learn

RATE = 44_100
NO_CONV = ConvolutionalConfig(width=4, stft_sizes=())
NO_TRANSFORMER = TransformerConfig(
    depth=2,
    min_width=32,
    max_width=64,
    head_size=32,
    views=(),
)
VIEWS = (
    View(kind="patch", size=29, stride=2, window=4),
    View(kind="stft", size=64, stride=4, window=2),
)
EVERY = DiscriminatorsConfig(
    convolutional=dataclasses.replace(NO_CONV, stft_sizes=(64, 256)),
    transformer=dataclasses.replace(NO_TRANSFORMER, views=VIEWS),
)
NAMES = ("conv_stft_64", "conv_stft_256", "patch_29", "stft_64")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_every_discriminator_gives_finite_logits_and_features_per_item() -> None:
    members = build(EVERY, 2, seed=0)
    assert tuple(members.members) == NAMES
    for logits, features in members(noise(3, 2000, 2)):
        assert logits.shape[0] == 3 and torch.isfinite(logits).all() and logits.dtype == torch.float32
        assert len(features) >= 2 and all(len(feature) == 3 for feature in features)


def test_items_of_a_batch_do_not_see_each_other() -> None:
    members, audio = build(EVERY, 2, seed=0), noise(2, 2000, 2)
    for (both, _), (alone, _) in zip(members(audio), members(audio[1:]), strict=True):
        assert torch.allclose(both[1], alone[0], atol=1e-5)


def test_builds_of_one_seed_are_equal_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (build(EVERY, 2, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize("name", NAMES)
def test_each_discriminator_alone_learns_one_batch(name: str) -> None:
    member = build(EVERY, 2, seed=0).members[name]
    time = torch.arange(2000)[:, None] / RATE
    real = torch.stack([torch.sin(2 * torch.pi * f * time).expand(-1, 2) for f in (440, 880)])
    fake = 0.7 * noise(2, 2000, 2)
    loss = lambda: discriminator_loss([member(real)], [member(fake)])  # noqa: E731
    first, last = learn(member.parameters(), loss, steps=20, rate=1e-2)
    assert last < 0.5 * first, (first, last)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_decoded_audio_and_is_finite_on_silence(name: str) -> None:
    member = build(EVERY, 2, seed=0).members[name]
    for real, fake in ((noise(2, 2000, 2), noise(2, 2000, 2, seed=1)), (torch.zeros(2, 2000, 2),) * 2):
        fake = fake.clone().requires_grad_()
        a, b = member(real), member(fake)
        (generator_loss([a], [b]) + feature_matching_loss([a], [b])).backward()
        assert torch.isfinite(fake.grad).all()
        assert float(fake.grad.abs().sum()) > 0 or not real.any()


def test_generator_steps_leave_the_discriminators_without_gradients_and_the_reverse() -> None:
    members = build(EVERY, 2, seed=0)
    decoder = torch.nn.Linear(2, 2)
    audio = noise(2, 2000, 2)
    members.requires_grad_(False)
    real, fake = members(audio), members(decoder(audio))
    (generator_loss(real, fake) + feature_matching_loss(real, fake)).backward()
    assert all(p.grad is None for p in members.parameters())
    assert all(float(p.grad.abs().sum()) > 0 for p in decoder.parameters())

    decoder.zero_grad(set_to_none=True)
    members.requires_grad_(True)
    with torch.no_grad():
        output = decoder(audio)
    discriminator_loss(members(audio), members(output)).backward()
    assert all(p.grad is None for p in decoder.parameters())
    without = [name for name, p in members.named_parameters() if p.grad is None]
    assert not without  # DDP waits for every one


def test_relativistic_losses_by_hand() -> None:
    real, fake = [(torch.tensor([[2.0]]), [])], [(torch.tensor([[0.5]]), [])]
    assert float(discriminator_loss(real, fake)) == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert float(generator_loss(real, fake)) == pytest.approx(math.log(1 + math.exp(1.5)))
    assert float(discriminator_loss(real, real)) == pytest.approx(math.log(2))
    assert float(discriminator_loss(real + fake, fake + real)) == pytest.approx(
        (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(1.5))) / 2
    )


def test_feature_matching_by_hand_is_relative_and_zero_for_equal_features() -> None:
    a, b = torch.tensor([[1.0, -3.0], [0.2, 0.2]]), torch.tensor([[2.0, -3.0], [0.2, 0.0]])
    logits = torch.zeros(2, 1)
    value = feature_matching_loss([(logits, [a])], [(logits, [b])])
    assert float(value) == pytest.approx((0.5 / 2.001 + 0.1 / 0.201) / 2, rel=1e-5)
    assert float(feature_matching_loss([(logits, [a])], [(logits, [a])])) == 0


def test_two_halves_of_a_batch_average_to_the_whole() -> None:
    members, real, fake = build(EVERY, 2, seed=0), noise(4, 2000, 2), noise(4, 2000, 2, seed=1)
    for loss in (discriminator_loss, generator_loss, feature_matching_loss):
        whole, first, second = (
            float(loss(members(real[part]), members(fake[part])).detach())
            for part in (slice(None), slice(0, 2), slice(2, 4))
        )
        assert (first + second) / 2 == pytest.approx(whole, rel=1e-5)


def test_losses_are_fp32_under_autocast() -> None:
    members = build(EVERY, 2, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        real, fake = members(noise(1, 2000, 2)), members(noise(1, 2000, 2, seed=1))
        values = generator_loss(real, fake), feature_matching_loss(real, fake)
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in values)


def test_only_the_first_two_blocks_of_a_transformer_are_matched() -> None:
    config = dataclasses.replace(NO_TRANSFORMER, depth=3)
    logits, features = Resampler(6, 32, config, stride=3, window=2)(noise(2, 10, 6))
    assert logits.shape == (2, 4) and [tuple(f.shape) for f in features] == [(2, 16, 32)] * 2


def test_a_logit_of_the_transformer_sees_exactly_its_window() -> None:
    """Reach 4 tokens to each side of a logit token, its group and the next one: depth 1, stride 3, window 1."""
    config = dataclasses.replace(NO_TRANSFORMER, depth=1)
    torch.manual_seed(0)
    net = Resampler(6, 32, config, stride=3, window=1)
    x = noise(1, 30, 6).requires_grad_()
    net(x)[0][0, 4].backward()
    seen = x.grad[0].abs().sum(-1).view(10, 3).sum(1) > 0
    assert seen.tolist() == [group in (3, 4, 5) for group in range(10)]


def test_padding_to_whole_windows_changes_no_logit() -> None:
    torch.manual_seed(0)
    net, x = Resampler(6, 32, dataclasses.replace(NO_TRANSFORMER, depth=1), stride=2, window=6), noise(1, 22, 6)
    padded, _ = net(x)  # 11 groups and one of padding
    net.window = 11
    plain, _ = net(x)
    assert padded.shape == plain.shape == (1, 11)
    assert torch.allclose(padded[:, 5], plain[:, 5], atol=1e-6)  # the middle one sees all 11 groups either way


def test_keys_of_the_padding_are_seen_by_the_padding_alone() -> None:
    mask = padded_window_mask(12, 7, 4, torch.device("cpu"))  # (3, 4, 12), keys from 4 before the window on
    seen = {(4 * w + q, 4 * w + k - 4) for w, q, k in mask.nonzero().tolist()}
    assert seen == {(q, k) for q in range(12) for k in range(12) if abs(q - k) <= 4 and (k < 7 or q >= 7)}


@pytest.mark.parametrize("levels", [4, 8, 10])
def test_wavelet_keeps_the_energy_and_the_rate_is_exact(levels: int) -> None:
    audio = noise(2, 3 * 1024, 2)
    out = wavelet(audio, levels)
    assert out.shape == (2, 3 * 1024 >> levels, 2 << levels)
    assert float(out.square().sum()) == pytest.approx(float(audio.square().sum()), rel=1e-5)


def test_wavelet_steps_stay_near_their_time() -> None:
    audio = torch.zeros(1, 4096, 1)
    audio[0, 2048 + 128] = 1.0  # in step 8 of 16
    energy = wavelet(audio, 8)[0].square().sum(1)
    assert float(energy[6:10].sum()) > 0.99


def test_presets_have_the_sizes_of_the_specification() -> None:
    full, tiny = (
        load_settings(AutoencoderConfig, "autoencoder", name, ()).adversarial.discriminators
        for name in ("same-l", "tiny")
    )
    assert full.convolutional.stft_sizes == (2048, 1024, 512, 256, 128)
    assert [view.size for view in full.transformer.views] == [29, 443, 953]
    assert [full.transformer.width(2 * size) for size in (1, 29, 443, 953)] == [192, 192, 448, 512]
    assert [(view.kind, view.size) for view in tiny.transformer.views] == [
        ("patch", 29),
        ("patch", 97),
        ("stft", 1024),
        ("stft", 256),
    ]
    members = build(tiny, 2, seed=0)
    assert sum(p.numel() for p in members.parameters()) == 1_053_732
    assert all(torch.isfinite(logits).all() for logits, _ in members(noise(1, 8192, 2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscriminatorsConfig(convolutional=NO_CONV, transformer=NO_TRANSFORMER), "none is chosen"),
        (lambda: dataclasses.replace(NO_CONV, width=6), "multiple of 4"),
        (lambda: dataclasses.replace(NO_CONV, stft_sizes=(10,)), "multiples of 4"),
        (lambda: dataclasses.replace(NO_TRANSFORMER, min_width=48), "multiples of head_size"),
        (
            lambda: dataclasses.replace(EVERY, transformer=dataclasses.replace(EVERY.transformer, views=VIEWS[:1] * 2)),
            "names one twice",
        ),
        (lambda: View(kind="stft", size=30, stride=1, window=1), "multiple of 4"),
        (lambda: View.from_dict({"kind": "mel", "size": 1, "stride": 1, "window": 1}), "allowed"),
    ],
)
def test_bad_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_settings_make_the_round_trip() -> None:
    assert DiscriminatorsConfig.from_dict(EVERY.to_dict()) == EVERY
