"""The Frechet distance of features as a loss: its gradient is that of the distance itself."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_torch.evaluate.measures.frechet import frechet
from sa3_torch.train.few_steps.frechet_loss import FeatureMoments

WIDTH, COUNT = 6, 4000
ALL = torch.ones(COUNT, dtype=torch.bool)


def clouds() -> tuple[torch.Tensor, torch.Tensor]:
    """Draw real and fake features (n, D) of different means and covariances."""
    random = torch.Generator().manual_seed(0)
    draws = torch.randn(2, COUNT, WIDTH, generator=random)
    maps = torch.eye(WIDTH) + 0.4 * torch.randn(2, WIDTH, WIDTH, generator=random)
    return draws[0] @ maps[0] + 1, draws[1] @ maps[1]


def seen(real: torch.Tensor, fake: torch.Tensor) -> FeatureMoments:
    moments = FeatureMoments(WIDTH)
    moments.add(real, fake, ALL, first=True)
    return moments


def test_value_is_the_distance_relative_to_the_real_variance() -> None:
    """Measured: 0.3 % apart, by the ridge and n - 1."""
    real, fake = clouds()
    wanted = frechet(fake.numpy(), real.numpy()) / float(torch.cov(real.T).trace())
    assert float(seen(real, fake)(fake, ALL)) == pytest.approx(wanted, rel=0.01)


def test_gradient_is_that_of_the_distance() -> None:
    """Along a random direction, by central differences of the measured distance. Measured: 0.4 % apart."""
    real, fake = clouds()
    moments, moved = seen(real, fake), fake.clone().requires_grad_()
    moments(moved, ALL).backward()
    mix = 0.1 * torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    direction = fake @ mix + 0.3
    step = 1e-3
    ends = [frechet((fake + sign * step * direction).numpy(), real.numpy()) for sign in (1, -1)]
    wanted = (ends[0] - ends[1]) / (2 * step) / float(torch.cov(real.T).trace())
    assert float((moved.grad * direction).sum()) == pytest.approx(wanted, rel=0.02)


def test_equal_distributions_leave_nothing_to_learn() -> None:
    real, _ = clouds()
    fake = real.clone().requires_grad_()
    distance = seen(real, real)(fake, ALL)
    distance.backward()
    assert abs(float(distance.detach())) < 1e-9 and float(fake.grad.abs().max()) < 1e-9


def test_items_move_to_the_real_distribution() -> None:
    """Measured: from 1.1 to 0.0002."""
    real, fake = clouds()
    moments = FeatureMoments(WIDTH)
    fake = fake.requires_grad_()
    optimizer = torch.optim.SGD([fake], lr=COUNT)
    values = []
    for _ in range(60):
        moments.moments.zero_()
        moments.add(real, fake.detach(), ALL, first=True)
        distance = moments(fake, ALL)
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        values.append(float(distance.detach()))
    assert values[-1] < 0.01 * values[0]
    np.testing.assert_allclose(fake.detach().mean(0), real.mean(0), atol=0.05)


def test_before_anything_is_known_there_is_no_gradient() -> None:
    fake = clouds()[1].requires_grad_()
    distance = FeatureMoments(WIDTH)(fake, ALL)
    distance.backward()
    assert float(distance.detach()) == 0 and not bool(fake.grad.any())


def test_parts_of_a_batch_add_up_and_older_ones_fade() -> None:
    real, fake = clouds()
    whole, parts, counted = FeatureMoments(WIDTH), FeatureMoments(WIDTH), torch.arange(COUNT) % 3 > 0
    for _ in range(2):
        whole.add(real, fake, counted, first=True)
        for first, rows in ((True, slice(0, 1000)), (False, slice(1000, COUNT))):
            parts.add(real[rows], fake[rows], counted[rows], first=first)
    torch.testing.assert_close(parts.moments, whole.moments)
    assert float(whole.moments[1, -1, -1]) == pytest.approx(1.98 * float(counted.sum()))
