"""Losses of adversarial post-training [T7.2] and [T7.6]."""

from __future__ import annotations

import math
from collections import Counter

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_torch.train.few_steps.arc_losses import (
    finite_difference,
    geodesic,
    masked_mean,
    mean_of_usable,
    other_prompts,
    relativistic,
)
from sa3_torch.train.flow.path import interpolate


def test_masked_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 100.0], [4.0, math.nan, math.inf]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert masked_mean(values, mask).tolist() == [1.5, 4.0]


def test_relativistic_loss_is_ln_2_where_scores_are_equal_and_falls_with_the_gap() -> None:
    scores, mask = torch.zeros(1, 2), torch.tensor([[True, True]])
    assert float(relativistic(scores, scores, mask)) == pytest.approx(math.log(2))
    assert float(relativistic(scores + 3, scores, mask)) == pytest.approx(math.log1p(math.exp(-3)))
    assert float(relativistic(scores, scores + 3, mask)) == pytest.approx(math.log1p(math.exp(3)))


def test_prompts_are_never_equal_while_that_is_possible() -> None:
    """Pitfall 2: a permutation, so the last item gets no prompt that was replaced before."""
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        count = int(torch.randint(2, 12, (1,), generator=random))
        captions = [f"{int(torch.randint(4, (1,), generator=random))}" for _ in range(count)]
        order, usable = other_prompts(captions, random)
        assert sorted(order.tolist()) == list(range(count))
        assert usable.tolist() == [captions[i] != captions[j] for i, j in enumerate(order.tolist())]
        largest = max(Counter(captions).values())
        assert int(usable.sum()) == min(count, 2 * (count - largest))  # the most there can be


def test_prompts_are_drawn_anew() -> None:
    captions = [str(i) for i in range(8)]
    orders = {tuple(other_prompts(captions, torch.Generator().manual_seed(seed))[0].tolist()) for seed in range(20)}
    assert len(orders) > 15


def test_items_without_another_prompt_count_for_nothing() -> None:
    """Pitfall 3."""
    losses = torch.tensor([1.0, 5.0, 3.0], requires_grad=True)
    nobody = mean_of_usable(losses, torch.tensor([False] * 3), 0, 1)
    nobody.backward()
    assert float(nobody) == 0 and not losses.grad.any()
    assert float(mean_of_usable(losses, torch.tensor([True, False, True]), 2, 1)) == 2


def test_usable_items_count_alike_in_unequal_parts() -> None:
    losses, usable = torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([True, True, True, False])
    parts = [mean_of_usable(losses[rows], usable[rows], 3, 2) for rows in (slice(0, 2), slice(2, 4))]
    assert float(sum(parts) / 2) == pytest.approx(3.0)


def test_finite_differences_measure_the_slope() -> None:
    """100 * 0.01^2 |w|^2 for D(x) = w x, the mean over many steps eta."""
    random = torch.Generator().manual_seed(0)
    w, x, eta = (torch.randn(shape, generator=random) for shape in ((30,), (30,), (5000, 30)))
    scores = (x @ w).expand(5000, 1)
    moved = ((x + 0.01 * eta) @ w)[:, None]
    penalty = 100 * float(finite_difference(scores, moved, torch.ones(5000, 1, dtype=torch.bool)).mean())
    assert penalty == pytest.approx(100 * 0.01**2 * float(w.square().sum()), rel=0.05)


def test_geodesic_distance() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    distance = geodesic(a, u)
    assert distance.tolist() == pytest.approx([0.0, math.pi**2 / 8, math.pi**2 / 2], abs=1e-2)
    assert float(distance[0]) < 1e-11
    distance.sum().backward()
    assert bool(a.grad.isfinite().all())
    near = torch.tensor([[-0.9999, 1e-2]], requires_grad=True)
    geodesic(near, a[:1].detach()).sum().backward()
    assert bool(near.grad.isfinite().all()) and bool((near.grad != 0).any())


def test_interpolation_by_hand() -> None:
    z, noise = torch.full((2, 3, 1), 4.0), torch.zeros(2, 3, 1)
    assert interpolate(z, noise, torch.tensor([0.25, 1.0]))[:, 0, 0].tolist() == [3.0, 0.0]
