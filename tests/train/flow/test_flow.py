"""Random choices of flow matching and its loss [T4.3], [T4.4], [T4.6], [T4.9]."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
stats = pytest.importorskip("scipy.stats", reason="the training extra is not installed")

from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.config import ShiftConfig
from sa3_torch.samplers import SAMPLERS
from sa3_torch.train.flow.losses import flow_errors, flow_loss
from sa3_torch.train.flow.masks import MASK_KINDS, MASK_NUMBERS, draw_masks, extend_valid, inpaint_masks, mask_kinds
from sa3_torch.train.flow.times import SHIFT_END, SHIFT_START, shift_times, truncated_logit_normal

DRAWS = 20_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logit(t: np.ndarray) -> np.ndarray:
    return np.log(t / (1 - t))


def truncated_cdf(tau: np.ndarray) -> np.ndarray:
    return stats.norm.sf(logit(0.075 + 0.925 * (1 - tau))) / stats.norm.sf(logit(np.array(0.075)))


def test_times_follow_their_closed_form() -> None:
    """Kolmogorov-Smirnov; significant at 5 % would be 0.0096."""
    t = truncated_logit_normal(uniform(DRAWS))
    assert t.dtype == torch.float32 and float(t.min()) >= 0 and float(t.max()) <= 1
    inside = t.double().numpy().clip(1e-9, 1 - 1e-9)
    assert stats.kstest(inside, truncated_cdf).statistic < 1.36 / math.sqrt(DRAWS)
    assert torch.equal(truncated_logit_normal(torch.tensor([0.0])), torch.tensor([1.0]))


def test_truncated_logit_normal_has_the_published_shares() -> None:
    published = {0.1: 0.0113, 0.25: 0.1155, 0.5: 0.4429, 0.75: 0.7980, 0.9: 0.9513}
    for tau, share in published.items():
        assert float(truncated_cdf(np.array(tau))) == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize(("length", "odds", "middle"), [(256, 0.5, 0.62246), (4096, 1.15, 0.75951)])
def test_shift_has_the_stated_odds(length: int, odds: float, middle: float) -> None:
    t = torch.tensor([0.0, 0.3, 0.5, 1.0])
    shifted = shift_times(t, torch.full((4,), float(length)), 256, 4096)
    assert float(shifted[2]) == pytest.approx(middle, abs=1e-5)
    assert float(shifted[1] * 0.7 / (0.3 * (1 - shifted[1]))) == pytest.approx(math.exp(odds), rel=1e-4)
    assert shifted[0] == 0 and shifted[3] == 1


def test_shift_is_limited_to_its_lengths() -> None:
    t = torch.tensor([0.4, 0.4])
    a, b = shift_times(t, torch.tensor([10.0, 256.0]), 256, 4096)
    assert a == b


@pytest.mark.parametrize("length", [100, 777, 4096])
def test_shift_is_that_of_the_sampling_schedule(length: int) -> None:
    """Measured: 6e-8. A batch of lengths is shifted as each alone."""
    shift = ShiftConfig(type="full", start=SHIFT_START, end=SHIFT_END, rate=0.0)
    t = torch.linspace(1, 0, 21)
    shifted = shift_times(t, torch.full((21,), float(length)), 256, 4096)
    assert np.abs(shifted.numpy() - sigmas(shift, 20, 1.0, [length])[0]).max() < 1e-6
    assert (shifted.diff() < 0).all() and shifted[0] == 1 and shifted[-1] == 0
    mixed = shift_times(t[3:5], torch.tensor([float(length), 300.0]), 256, 4096)
    assert mixed[0] == shifted[3]


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator(seed))


def masks(valid: torch.Tensor, *shares: float) -> torch.Tensor:
    return draw_masks(valid, 0.0, shares, uniform(len(valid), MASK_NUMBERS)).keep


def test_masks_are_drawn_by_their_shares() -> None:
    kinds = mask_kinds((0.2, 0.7, 0.1), uniform(10_000))
    shares = kinds.bincount(minlength=len(MASK_KINDS)) / 10_000
    assert shares.tolist() == pytest.approx([0.2, 0.7, 0.1], abs=0.01)


@pytest.mark.parametrize("kind", range(len(MASK_KINDS)))
def test_masks_keep_no_padding_and_leave_something_to_generate(kind: int) -> None:
    """Upstream's causal mask may leave nothing (pitfall 7)."""
    lengths = torch.randint(1, 25, (1000,), generator=generator(3))
    valid = torch.arange(24)[None] < lengths[:, None]
    keep = inpaint_masks(valid, torch.full((1000,), kind), uniform(1000, MASK_NUMBERS - 2))
    assert not (keep & ~valid).any()
    assert ((valid & ~keep).sum(1) >= 1).all()


def test_full_masks_keep_nothing_and_causal_masks_keep_a_prefix() -> None:
    valid = torch.ones(50, 16, dtype=torch.bool)
    assert not masks(valid, 0.0, 1.0, 0.0).any()
    causal = masks(valid, 0.0, 0.0, 1.0)
    assert (causal.int().diff(dim=1) <= 0).all() and causal.any()
    assert not torch.equal(causal[:25], causal[25:])  # the rows of two processes


