"""Random choices of flow matching: distributions, shift, masks (training spec 4.3, 4.4, 4.6, 4.9)."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

from sa3_torch.train.flow import extend_valid, inpaint_masks, shift_times, truncated_logit_normal  # noqa: E402

CLOSED_FORM = {0.1: 0.0113, 0.25: 0.1155, 0.5: 0.4429, 0.75: 0.7980, 0.9: 0.9513}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_truncated_logit_normal_follows_its_closed_form() -> None:
    t = truncated_logit_normal(200_000, generator())
    assert float(t.min()) >= 0 and float(t.max()) <= 1
    for tau, share in CLOSED_FORM.items():
        assert float((t <= tau).float().mean()) == pytest.approx(share, abs=0.004)


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


def test_masks_have_the_asked_shares_and_leave_something_to_generate() -> None:
    lengths = torch.randint(1, 25, (4000,), generator=generator(3))
    valid = torch.arange(24)[None] < lengths[:, None]
    keep = inpaint_masks(valid, (0.1, 0.8, 0.1), generator())
    assert not (keep & ~valid).any()
    assert ((valid & ~keep).sum(1) >= 1).all()  # upstream's causal mask may leave none
    assert float((keep.sum(1) == 0).float().mean()) == pytest.approx(0.83, abs=0.04)  # full, and short other kinds


def test_full_masks_keep_nothing_and_causal_masks_keep_a_prefix() -> None:
    valid = torch.ones(50, 16, dtype=torch.bool)
    assert not inpaint_masks(valid, (0.0, 1.0, 0.0), generator()).any()
    causal = inpaint_masks(valid, (0.0, 0.0, 1.0), generator())
    assert (causal.int().diff(dim=1) <= 0).all() and causal.any()


def test_extension_only_adds_frames_at_the_end() -> None:
    valid = torch.arange(40)[None] < torch.tensor([5, 20, 40])[:, None]
    longer = extend_valid(valid, 8.0, generator())
    assert (longer | ~valid).all() and (longer.int().diff(dim=1) <= 0).all()
    added = extend_valid(torch.arange(4000)[None].expand(3000, -1) < 1, 8.0, generator()).sum(1).float() - 1
    assert float(added.mean()) == pytest.approx(7.5, abs=0.5)  # floor of an exponential of mean 8
