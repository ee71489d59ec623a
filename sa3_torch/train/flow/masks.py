"""Frames of a batch: which are real, silence after a clip included, and which are kept as context [T4.2], [T4.6].

Shapes: B batch, T latent frames.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

MASK_KINDS = ("segments", "full", "causal", "spans")
MAX_SEGMENTS = 10
SPAN_WEIGHTS = (4.0, 2.0, 1.0, 1.0)  # of 1, 2, 3 and 4 spans
LEAST_SPANS = 0.2  # share of the frames that spans cover at least


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
    """Count up to Exp(mean) frames of silence behind every clip as valid: (B, T) bool -> (B, T) bool (4.2, step 3)."""
    if mean_frames == 0:
        return valid
    extra = torch.empty(len(valid)).exponential_(1 / mean_frames, generator=generator).floor()
    return torch.arange(valid.shape[1])[None] < (valid.sum(1) + extra)[:, None]


def mask_kinds(count: int, shares: tuple[float, ...], generator: torch.Generator) -> Tensor:
    """(count,) indices of MASK_KINDS, drawn by their shares; kinds behind the last share are not drawn."""
    return torch.multinomial(torch.tensor(shares), count, replacement=True, generator=generator)


def inpaint_masks(valid: Tensor, kinds: Tensor, generator: torch.Generator) -> Tensor:
    """Masks of frames to keep, (B, T) bool, never on padding and always with a frame left to generate (4.6).

    ``kinds`` (B,) indices of MASK_KINDS: segments (1..10 gaps that may overlap), full (keep nothing), causal (keep a
    random prefix of 0..valid - 1 frames), spans (1..4 gaps that do not touch and cover a share of 0.2..1).
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
        elif MASK_KINDS[kind] == "spans":
            keep[row, :length] = _spans(length, generator)
    return keep


def _spans(length: int, generator: torch.Generator) -> Tensor:
    """(length,) bool: round(length U(0.2, 1)) frames, at least one, in 1 to 4 spans are False."""
    share = LEAST_SPANS + (1 - LEAST_SPANS) * float(torch.rand((), generator=generator))
    covered = max(1, round(share * length))
    count = 1 + int(torch.multinomial(torch.tensor(SPAN_WEIGHTS), 1, generator=generator))
    count = min(count, covered, length - covered + 1)
    spans = _pieces(covered, count, generator)
    free = length - covered - (count - 1)  # one frame between neighbours, the others anywhere
    gaps = [piece - 1 for piece in _pieces(free + count + 1, count + 1, generator)]
    keep, at = torch.ones(length, dtype=torch.bool), 0
    for gap, span in zip(gaps, spans, strict=False):
        keep[at + gap : at + gap + span] = False
        at += gap + span + 1
    return keep


def _pieces(total: int, count: int, generator: torch.Generator) -> list[int]:
    """``count`` lengths of at least 1 whose sum is ``total``; every such list is equally likely."""
    cuts = torch.randperm(total - 1, generator=generator)[: count - 1].sort().values + 1
    edges = [0, *cuts.tolist(), total]
    return [b - a for a, b in itertools.pairwise(edges)]


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """Uniform in low..high, both included."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))
