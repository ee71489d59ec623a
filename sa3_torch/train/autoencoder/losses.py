"""Compute short losses and statistics as pure functions in fp32 [T1.4]; the spectral loss is in spectral.py.

Shapes: B batch, L audio samples, T latent frames, C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SILENCE = 1e-6  # mean energy below which a signal counts as silent, about -60 dBFS


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Hold two sounds (B, L, 2) that are compared, with the weight of their spectral and adversarial terms."""

    name: str  # of the spectral term
    weight: float  # of it
    share: float  # of the adversarial terms
    reference: Tensor
    prediction: Tensor


def waveform_loss(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return the squared error of every item relative to its energy, averaged: (B, L, channels) each -> scalar."""
    error = (prediction - reference).square().mean((1, 2))
    return (error / (reference.square().mean((1, 2)) + 1e-4)).mean()


def silence_loss(prediction: Tensor, reference: Tensor) -> Tensor:
    """Return ln(1 + energy / 1e-6) of the prediction where the reference is silent, (B, L, 2) each -> scalar [T1.4.1].

    It looks at left, right, mid and side of every item and is the mean over all of them: 0 for audible ones, which the
    spectral terms hold.
    """
    made, wanted = (_energies(x) for x in (prediction, reference))
    return ((made / SILENCE).log1p() * (wanted <= SILENCE)).mean()


def _energies(audio: Tensor) -> Tensor:
    """Return the mean square of left, right, mid and side: (B, L, 2) -> (B, 4)."""
    left, right = audio.unbind(-1)
    return torch.stack([left, right, left + right, left - right], dim=1).square().mean(-1)


def soft_norm_loss(z: Tensor) -> Tensor:
    """Return the divergence of the moments of (B, T, C) latents from a standard normal [T1.4.2].

    var + 1e-4 stands in place of a clamp, so that constant latents still get a gradient [T13.1].
    """

    def divergence(dim: int) -> Tensor:
        variance = z.var(dim) + 1e-4
        return (z.mean(dim).square() + variance - variance.log() - 1).mean()

    return divergence(1) + 0.4 * divergence(2)


def latent_statistics(z: Tensor) -> dict[str, Tensor]:
    """Return mean, std and kurtosis (3 for normal numbers) of all numbers of (B, T, C) latents, without a gradient."""
    values = z.detach().float()
    centred = values - values.mean()
    kurtosis = centred.pow(4).mean() / centred.square().mean().square().clamp_min(1e-12)
    return {"mean": values.mean(), "std": values.std(), "kurtosis": kurtosis}
