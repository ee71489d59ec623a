"""Frames of a batch: which are real, silence after a clip included, and which are kept as context [T4.2], [T4.6].

Shapes: B batch, T latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MASK_KINDS = ("segments", "full", "causal")
MAX_SEGMENTS = 10
MASK_NUMBERS = 4 + 2 * MAX_SEGMENTS  # uniform ones, that the masks of an item are made of


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
        return Masks(self.valid.to(device, non_blocking=True), self.keep.to(device, non_blocking=True), self.kinds)


def draw_masks(valid: Tensor, mean_frames: float, shares: tuple[float, ...], u: Tensor) -> Masks:
    """Extend clips by silence and draw the frames to keep, by uniform numbers u (B, MASK_NUMBERS) float64."""
    longer, kinds = extend_valid(valid, mean_frames, u[:, 0]), mask_kinds(shares, u[:, 1])
    return Masks(longer, inpaint_masks(longer, kinds, u[:, 2:]), kinds)


def extend_valid(valid: Tensor, mean_frames: float, u: Tensor) -> Tensor:
    """Count floor(Exp(mean)) frames of silence after every clip as valid: (B, T) bool, u (B,) -> (B, T) bool [T4.2]."""
    if mean_frames == 0:
        return valid
    extra = (-mean_frames * torch.log1p(-u)).floor()
    return torch.arange(valid.shape[1])[None] < (valid.sum(1) + extra)[:, None]


def mask_kinds(shares: tuple[float, ...], u: Tensor) -> Tensor:
    """Return indices of MASK_KINDS by their shares: u (B,) -> (B,)."""
    ends = torch.tensor(shares, dtype=u.dtype).cumsum(0)
    return torch.searchsorted(ends, u * ends[-1], right=True).clamp_max(len(shares) - 1)


def inpaint_masks(valid: Tensor, kinds: Tensor, u: Tensor) -> Tensor:
    """Draw masks of frames to keep, (B, T) bool, never on padding and always with a frame left to generate [T4.6].

    ``kinds`` (B,) are indices of MASK_KINDS: segments (1..10 gaps that may overlap), full (keep nothing), causal (keep
    a random prefix of 0..valid - 1 frames). u (B, 2 + 2 MAX_SEGMENTS).
    """
    length, frame = valid.sum(1), torch.arange(valid.shape[1])[None]
    prefix = frame < _integer(u[:, 0], length)[:, None]
    count = (1 + _integer(u[:, 1], torch.tensor(MAX_SEGMENTS))).minimum(length)
    kept = valid.clone()
    for number in range(MAX_SEGMENTS):
        size = 1 + _integer(u[:, 2 + 2 * number], length // count)
        start = _integer(u[:, 3 + 2 * number], length - size + 1)
        gap = (frame >= start[:, None]) & (frame < (start + size)[:, None])
        kept &= ~(gap & (number < count)[:, None])
    causal, segments = (kinds[:, None] == MASK_KINDS.index(kind) for kind in ("causal", "segments"))
    return (causal & prefix) | (segments & kept)


def _integer(u: Tensor, below: Tensor) -> Tensor:
    """Return numbers of 0..below - 1 for uniform ones."""
    return (u * below).long()
