"""Heads of the latent discriminator: shapes, masks, and that padding changes nothing [T7.1] and [T7.5]."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.few_steps.heads import Head, HeadConfig, MaskedGroupNorm

WIDTH_IN = 12
CONFIGS = {
    "default": HeadConfig(layers=4, width=32, groups=32, kernel=4),
    "tiny": HeadConfig(layers=2, width=8, groups=4, kernel=3),
}
STRIDES = {"default": 16, "tiny": 4}


def head_of(name: str) -> Head:
    torch.manual_seed(1)
    return Head(CONFIGS[name], WIDTH_IN)


def prefix(lengths: list[int], frames: int) -> torch.Tensor:
    return torch.arange(frames)[None] < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("name", CONFIGS)
def test_n_frames_give_ceil_n_over_stride_scores(name: str) -> None:
    lengths, frames = [1, 23, 64, 65], 72
    scores, mask = head_of(name)(torch.randn(4, frames, WIDTH_IN), prefix(lengths, frames))
    assert scores.shape == mask.shape and scores.dtype == torch.float32
    assert mask.sum(1).tolist() == [-(-length // STRIDES[name]) for length in lengths]


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_do_not_depend_on_the_padding(name: str) -> None:
    """Pitfall 11: neither on its length nor on what stands in it. Measured: 0."""
    head, lengths = head_of(name), [23, 40]
    x = torch.randn(2, 48, WIDTH_IN)
    scores, mask = head(x, prefix(lengths, 48))
    longer = torch.cat([x, torch.full((2, 31, WIDTH_IN), 7.0)], dim=1)
    longer[0, 23:], longer[1, 40:] = -3.0, 5.0
    others, other_mask = head(longer, prefix(lengths, 79))
    for row in range(2):
        assert torch.allclose(scores[row][mask[row]], others[row][other_mask[row]], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_gradient_reaches_padding(name: str) -> None:
    x = torch.randn(2, 48, WIDTH_IN, requires_grad=True)
    valid = prefix([23, 40], 48)
    scores, mask = head_of(name)(x, valid)
    scores[mask].square().sum().backward()
    assert bool((x.grad[~valid] == 0).all()) and bool((x.grad[valid] != 0).any())


def test_group_norm_of_whole_items_is_the_usual_one() -> None:
    torch.manual_seed(2)
    ours, usual = MaskedGroupNorm(4, 8), torch.nn.GroupNorm(4, 8)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), usual.parameters(), strict=True):
            a.copy_(torch.randn(8))
            b.copy_(a)
    x = 3 + 2 * torch.randn(2, 8, 11)
    torch.testing.assert_close(ours(x, torch.ones(2, 11, dtype=torch.bool)), usual(x))


def test_heads_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"head\.width is 10: expected a multiple of its 4 groups"):
        HeadConfig(layers=1, width=10, groups=4, kernel=3)
    with pytest.raises(ConfigError, match="layers is 0"):
        HeadConfig(layers=0, width=8, groups=4, kernel=3)
