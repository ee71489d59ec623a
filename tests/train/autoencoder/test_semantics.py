"""Test alignment network, regressors and critic on latents [T1.4.3] to [T1.4.5] and [T1.9]."""

from __future__ import annotations

import dataclasses
import math

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.autoencoder.filters import chroma_filters
from sa3_torch.train.autoencoder.semantics import (
    OFFICIAL,
    Alignment,
    AlignmentConfig,
    Critic,
    CriticConfig,
    Regressors,
)
from sa3_torch.train.flow.times import truncated_logit_normal
from sa3_torch.train.networks.init import seeded
from tests.support.learning import learn

RATE = 44_100
ALIGNMENT = AlignmentConfig(width=64, depth=2)
CRITIC = CriticConfig(width=64, depth=2, levels=4, max_rows=24)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tone(hz: float, samples: int = 16384, left: float = 1.0, right: float = 1.0) -> torch.Tensor:
    sound = torch.sin(2 * torch.pi * hz * torch.arange(samples) / RATE)
    return torch.stack([left * sound, right * sound], dim=-1)[None]


def alignment(channels: int = 5) -> Alignment:
    with seeded(0):
        return Alignment(ALIGNMENT, channels)


def regressors(samples_per_latent: int = 1024, channels: int = 8) -> Regressors:
    with seeded(0):
        return Regressors(OFFICIAL, RATE, samples_per_latent, channels)


def critic() -> Critic:
    with seeded(0):
        return Critic(CRITIC, 2, 12, 6)


def triples(batch: int) -> dict[str, torch.Tensor]:
    """Make sounds, texts and latents that belong together by a random code of each item."""
    code = noise(batch, 1, 6)
    return {
        "audio": (code.repeat(1, 32, 1)[:, :, :2] + 0.1 * noise(batch, 32, 2, seed=1)),
        "text": code.repeat(1, 3, 2) + 0.1 * noise(batch, 3, 12, seed=2),
        "text_mask": torch.tensor([[True, True, False]]).expand(batch, -1),
        "z": code.repeat(1, 4, 1) + 0.1 * noise(batch, 4, 6, seed=3),
        "captions": torch.arange(batch),
    }


@pytest.mark.parametrize(("stride", "channels"), [(1024, 64), (4096, 256)])
def test_networks_fit_both_autoencoders_and_their_losses_are_fp32_under_autocast(stride: int, channels: int) -> None:
    frames = 16384 // stride
    audio, z = 0.1 * noise(2, 16384, 2), noise(2, frames, channels, seed=1)
    critic = Critic(dataclasses.replace(CRITIC, levels=8), 2, 12, channels)
    corruptions = critic.draw(2, 16384, frames, seed=0, step=0)
    words = {"text": noise(2, 3, 12), "text_mask": torch.ones(2, 3, dtype=torch.bool), "captions": torch.arange(2)}
    with torch.autocast("cpu", torch.bfloat16):
        terms = {
            **alignment(channels).loss(z, torch.rand(2), noise(2, frames, channels), detach=False),
            **regressors(stride, channels).loss(z, audio, detach=False),
            **critic.loss(audio, z=z, **words, corruptions=corruptions, rows=slice(None), detach=False),
        }
    assert set(terms) == {
        "alignment",
        "alignment_zero",
        "chroma_1",
        "chroma_5",
        "chroma_9",
        "level",
        "critic",
        "critic_accuracy",
    }
    assert all(value.dtype == torch.float32 and torch.isfinite(value) for value in terms.values())


# Alignment


def test_a_fresh_alignment_network_predicts_zero() -> None:
    terms = alignment().loss(noise(3, 7, 5), torch.rand(3), noise(3, 7, 5, seed=1), detach=True)
    assert float(terms["alignment"].detach()) == pytest.approx(float(terms["alignment_zero"]), rel=1e-5)


