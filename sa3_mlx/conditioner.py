"""Turn text states and duration into the inputs of the diffusion transformer [A5].

Shapes: B batch, S text tokens, D context width.
"""

from __future__ import annotations

import numpy as np

from sa3_mlx.common.model.config import TIMESTEP_FEATURES
from sa3_mlx.common.model.features import seconds_features
from sa3_mlx.runtime import mx, nn


class Conditioner(nn.Module):
    """Add the learned padding and the duration token [B4, B5, B6]."""

    def __init__(self, width: int, seconds_max: float) -> None:
        super().__init__()
        self.seconds_max = seconds_max
        self.padding_embedding = mx.zeros(width)
        self.seconds_embed = nn.Linear(TIMESTEP_FEATURES, width)

    def embed_prompt(self, hidden: mx.array, mask: mx.array) -> mx.array:
        """Put the learned vector at padded positions of (B, S, D), mask (B, S) bool [B4]."""
        return mx.where(mask[..., None], hidden.astype(self.padding_embedding.dtype), self.padding_embedding)

    def embed_seconds(self, seconds: np.ndarray) -> mx.array:
        """Return the duration vectors (B, D) of (B,) seconds, which saturate at 0 and ``seconds_max`` [B5]."""
        features = seconds_features(seconds, self.seconds_max)
        return self.seconds_embed(mx.array(features, dtype=self.seconds_embed.weight.dtype))

    def __call__(self, hidden: mx.array, mask: mx.array, seconds: np.ndarray) -> tuple[mx.array, mx.array]:
        """Return the context (B, S + 1, D), the duration token last, and the global vector (B, D) [B6]."""
        duration = self.embed_seconds(seconds)
        return mx.concatenate([self.embed_prompt(hidden, mask), duration[:, None]], axis=1), duration


def blend(first: mx.array, second: mx.array, share: mx.array, *, spherical: bool) -> mx.array:
    """Go from one context (B, S, D) to another by shares (B, 1, 1), 0 to 1, token by token, in fp32; 0 keeps the bits.

    ``spherical`` turns the direction at a steady pace and goes straight between the lengths; a straight line between
    vectors comes nearer to zero in the middle.
    """
    a, b = first.astype(mx.float32), second.astype(mx.float32)
    mixed = (1 - share) * a + share * b
    if spherical:
        long_a, long_b = (mx.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
        cosine = (a * b).sum(-1, keepdims=True) / mx.maximum(long_a * long_b, 1e-20)
        angle = mx.arccos(mx.clip(cosine, -1, 1))
        sine = mx.sin(angle)
        direction = mx.sin((1 - share) * angle) * a / mx.maximum(long_a, 1e-20)
        direction = (direction + mx.sin(share * angle) * b / mx.maximum(long_b, 1e-20)) / mx.maximum(sine, 1e-20)
        turns = (sine > 1e-4) & (long_a > 0) & (long_b > 0)  # else they have one line, or no direction
        mixed = mx.where(turns, direction * ((1 - share) * long_a + share * long_b), mixed)
    return mx.where(share == 0, first, mixed.astype(first.dtype))
