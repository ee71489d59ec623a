"""Frechet distance of a generator's features to those of data, as a loss of single items.

For normal distributions with means m and covariances S, fake (f) and real (r), the distance has the gradient
2 (m_f - m_r) by the mean and I - A by the covariance, A = S_r^1/2 (S_r^1/2 S_f S_r^1/2)^-1/2 S_r^1/2. So a feature x of
one item costs u(x) = 2 (m_f - m_r).x + (x - m_f)'(I - A)(x - m_f), with the moments held: its gradient over many items
is that of the distance, and no batch need be large enough for a covariance. The moments are running ones, of the
same prompts on both sides.

Shapes: B batch, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sa3_torch.train.run.parallel import total

DECAY = 0.98  # of the moments in an update: of 16 items each, some 800 count
RIDGE = 1e-3  # part of the mean real variance that is added to all variances


class FeatureMoments(nn.Module):
    """Keep running moments of real and fake features, in buffers, so that checkpoints have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        zeros = torch.zeros(2, width + 1, width + 1, dtype=torch.float64)
        self.register_buffer("moments", zeros)  # of features with a 1 after them: [[second, first], [first, mass]]
        self.moments: Tensor

    @torch.no_grad()
    def add(self, real: Tensor, fake: Tensor, counted: Tensor, *, first: bool) -> None:
        """Take in features (B, D) of a slice of the batch, of the items that are ``counted`` (B,) bool.

        ``first``: of the slices of a step that a process computes; the moments then fade by DECAY.
        """
        rows = nn.functional.pad(torch.stack([real, fake]).double(), (0, 1), value=1.0)
        new = torch.einsum("sbi,b,sbj->sij", rows, counted.double(), rows)
        self.moments.mul_(DECAY if first else 1.0).add_(total(new))

    def forward(self, features: Tensor, counted: Tensor) -> Tensor:
        """Return the distance relative to the real variance, with its gradient by ``features`` (B, D) of items that are
        ``counted`` (B,) bool. Before anything was taken in it is 0 without a gradient."""
        with torch.no_grad():
            real, fake = (_gaussian(moments) for moments in self.moments)
            variance = real[1].trace()
            ridge = RIDGE * variance.clamp_min(1e-12) / len(real[0])
            eye = torch.eye(len(real[0]), dtype=torch.float64, device=features.device)
            root = _power(real[1] + ridge * eye, 0.5, ridge)
            shared = root @ (fake[1] + ridge * eye) @ root
            transport = root @ _power(shared, -0.5, ridge.square()) @ root  # A
            shift = fake[0] - real[0]
            trace = real[1].trace() + fake[1].trace() + 2 * len(shift) * ridge
            distance = shift.square().sum() + trace - 2 * _power(shared, 0.5, ridge.square()).trace()
            scale = 1 / variance.clamp_min(1e-12)
        centred = features.double() - fake[0]
        costs = 2 * centred @ shift + (centred @ (eye - transport) * centred).sum(1)
        mean = torch.where(counted, costs, 0.0).mean()
        return (scale * (distance + mean - mean.detach())).float()


def _gaussian(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and covariance (D, D); zeros where nothing was taken in."""
    mean = moments[-1, :-1] / moments[-1, -1].clamp_min(1e-12)
    return mean, moments[:-1, :-1] / moments[-1, -1].clamp_min(1e-12) - torch.outer(mean, mean)


def _power(matrix: Tensor, power: float, least: Tensor) -> Tensor:
    """Raise a symmetric matrix to a power, with its eigenvalues of at least ``least``."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(least) ** power) @ vectors.T
