"""Losses of flow matching as pure functions in fp32 [T4.2].

Shapes: B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

from torch import Tensor


def flow_errors(prediction: Tensor, target: Tensor, generate: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean squared error of each item over generated and over kept frames: (B,) twice ([T4.2], step 7).

    prediction, target (B, T, C); generate, keep (B, T) bool. An item without such frames has 0.
    """
    error = (prediction.float() - target.float()).square().mean(-1)  # (B, T)
    generated, kept = ((error * mask).sum(1) / mask.sum(1).clamp_min(1) for mask in (generate, keep))
    return generated, kept


def flow_loss(prediction: Tensor, target: Tensor, generate: Tensor, keep: Tensor, context_weight: float) -> Tensor:
    """Return the squared error per item over generated frames, plus the weighted one over kept frames [T4.2].

    prediction, target (B, T, C); generate, keep (B, T) bool. Items without such frames count as 0.
    """
    generated, kept = flow_errors(prediction, target, generate, keep)
    return generated.mean() + context_weight * kept.mean()
