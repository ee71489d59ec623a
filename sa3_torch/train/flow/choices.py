"""Random choices of flow matching as pure functions: times, shift, silence, masks [T4.2] to [T4.6].

Shapes: B batch, T latent frames. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sa3_mlx.common.generation.schedule import LOGSNR_FRAMES
from sa3_mlx.common.model.config import ShiftConfig

TRUNCATION = 0.075  # lower bound of sigmoid(n) in the truncated logit-normal
MASK_KINDS = ("segments", "full", "causal", "spans")
MAX_SEGMENTS = 10
SPAN_WEIGHTS = (4.0, 2.0, 1.0, 1.0)  # of 1, 2, 3 and 4 spans
LEAST_SPANS = 0.2  # share of the frames that spans cover at least

LENGTH_SHIFT = ShiftConfig(type="full", start=0.5, end=1.15, rate=0.0)

TimeSampler = Callable[[int, torch.Generator], Tensor]


def _normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def truncated_logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times in [0, 1]: 1 - (sigmoid(n) - 0.075) / 0.925, n standard normal with sigmoid(n) >= 0.075 (4.3)."""
    low = _normal_cdf(math.log(TRUNCATION / (1 - TRUNCATION)))
    u = low + (1 - low) * torch.rand(count, generator=generator, dtype=torch.float64)
    y = torch.sigmoid(torch.special.ndtri(u.clamp(max=1 - 1e-12)))
    return (1 - (y - TRUNCATION) / (1 - TRUNCATION)).clamp(0, 1).float()


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times in [0, 1): a Sobol sequence, scrambled anew by every call, so that each batch is spread evenly."""
    seed = int(torch.randint(2**31, (1,), generator=generator))
    return torch.quasirandom.SobolEngine(1, scramble=True, seed=seed).draw(count)[:, 0]


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times: sigmoid(n), n standard normal."""
    return torch.sigmoid(torch.randn(count, generator=generator))


def log_snr_normal(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times with ln((1 - t) / t) normal of mean -1.2 and standard deviation 2."""
    return torch.sigmoid(1.2 - 2 * torch.randn(count, generator=generator))


def log_snr_uniform(count: int, generator: torch.Generator) -> Tensor:
    """(count,) times with ln((1 - t) / t) uniform in -6..5."""
    return torch.sigmoid(6 - 11 * torch.rand(count, generator=generator))


TIME_SAMPLERS: dict[str, TimeSampler] = {
    "truncated_logit_normal": truncated_logit_normal,
    "uniform": uniform,
    "logit_normal": logit_normal,
    "log_snr_normal": log_snr_normal,
    "log_snr_uniform": log_snr_uniform,
}


def shift_times(
    t: Tensor, lengths: Tensor, min_length: int, max_length: int, shift: ShiftConfig = LENGTH_SHIFT
) -> Tensor:
    """Times (B,) warped towards noise by the length (B,) of each item in frames (4.4).

    The formulas are those of the sampling schedule, with lengths of one's own. "full" is e^mu t / (1 - t + e^mu t), mu
    going from ``start`` at ``min_length`` to ``end`` at ``max_length``. "flux" has the odds themselves there, geometric
    in the length (start = end: one shift for all). "logsnr" turns t into the log-SNR end - t (end - start), start
    falling by ``rate`` per octave over 2000 frames, and leaves 0 and 1 where they are.
    """
    if shift.type == "none":
        return t
    if shift.type == "logsnr":
        start = shift.start - shift.rate * torch.log2(lengths.clamp_min(1) / LOGSNR_FRAMES)
        warped = torch.sigmoid(t * (shift.end - start) - shift.end)
        return torch.where(t <= 0, 0.0, torch.where(t >= 1, 1.0, warped))
    lengths = lengths.clamp(min_length, max_length)
    if shift.type == "full":
        share = (lengths - min_length) / (max_length - min_length)
        odds = torch.exp(shift.start + (shift.end - shift.start) * share)
    else:
        share = torch.log(lengths / min_length) / math.log(max_length / min_length)
        odds = shift.start * (shift.end / shift.start) ** share
    return odds * t / (1 - t + odds * t)


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
