"""Compute contrastive losses and retrieval measures of sounds and texts, in fp32 [T6].

Shapes: B pairs, E size of the vectors; Q queries, N candidates. All vectors are of unit length.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor

AT = (1, 5, 10)  # of recall; average precision is that at the last one


def draw_times(count: int, noisy_share: float, random: torch.Generator) -> Tensor:
    """Draw noise levels (count,): scrambled Sobol numbers in [0, 1), which spread evenly, for a share of the items.

    The share is rounded down; its items are chosen at random, the others get 0.
    """
    noisy = int(count * noisy_share)
    t = torch.zeros(count)
    if noisy:
        sobol = torch.quasirandom.SobolEngine(1, scramble=True, seed=int(torch.randint(2**31, (), generator=random)))
        t[torch.randperm(count, generator=random)[:noisy]] = sobol.draw(noisy)[:, 0]
    return t


def equal_pairs(names: Tensor, texts: Tensor) -> Tensor:
    """Return which pairs belong together: (B, B) bool, true where the canonical captions or the drawn texts are equal.

    names, texts (B,): the same number for the same one, see ``numbered``.
    """
    return (names[:, None] == names[None]) | (texts[:, None] == texts[None])


def numbered(values: Iterable[Hashable]) -> Tensor:
    """Return a number for each value, the same for equal ones: (B,) int64."""
    known: dict[Hashable, int] = {}
    return torch.tensor([known.setdefault(value, len(known)) for value in values])


def info_nce(audio: Tensor, text: Tensor, scale: Tensor, positives: Tensor) -> Tensor:
    """Return symmetric InfoNCE with several positives: -ln of their share of the softmax, averaged over both
    directions.

    audio, text (B, E); scale (1,); positives (B, B) bool, true on the diagonal and where captions are equal.
    """
    logits = scale * (audio @ text.T)

    def direction(logits: Tensor, positives: Tensor) -> Tensor:
        right = logits.masked_fill(~positives, -torch.inf)
        return (logits.logsumexp(1) - right.logsumexp(1)).mean()

    return (direction(logits, positives) + direction(logits.T, positives.T)) / 2


def alignment(audio: Tensor, text: Tensor) -> Tensor:
    """Return the mean of 1 - cosine over pairs: (B, E) each -> scalar."""
    return (1 - (audio * text).sum(1)).mean()


def uniformity(x: Tensor, y: Tensor, negatives: Tensor) -> Tensor:
    """Return ln of the mean of exp(-2 |x_i - y_j|^2) over the pairs that ``negatives`` (B, B) marks; 0 where it marks
    none."""
    kernel = torch.exp(4 * (x @ y.T - 1))  # |x - y|^2 = 2 - 2 x.y
    count = negatives.sum()
    return torch.log((kernel * negatives).sum() / count.clamp_min(1) + (count == 0))


def retrieval(similarity: Tensor, relevant: Tensor) -> dict[str, float]:
    """Return recall at 1, 5, 10 ("r1": a relevant candidate is among the first) and mean average precision at 10
    ("map10").

    similarity (Q, N), relevant (Q, N) bool with at least one candidate per query.
    """
    best = similarity.argsort(dim=1, descending=True, stable=True)[:, : AT[-1]]
    hits = relevant.gather(1, best).double()  # (Q, 10)
    measures = {f"r{k}": float(hits[:, :k].amax(1).mean()) for k in AT}
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)
    average = (precision * hits).sum(1) / relevant.sum(1).clamp(1, AT[-1])
    return measures | {f"map{AT[-1]}": float(average.mean())}
