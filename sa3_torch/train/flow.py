"""Random choices of flow matching as pure functions: times, shift, inpainting masks (training spec, 4.3 to 4.6).

Shapes: B batch, T latent frames. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRUNCATION = 0.075  # lower bound of sigmoid(n) in the truncated logit-normal
MASK_KINDS = ("segments", "full", "causal")
MAX_SEGMENTS = 10


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def truncated_logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times in [0, 1]: 1 - (sigmoid(n) - 0.075) / 0.925, n standard normal with sigmoid(n) >= 0.075 (4.3)."""
    low = _normal_cdf(math.log(TRUNCATION / (1 - TRUNCATION)))
    u = low + (1 - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    y = torch.sigmoid(torch.special.ndtri(u.clamp(max=1 - 1e-12)))
    return (1 - (y - TRUNCATION) / (1 - TRUNCATION)).clamp(0, 1).float()


def shift_times(t: Tensor, lengths: Tensor, min_length: int, max_length: int) -> Tensor:
    """e^mu t / (1 - t + e^mu t), mu from 0.5 at ``min_length`` to 1.15 at ``max_length`` frames (4.4)."""
    share = (lengths.clamp(min_length, max_length) - min_length) / (max_length - min_length)
    odds = torch.exp(0.5 + 0.65 * share)
    return odds * t / (1 - t + odds * t)


def extend_valid(valid: Tensor, mean_frames: float, generator: torch.Generator) -> Tensor:
    """Count up to Exp(mean) frames of silence behind every clip as valid: (B, T) bool -> (B, T) bool (4.2, step 3)."""
    if mean_frames == 0:
        return valid
    extra = torch.empty(len(valid)).exponential_(1 / mean_frames, generator=generator).floor()
    return torch.arange(valid.shape[1])[None] < (valid.sum(1) + extra)[:, None]


def inpaint_masks(valid: Tensor, shares: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """Masks of frames to keep, (B, T) bool, never on padding and always with a frame left to generate (4.6).

    ``shares`` are the probabilities of MASK_KINDS: segments (1..10 gaps that may overlap), full (keep nothing), causal
    (keep a random prefix of 0..valid - 1 frames).
    """
    keep = torch.zeros_like(valid)
    kinds = torch.multinomial(torch.tensor(shares), len(valid), replacement=True, generator=generator)
    for row, kind in enumerate(kinds.tolist()):
        length = int(valid[row].sum())
        if MASK_KINDS[kind] == "causal":
            keep[row, : _integer(0, length - 1, generator)] = True
        elif MASK_KINDS[kind] == "segments":
            keep[row, :length] = True
            count = min(_integer(1, MAX_SEGMENTS, generator), length)
            for _ in range(count):
                size = _integer(1, length // count, generator)
                start = _integer(0, length - size, generator)
                keep[row, start : start + size] = False
    return keep


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """Uniform in low..high, both included."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))
