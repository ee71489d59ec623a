"""Noise levels of adversarial post-training [T7.2]."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.presets import LOGSNR
from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.few_steps.noise_levels import NOISE_LEVELS, NoiseLevelConfig, draw_levels

COUNT = 20_000


def draw(
    family: str, *, shifted: bool = False, one_shot: float = 0.0, low_noise: float = 0.0, length: int = 64
) -> torch.Tensor:
    config = NoiseLevelConfig(family=family, shifted=shifted, one_shot=one_shot, low_noise=low_noise)
    u = torch.rand(COUNT, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return draw_levels(config, torch.full((COUNT,), length), (8, 128), u)


@pytest.mark.parametrize(
    ("family", "below_quarter", "below_half"),
    [
        ("truncated_logit_normal", 0.1155, 0.4429),  # [T4.3]
        ("sampling_log_snr", (2 - 1.0986) / 8, 2 / 8),  # log-SNR above ln 3, above 0
    ],
)
def test_shares_below_a_level_are_those_of_the_closed_form(
    family: str, below_quarter: float, below_half: float
) -> None:
    t = draw(family)
    assert t.dtype == torch.float32 and float(t.min()) >= 0 and float(t.max()) <= 1
    assert float((t < 0.25).float().mean()) == pytest.approx(below_quarter, abs=0.01)
    assert float((t < 0.5).float().mean()) == pytest.approx(below_half, abs=0.01)


def test_log_snr_lies_between_minus_six_and_two() -> None:
    t = draw("sampling_log_snr").double()
    log_snr = ((1 - t) / t).log()
    assert float(log_snr.min()) >= -6.001 and float(log_snr.max()) <= 2.001
    assert float(log_snr.mean()) == pytest.approx(-2, abs=0.05)


@pytest.mark.parametrize("family", NOISE_LEVELS)
def test_draws_follow_from_the_generator(family: str) -> None:
    assert torch.equal(draw(family), draw(family))


def test_a_share_of_items_starts_from_pure_noise() -> None:
    assert float((draw("truncated_logit_normal", one_shot=0.2) == 1).float().mean()) == pytest.approx(0.2, abs=0.01)


def test_a_share_of_items_is_nearly_clean() -> None:
    """11.6 % of the others are as clean, too; among the nearly clean ones all levels up to 0.25 are as frequent."""
    t = draw("truncated_logit_normal", one_shot=0.2, low_noise=0.3)
    assert float((t == 1).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float((t < 0.25).float().mean()) == pytest.approx(0.3 + 0.5 * 0.1155, abs=0.01)
    assert float((t < 0.05).float().mean()) == pytest.approx(0.3 / 5, abs=0.01)


def test_grids_have_the_levels_of_few_step_sampling() -> None:
    t = draw("sampling_grids")
    wanted = {float(level) for steps in (1, 2, 4, 8) for level in sigmas(LOGSNR, steps, 1.0, [64])[0, :-1]}
    assert {float(level) for level in t.unique()} == wanted
    assert float((t == 1).float().mean()) == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 8) / 4, abs=0.01)


def test_longer_items_are_shifted_more() -> None:
    plain = draw("truncated_logit_normal")
    short, long = (draw("truncated_logit_normal", shifted=True, length=length) for length in (8, 128))
    assert bool((plain <= short).all()) and bool((short <= long).all()) and float(short.mean()) < float(long.mean())


def test_unknown_families_and_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="family is 'normal': allowed are truncated_logit_normal, "):
        draw("normal")
    with pytest.raises(ConfigError, match=r"one_shot is 2\.0: allowed is 0 to 1"):
        draw("truncated_logit_normal", one_shot=2.0)
    with pytest.raises(ConfigError, match=r"one_shot is 0\.6, low_noise 0\.6: allowed are shares of 1 together"):
        draw("truncated_logit_normal", one_shot=0.6, low_noise=0.6)