def test_extension_only_adds_frames_at_the_end() -> None:
    valid = torch.arange(40)[None] < torch.tensor([5, 20, 40])[:, None]
    longer = extend_valid(valid, 8.0, uniform(3))
    assert (longer | ~valid).all() and (longer.int().diff(dim=1) <= 0).all()
    added = extend_valid(torch.arange(4000)[None].expand(3000, -1) < 1, 8.0, uniform(3000)).sum(1).float() - 1
    assert float(added.mean()) == pytest.approx(7.5, abs=0.5)  # floor of an exponential of mean 8


VALID = torch.tensor([[True, True, True], [True, True, False]])
KEEP = torch.tensor([[True, False, False], [False, False, False]])


def test_padding_changes_no_error() -> None:
    prediction, target = torch.randn(2, 2, 3, 2, generator=generator())
    before = flow_errors(prediction, target, VALID & ~KEEP, KEEP)
    prediction[1, 2], target[1, 2] = 1e3, -1e3
    after = flow_errors(prediction, target, VALID & ~KEEP, KEEP)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# Gaussian data: 1-D, and 2-D with correlated coordinates.
GAUSSIANS = [
    (torch.tensor([0.7]), torch.tensor([[0.25]])),
    (torch.tensor([-0.5, 0.3]), torch.tensor([[1.0, 0.4], [0.4, 0.5]])),
]


def features(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Chebyshev polynomials of t times (1, x): (N,), (N, C) -> (N, 8 (1 + C)); in them the velocity is linear."""
    powers = torch.cos(torch.arange(8) * torch.acos((2 * t - 1).clamp(-1, 1))[:, None])
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    return (powers[:, :, None] * torch.cat([ones, x], 1)[:, None]).flatten(1)


def analytic(mean: torch.Tensor, covariance: torch.Tensor, t: float, x: torch.Tensor) -> torch.Tensor:
    """E[eps | x_t] - E[z | x_t] for z normal: linear in x_t."""
    total = (1 - t) ** 2 * covariance + t**2 * torch.eye(len(mean))
    centred = torch.linalg.solve(total, (x - (1 - t) * mean).T).T
    return t * centred - mean - (1 - t) * centred @ covariance


def white(size: int, random: torch.Generator) -> torch.Tensor:
    """(N, size) normal draws whose own mean is 0 and covariance the identity."""
    x = torch.randn(4 * DRAWS, size, generator=random)
    x = x - x.mean(0)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / len(x)), x.T, upper=False).T


def fitted(inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Weights (F, C) of the linear model (N, F) with the least flow-matching loss to the target (N, C)."""
    weight = torch.zeros(inputs.shape[1], target.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=40, history_size=30, line_search_fn="strong_wolfe")
    frame = torch.ones(len(target), 1, dtype=torch.bool)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = flow_loss((inputs @ weight)[:, None], target[:, None], frame, ~frame, 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


@pytest.mark.parametrize(("mean", "covariance"), GAUSSIANS)
def test_flow_matching_learns_the_velocity_of_a_gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> None:
    """The minimum of the loss over a linear model is the analytic velocity, and Euler's path ends in the data.

    50 steps of Euler along the exact velocity leave 5 % of a covariance away, whatever it is; beyond that and with 200
    steps it is right. Measured: squared error 8e-4; moments up to 1.0 % from the exact path, 1.7 % from the data.
    """
    random, size = generator(), len(mean)
    both = white(2 * size, random)
    eps, z = both[:, :size], mean + both[:, size:] @ torch.linalg.cholesky(covariance).T
    t = torch.rand(len(z), generator=random)
    learnt = fitted(features(t, (1 - t[:, None]) * z + t[:, None] * eps), eps - z)
    for time in (0.02, 0.25, 0.5, 0.75, 0.98):
        x = (1 - time) * z + time * eps
        error = features(torch.full((len(z),), time), x) @ learnt - analytic(mean, covariance, time, x)
        assert float(error.square().mean()) < 1e-2

    def velocity(x: torch.Tensor, t: np.ndarray) -> torch.Tensor:
        return (features(torch.from_numpy(t), x[:, 0]) @ learnt)[:, None]

    def exact(x: torch.Tensor, t: np.ndarray) -> torch.Tensor:
        return analytic(mean, covariance, float(t[0]), x[:, 0])[:, None]

    noise = white(size, random)[:DRAWS, None]

    def moments(velocity: Callable[..., torch.Tensor], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        times = np.tile(np.linspace(1, 0, steps + 1, dtype=np.float32), (len(noise), 1))
        *_, last = SAMPLERS["euler"](velocity, noise, times, lambda _k: noise)
        return last.x[:, 0].mean(0), last.x[:, 0].T.cov().reshape(size, size)

    for found, wanted in (
        (moments(velocity, 50), moments(exact, 50)),
        (moments(velocity, 200), (mean, covariance)),
    ):
        for value, reference in zip(found, wanted, strict=True):
            assert float((value - reference).norm() / reference.norm()) < 0.03
