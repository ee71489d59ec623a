"""Frames of a batch: which are real, silence after a clip included, and which are kept as context [T4.2], [T4.6].

Shapes: B batch, T latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK_KINDS = ("segments", "full", "causal")
MAX_SEGMENTS = 10


@dataclass(frozen=True)
class Masks:
    """Hold the masks of a batch, (B, T) bool each: ``valid`` frames are real, those to ``keep`` are given as context.

    ``kinds`` (B,) are indices of MASK_KINDS, where masks were drawn.
    """

    valid: Tensor
    keep: Tensor
    kinds: Tensor | None = None

    @classmethod
    def nothing_kept(cls, valid: Tensor) -> Masks:
        return cls(valid, torch.zeros_like(valid))

    @property
    def generated(self) -> Tensor:
        return self.valid & ~self.keep

    @property
    def kept(self) -> Tensor:
        return self.valid & self.keep

    def __getitem__(self, rows: slice) -> Masks:
        return Masks(self.valid[rows], self.keep[rows], None if self.kinds is None else self.kinds[rows])

    def to(self, device: torch.device) -> Masks:
        return Masks(self.valid.to(device), self.keep.to(device), self.kinds)


def extend_valid(valid: Tensor, mean_frames: float, generator: torch.Generator) -> Tensor:
    """Count floor(Exp(mean)) frames of silence after every clip as valid: (B, T) bool -> (B, T) bool [T4.2]."""
    if mean_frames == 0:
        return valid
    extra = torch.empty(len(valid)).exponential_(1 / mean_frames, generator=generator).floor()
    return torch.arange(valid.shape[1])[None] < (valid.sum(1) + extra)[:, None]


def mask_kinds(count: int, shares: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """Draw (count,) indices of MASK_KINDS by their shares."""
    return torch.multinomial(torch.tensor(shares), count, replacement=True, generator=generator)


def inpaint_masks(valid: Tensor, kinds: Tensor, generator: torch.Generator) -> Tensor:
    """Draw masks of frames to keep, (B, T) bool, never on padding and always with a frame left to generate [T4.6].

    ``kinds`` (B,) are indices of MASK_KINDS: segments (1..10 gaps that may overlap), full (keep nothing), causal (keep
    a random prefix of 0..valid - 1 frames).
    """
    keep = torch.zeros_like(valid)
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
    """Draw a number from low..high, both included."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))
