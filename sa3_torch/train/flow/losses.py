"""Losses of flow matching as pure functions in fp32 [T4.2].

Shapes: B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Normalize = Literal["none", "frame", "sample", "channel"]


def flow_errors(
    prediction: Tensor, target: Tensor, generate: Tensor, keep: Tensor, normalize: Normalize = "none"
) -> tuple[Tensor, Tensor]:
    """Mean squared error of each item over generated and over kept frames: (B,) twice ([T4.2], step 7).

    prediction, target (B, T, C); generate, keep (B, T) bool. An item without such frames has 0. ``normalize`` divides
    by the variance of the target: of each frame over channels, of each item over frames and channels, or of each
    channel of an item over frames. Only frames that are generated or kept count.
    """
    squares = (prediction.float() - target.float()).square()
    if normalize != "none":
        squares = squares / (_variance(target.float(), generate | keep, normalize) + 1e-6)
    error = squares.mean(-1)  # (B, T)
    generated, kept = ((error * mask).sum(1) / mask.sum(1).clamp_min(1) for mask in (generate, keep))
    return generated, kept


def _variance(x: Tensor, counted: Tensor, per: Normalize) -> Tensor:
    """(B, T, C), counted (B, T) -> (B, T, 1), (B, 1, 1) or (B, 1, C)."""
    if per == "frame":
        return x.var(2, correction=0, keepdim=True)
    weight = (counted / counted.sum(1, keepdim=True).clamp_min(1))[..., None]  # (B, T, 1), sum 1
    dims = (1,) if per == "channel" else (1, 2)
    share = weight if per == "channel" else weight / x.shape[2]
    mean = (share * x).sum(dims, keepdim=True)
    return (share * (x - mean).square()).sum(dims, keepdim=True)


def flow_loss(prediction: Tensor, target: Tensor, generate: Tensor, keep: Tensor, context_weight: float) -> Tensor:
    """Squared error per item over generated frames, plus the weighted error over kept ones [T4.2].

    prediction, target (B, T, C); generate, keep (B, T) bool. Items without such frames count as 0.
    """
    generated, kept = flow_errors(prediction, target, generate, keep)
    return generated.mean() + context_weight * kept.mean()