def test_the_zero_predictor_is_the_mean_square_of_the_velocity() -> None:
    net = alignment()
    net.latent_std.fill_(2.0)
    z, eps = noise(3, 7, 5), noise(3, 7, 5, seed=1)
    expected = (2 * eps - z).square().mean()
    assert float(net.loss(z, torch.rand(3), eps, detach=True)["alignment_zero"]) == pytest.approx(float(expected))


def test_the_gradient_reaches_latents_through_input_and_target_unless_detached() -> None:
    net, eps, t = alignment(), noise(3, 7, 5, seed=1), torch.full((3,), 0.4)
    z = noise(3, 7, 5).requires_grad_()
    assert not net.loss(z, t, eps, detach=True)["alignment_zero"].requires_grad
    net.loss(z, t, eps, detach=True)["alignment"].backward()
    assert z.grad is None
    net.loss(z, t, eps, detach=False)["alignment"].backward()
    target_only = -2 * (eps - z.detach()) / z.numel()  # a fresh network has output zero: nothing through the input
    assert torch.allclose(z.grad, target_only, atol=1e-6)
    torch.nn.init.normal_(net.project_out.weight)
    z.grad = None
    net.loss(z, t, eps, detach=False)["alignment"].backward()
    assert not torch.allclose(z.grad, target_only, atol=1e-3)


def test_alignment_alone_learns_one_batch() -> None:
    net, eps = alignment(), noise(3, 7, 5, seed=1)
    t, z = truncated_logit_normal(torch.tensor([0.2, 0.5, 0.7])), noise(3, 1, 5).expand(-1, 7, -1)
    first, last = learn(net.parameters(), lambda: net.loss(z, t, eps, detach=True)["alignment"], steps=60, rate=3e-3)
    assert last < 0.3 * first


def test_every_parameter_of_the_alignment_network_gets_a_gradient() -> None:
    net = alignment()
    net.loss(noise(3, 7, 5), torch.rand(3), noise(3, 7, 5, seed=1), detach=True)["alignment"].backward()
    assert not [name for name, p in net.named_parameters() if p.grad is None]  # DDP waits for every one


def test_the_latent_std_is_followed() -> None:
    net = alignment()
    net.follow(torch.tensor(2.0))
    assert float(net.latent_std) == pytest.approx(1.01)


# Regressors


def pitch_class(value: torch.Tensor) -> int:
    return int(value.mean((0, 1)).argmax())


@pytest.mark.parametrize(("midi", "bin_"), [(69, 98), (81, 98), (72, 2), (84, 2), (96, 2)])
def test_pitch_class_of_a_tone_in_the_middle_band(midi: int, bin_: int) -> None:
    hz = 440 * 2 ** ((midi - 69) / 12)
    assert pitch_class(regressors().targets(tone(hz), 16)["chroma_5"]) == bin_


def test_an_octave_up_keeps_the_bin_and_moves_the_weight_to_the_higher_band() -> None:
    net = regressors()
    low, high = net.targets(tone(440), 16), net.targets(tone(3520), 16)
    assert pitch_class(low["chroma_5"]) == pitch_class(high["chroma_5"]) == 98
    shares = [float(value["chroma_9"].max() / value["chroma_5"].max()) for value in (low, high)]
    assert shares[1] > 100 * shares[0]


