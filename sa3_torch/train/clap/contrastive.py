"""Contrastive losses and retrieval measures of sounds and texts, in fp32 [T6].

Shapes: B pairs, E size of the vectors; Q queries, N candidates. All vectors are of unit length.
"""

from __future__ import annotations

import torch
from torch import Tensor

AT = (1, 5, 10)  # of recall; average precision is that at the last one


def info_nce(audio: Tensor, text: Tensor, scale: Tensor, positives: Tensor) -> Tensor:
    """Symmetric InfoNCE with several positives: -ln of their share of the softmax, averaged over both directions.

    audio, text (B, E); scale (1,); positives (B, B) bool, true on the diagonal and where captions are equal.
    """
    logits = scale * (audio @ text.T)

    def direction(logits: Tensor, positives: Tensor) -> Tensor:
        right = logits.masked_fill(~positives, -torch.inf)
        return (logits.logsumexp(1) - right.logsumexp(1)).mean()

    return (direction(logits, positives) + direction(logits.T, positives.T)) / 2


def alignment(audio: Tensor, text: Tensor) -> Tensor:
    """Mean of 1 - cosine over pairs: (B, E) each -> scalar."""
    return (1 - (audio * text).sum(1)).mean()


def uniformity(x: Tensor, y: Tensor, negatives: Tensor) -> Tensor:
    """ln of the mean of exp(-2 |x_i - y_j|^2) over the pairs that ``negatives`` (B, B) marks; 0 where it marks none."""
    kernel = torch.exp(4 * (x @ y.T - 1))  # |x - y|^2 = 2 - 2 x.y
    count = negatives.sum()
    return torch.log((kernel * negatives).sum() / count.clamp_min(1) + (count == 0))


def retrieval(similarity: Tensor, relevant: Tensor) -> dict[str, float]:
    """Recall at 1, 5, 10 ("r1": a relevant candidate is among the first) and mean average precision at 10 ("map10").

    similarity (Q, N), relevant (Q, N) bool with at least one candidate per query.
    """
    best = similarity.argsort(dim=1, descending=True, stable=True)[:, : AT[-1]]
    hits = relevant.gather(1, best).double()  # (Q, 10)
    measures = {f"r{k}": float(hits[:, :k].amax(1).mean()) for k in AT}
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1, device=hits.device)
    average = (precision * hits).sum(1) / relevant.sum(1).clamp(1, AT[-1])
    return measures | {f"map{AT[-1]}": float(average.mean())}
