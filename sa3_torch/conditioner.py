"""Turn text states and duration into the inputs of the diffusion transformer [A5].

Shapes: B batch, S text tokens, D context width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sa3_mlx.common.model.config import TIMESTEP_FEATURES
from sa3_mlx.common.model.features import seconds_features

from .cuda.transfer import upload


class Conditioner(nn.Module):
    """Add the learned padding and the duration token [B4, B5, B6]."""

    def __init__(self, width: int, seconds_max: float) -> None:
        super().__init__()
        self.seconds_max = seconds_max
        self.padding_embedding = nn.Parameter(torch.zeros(width))
        self.seconds_embed = nn.Linear(TIMESTEP_FEATURES, width)

    def embed_prompt(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Put the learned vector at padded positions of (B, S, D), mask (B, S) bool [B4]."""
        return torch.where(mask[..., None], hidden.to(self.padding_embedding.dtype), self.padding_embedding)

    def embed_seconds(self, seconds: np.ndarray) -> Tensor:
        """Return the duration vectors (B, D) of (B,) seconds, which saturate at 0 and ``seconds_max`` [B5]."""
        features = upload(seconds_features(seconds, self.seconds_max), self.seconds_embed.weight.device)
        return self.seconds_embed(features.to(self.seconds_embed.weight.dtype))

    def forward(self, hidden: Tensor, mask: Tensor, seconds: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the context (B, S + 1, D), the duration token last, and the global vector (B, D) [B6]."""
        duration = self.embed_seconds(seconds)
        return torch.cat([self.embed_prompt(hidden, mask), duration[:, None]], dim=1), duration


def blend(first: Tensor, second: Tensor, share: Tensor, *, spherical: bool) -> Tensor:
    """Go from one context (B, S, D) to another by shares (B, 1, 1), 0 to 1, token by token, in fp32; 0 keeps the bits.

    ``spherical`` turns the direction at a steady pace and goes straight between the lengths; a straight line between
    vectors comes nearer to zero in the middle.
    """
    a, b = first.float(), second.float()
    mixed = (1 - share) * a + share * b
    if spherical:
        long_a, long_b = (x.norm(dim=-1, keepdim=True) for x in (a, b))
        cosine = (a * b).sum(-1, keepdim=True) / (long_a * long_b).clamp(min=1e-20)
        angle = cosine.clamp(-1, 1).arccos()
        sine = angle.sin()
        direction = ((1 - share) * angle).sin() * a / long_a.clamp(min=1e-20)
        direction = (direction + (share * angle).sin() * b / long_b.clamp(min=1e-20)) / sine.clamp(min=1e-20)
        turns = (sine > 1e-4) & (long_a > 0) & (long_b > 0)  # else they have one line, or no direction
        mixed = torch.where(turns, direction * ((1 - share) * long_a + share * long_b), mixed)
    return torch.where(share == 0, first, mixed.to(first.dtype))