@pytest.mark.parametrize("bins", [48, 64, 128])
def test_rows_of_the_chroma_bank_sum_to_one_and_a_is_three_twelfths_below_the_top(bins: int) -> None:
    bank = torch.from_numpy(chroma_filters(bins, 8192, RATE, 5.0, 1.5))
    assert torch.allclose(bank.sum(1), torch.ones(bins), atol=1e-5) and bank.shape == (bins, 4097)
    assert int(bank[:, round(440 * 8192 / RATE)].argmax()) == pytest.approx(bins - 3 * (bins // 12), abs=1)


@pytest.mark.parametrize(("left", "right", "value"), [(1.0, 0.1, 1 / 3), (0.1, 1.0, -1 / 3), (1.0, 1.0, 0.0)])
def test_level_difference_of_a_pan(left: float, right: float, value: float) -> None:
    audio = 100 * noise(1, 16384, 1) * torch.tensor([left, right])  # so loud that the floor of 1e-3 is nothing
    target = regressors().targets(audio, 16)["level"]
    assert target.shape == (1, 16, 32)
    assert torch.allclose(target, torch.full_like(target, value), atol=1e-3)


def test_targets_of_silence_are_zero() -> None:
    for value in regressors().targets(torch.zeros(1, 8192, 2), 8).values():
        assert float(value.abs().max()) < 1e-5


def test_targets_follow_the_time_of_the_latents() -> None:
    """Find the middle of the step where the sound ends, whatever the stride: half tone, half silence."""
    audio = tone(440, 65536)
    audio[:, 32768:] = 0
    for stride in (512, 1024, 4096):
        value = regressors(stride).targets(audio, 65536 // stride)["chroma_5"][0, :, 98]
        frames = len(value)
        assert float(value[frames // 8]) > 0.05 and float(value[-frames // 8]) < 1e-3
        crossing = int((value > value[frames // 8] / 2).sum())
        assert abs(crossing - frames / 2) <= max(1, 2048 / stride)


def test_heads_alone_learn_one_batch_each() -> None:
    net, z = regressors(), noise(2, 16, 8)
    audio = torch.cat([tone(440, right=0.1), tone(3000, left=0.2)])
    for name in net.weights:
        first, last = learn(
            net.parameters(), lambda name=name: net.loss(z, audio, detach=True)[name], steps=60, rate=3e-2
        )
        assert last < 0.5 * first, name


def test_regressors_give_latents_a_gradient_unless_detached() -> None:
    net, z, audio = regressors(), noise(1, 16, 8).requires_grad_(), tone(440, right=0.5)
    sum(net.loss(z, audio, detach=True).values()).backward()
    assert z.grad is None and not [name for name, p in net.named_parameters() if p.grad is None]
    sum(net.loss(z, audio, detach=False).values()).backward()
    assert float(z.grad.abs().sum()) > 0


def test_regressors_have_the_official_weights_and_keep_no_filters_in_checkpoints() -> None:
    net = regressors()
    assert net.weights == {"chroma_1": 0.035, "chroma_5": 0.05, "chroma_9": 0.2, "level": 0.1}
    assert all(name.endswith(("weight", "bias")) for name in net.state_dict())


def test_short_or_mono_audio_is_refused() -> None:
    for shape in ((1, 4096, 2), (1, 8192, 1)):
        with pytest.raises(ValueError, match="stereo of at least 8192"):
            regressors().targets(torch.zeros(shape), 4)


def test_targets_are_fp32_under_autocast() -> None:
    plain = regressors().targets(tone(440), 16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = regressors().targets(tone(440), 16)
    for name, value in plain.items():
        assert torch.equal(value, cast[name]), name


# Critic


def test_pitfall_4_a_batch_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch of 2 or more"):
        critic().loss(**triples(1), corruptions=None, rows=slice(None), detach=True)


def test_number_of_shifts() -> None:
    full = dataclasses.replace(CRITIC, max_rows=1024)
    assert [full.shifts(batch) for batch in (2, 8, 64, 256)] == [1, 7, 5, 1]
    with pytest.raises(ValueError, match="max_rows is 24: a batch of 9 needs 27"):
        CRITIC.shifts(9)


def test_pitfall_3_pairs_of_equal_captions_are_left_out_of_the_mean() -> None:
    """Exchange a text that all have, which changes no score: such pairs would only add a constant softplus(0.5)."""
    net, batch = critic(), triples(3)
    batch["text"] = batch["text"][:1].expand(3, -1, -1)
    distinct = net.loss(**batch, corruptions=None, rows=slice(None), detach=True)["critic"]
    batch["captions"] = torch.zeros(3, dtype=torch.int64)
    equal = net.loss(**batch, corruptions=None, rows=slice(None), detach=True)["critic"]
    constant = math.log(1 + math.exp(0.5))
    assert float(distinct.detach()) == pytest.approx((2 * float(equal.detach()) + constant) / 3, rel=1e-4)
    gradients = [torch.autograd.grad(value, net.from_latents.weight)[0] for value in (distinct, equal)]
    assert torch.allclose(gradients[0] * 1.5, gradients[1], atol=1e-6)


def test_padding_of_the_text_changes_nothing() -> None:
    net, batch = critic(), triples(3)
    before = net.loss(**batch, corruptions=None, rows=slice(None), detach=True)["critic"].detach()
    batch["text"] = batch["text"].clone()
    batch["text"][:, 2] = 100.0
    after = net.loss(**batch, corruptions=None, rows=slice(None), detach=True)["critic"].detach()
    assert float(before) == pytest.approx(float(after), rel=1e-6)


def test_parts_of_the_rows_average_to_the_whole() -> None:
    net, batch = critic(), triples(4)
    batch["captions"] = torch.tensor([0, 1, 0, 0])
    corruptions = net.draw(4, 32, 4, seed=0, step=0)
    whole, first, second = (
        float(net.loss(**batch, corruptions=corruptions, rows=rows, detach=True)["critic"].detach())
        for rows in (slice(None), slice(0, 2), slice(2, 4))
    )
    assert (first + second) / 2 == pytest.approx(whole, rel=1e-5)


def test_critic_alone_learns_one_batch() -> None:
    net, batch = critic(), triples(4)
    first, last = learn(
        net.parameters(),
        lambda: net.loss(**batch, corruptions=None, rows=slice(None), detach=True)["critic"],
        steps=80,
        rate=1e-3,
    )
    assert last < 0.6 * first  # the margin of the normed scores ends at 0.4 as long as their weight stays small
    assert float(net.loss(**batch, corruptions=None, rows=slice(None), detach=True)["critic_accuracy"]) > 0.9


def test_critic_gives_latents_a_gradient_unless_detached() -> None:
    net, batch = critic(), triples(3)
    batch["z"] = batch["z"].requires_grad_()
    net.loss(**batch, corruptions=None, rows=slice(None), detach=True)["critic"].backward()
    assert batch["z"].grad is None and not [name for name, p in net.named_parameters() if p.grad is None]
    net.loss(**batch, corruptions=None, rows=slice(None), detach=False)["critic"].backward()
    assert torch.isfinite(batch["z"].grad).all() and float(batch["z"].grad.abs().sum()) > 0


def test_corruptions_have_their_rates_and_follow_from_the_seed() -> None:
    net = Critic(dataclasses.replace(CRITIC, levels=8), 2, 12, 6)
    a, b = (net.draw(8, 16385, 16, seed=3, step=1) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))
    assert a.tokens.shape == (8, 65, 1) and a.audio.shape == (8, 65, 512)
    assert float(a.tokens.float().mean()) == pytest.approx(0.6, abs=0.1)
    assert float(a.audio.float().mean()) == pytest.approx(0.65, abs=0.01)
    assert float(a.latents.float().mean()) == pytest.approx(0.9, abs=0.05)
    assert 1 <= float(a.gain.min()) <= float(a.gain.max()) <= 1.2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AlignmentConfig(width=96, depth=1), "multiple of 64"),
        (lambda: dataclasses.replace(CRITIC, width=32), "multiple of 64"),
        (lambda: dataclasses.replace(CRITIC, levels=0), "levels is 0"),
        (lambda: dataclasses.replace(OFFICIAL, hop=3000), "divided by 2 or more"),
        (lambda: dataclasses.replace(OFFICIAL, chroma_bands=()), "at least one"),
    ],
)
def test_bad_settings_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
