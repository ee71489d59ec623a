"""Short losses as pure functions in fp32 [T1.4]; the spectral ones are in spectral.py.

Shapes: B batch, L audio samples, T latent frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def weighted(raw: Mapping[str, Tensor], weights: Mapping[str, float], scale: float = 1.0) -> dict[str, Tensor]:
    """scale * weight * value of every term in ``weights``; what else ``raw`` holds is only measured."""
    return {name: scale * weight * raw[name] for name, weight in weights.items()}


def waveform_loss(prediction: Tensor, reference: Tensor) -> Tensor:
    """Squared error of every item relative to its energy, averaged: (B, L, channels) each -> scalar."""
    error = (prediction - reference).square().mean((1, 2))
    return (error / (reference.square().mean((1, 2)) + 1e-4)).mean()


def soft_norm_loss(z: Tensor) -> Tensor:
    """Divergence of the moments of (B, T, C) latents from a standard normal [T1.4.2].

    var + 1e-4 in place of a clamp, so that constant latents still get a gradient (13.1).
    """

    def divergence(dim: int) -> Tensor:
        variance = z.var(dim) + 1e-4
        return (z.mean(dim).square() + variance - variance.log() - 1).mean()

    return divergence(1) + 0.4 * divergence(2)
