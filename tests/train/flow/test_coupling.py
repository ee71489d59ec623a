"""Minibatch optimal transport between latents and noise [T4.5], [T4.9]."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_torch.train.flow.coupling import assign, transport_cost


def batch(seed: int, items: int = 64, frames: int = 12, channels: int = 16) -> tuple[torch.Tensor, ...]:
    """Latents with classes of their own means, noise, and lengths of 3 to 12 frames."""
    random = torch.Generator().manual_seed(seed)
    z, noise = torch.randn(2, items, frames, channels, generator=random)
    z += torch.randn(8, 1, channels, generator=random).repeat(items // 8, 1, 1)
    lengths = torch.randint(3, frames + 1, (items,), generator=random)
    return z, noise, torch.arange(frames)[None] < lengths[:, None]


def total(cost: torch.Tensor, valid: torch.Tensor, order: torch.Tensor) -> float:
    return float((cost.gather(1, order[:, None])[:, 0] * valid.sum(1)).sum())


def test_cost_is_the_mean_square_over_valid_frames() -> None:
    z, noise, valid = batch(0, items=8)
    cost = transport_cost(z, noise, valid)
    for i, j in ((0, 0), (2, 5), (7, 1)):
        assert float(cost[i, j]) == pytest.approx(float((z[i] - noise[j])[valid[i]].square().mean()), rel=1e-5)
    z[~valid] = 1e3
    torch.testing.assert_close(transport_cost(z, noise, valid), cost)


@pytest.mark.parametrize("seed", range(3))
def test_couplings_are_permutations_that_shorten_the_way(seed: int) -> None:
    """Sinkhorn with greedy rounding is between the exact one and 1.02 times that. Measured: up to 1.006."""
    z, noise, valid = batch(seed)
    cost = transport_cost(z, noise, valid)
    same = torch.arange(len(z))
    exact, sinkhorn = (assign(cost, valid, kind) for kind in ("exact", "sinkhorn"))
    assert torch.equal(exact.sort().values, same) and torch.equal(sinkhorn.sort().values, same)
    assert total(cost, valid, exact) < 0.97 * total(cost, valid, same)
    assert total(cost, valid, exact) <= total(cost, valid, sinkhorn) <= 1.02 * total(cost, valid, exact)


def test_coupling_leaves_equal_noise_alone_in_cost() -> None:
    z, noise, valid = batch(1, items=16)
    cost = transport_cost(z, noise[:1].expand_as(noise), valid)
    for kind in ("exact", "sinkhorn"):
        assert total(cost, valid, assign(cost, valid, kind)) == pytest.approx(total(cost, valid, torch.arange(16)))
