"""Losses of the autoencoder as pure functions in fp32 (training spec, section 1.4).

Shapes: B batch, L audio samples, N window size, F one-sided bins, K windows, T latent frames, C latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sa3_mlx.spec.config import Config, ConfigError

MIN_SCALE = 1e-3
SILENCE = 1e-6  # mean energy of a spectrum bin below which an item counts as silent, about -60 dBFS
Distance = Callable[[Tensor, Tensor, "SpectralConfig"], Tensor]


def tight_window(size: int, hop: int) -> np.ndarray:
    """Power-sine window whose squares, overlapped at ``hop``, sum to 1: (N,) float32 (training spec 1.4.1)."""
    overlap = size // hop
    power = overlap - 1
    amplitude = 1.0 / math.sqrt(overlap * math.comb(2 * power, power) / 4**power)
    return (amplitude * np.sin(np.pi * np.arange(size) / size) ** power).astype(np.float32)


def tight_stft(x: Tensor, size: int, hop: int) -> Tensor:
    """(B, L) -> (B, K, F, 2) real and imaginary parts. sum |X|^2 = sum x^2 inside the fully covered interior."""
    window = torch.from_numpy(tight_window(size, hop)).to(x.device)
    spectrum = torch.fft.rfft(x.float().unfold(-1, size, hop) * window, norm="ortho")
    scale = torch.full((size // 2 + 1,), math.sqrt(2.0), device=x.device)
    scale[0] = scale[-1] = 1.0
    return torch.view_as_real(spectrum * scale)


def magnitude(spectrum: Tensor) -> Tensor:
    """(..., 2) -> (...); the floor keeps the gradient finite on silence."""
    return (spectrum.square().sum(-1) + 1e-12).sqrt()


@dataclass(frozen=True, kw_only=True)
class SpectralConfig(Config):
    """Sizes and weights of the spectral loss."""

    sizes: tuple[int, ...]  # FFT windows, samples
    overlap: int  # window / hop
    contrast: float  # weights of the three terms
    log_magnitude: float
    complex: float
    log_scale: float  # of the spread of an item's magnitudes: where the logarithm bends

    def __post_init__(self) -> None:
        if self.overlap < 2 or not self.sizes or any(size < 1 or size % self.overlap for size in self.sizes):
            raise ConfigError(f"spectral.sizes {self.sizes}: expected multiples of overlap ({self.overlap}), 2 or more")


def spectral_distance(prediction: Tensor, reference: Tensor, config: SpectralConfig) -> Tensor:
    """Weighted contrast, log-magnitude and complex distance of two spectra (B, K, F, 2) -> scalar (terms 1 to 3).

    Scales are those of each item, not of the batch: else the tonal peaks of one clip hide the noise of another. Silent
    items (such as the side channel of mono clips) do not count: on them logarithms only amplify rounding, and the
    waveform loss holds them at zero.
    """
    axes = (1, 2)
    a, b = magnitude(prediction), magnitude(reference)
    heard = (reference.square().sum(-1).mean(axes) > SILENCE).float()
    contrast = ((a - b).square().sum(axes) + 1e-8).sqrt() / ((a + b).square().sum(axes).sqrt() + 1e-2)
    spread = (a.var(axes, keepdim=True) + b.var(axes, keepdim=True)).sqrt().clamp_min(MIN_SCALE)
    scale = config.log_scale * spread.detach()
    log_magnitude = (torch.log1p(a / scale) - torch.log1p(b / scale)).abs().mean(axes)
    energy = reference.square().sum(-1).mean(axes, keepdim=True).clamp_min(1e-5)
    square = (prediction - reference).square().sum(-1)
    terms = (
        config.contrast * contrast
        + config.log_magnitude * log_magnitude
        + config.complex * torch.log1p(square / energy).mean(axes)
    )  # (B,)
    return (terms * heard).sum() / heard.sum().clamp_min(1)


def spectral_loss(prediction: Tensor, reference: Tensor, config: SpectralConfig, distance: Distance) -> Tensor:
    """Mean of ``distance`` (``spectral_distance``, perhaps compiled) over window sizes: (B, L) each -> scalar."""
    terms = [
        distance(tight_stft(prediction, n, n // config.overlap), tight_stft(reference, n, n // config.overlap), config)
        for n in config.sizes
    ]
    return torch.stack(terms).mean()


def mid_side(audio: Tensor) -> Tensor:
    """(B, L, 2) -> (2 B, L): plain sum, then plain difference."""
    left, right = audio.unbind(-1)
    return torch.cat([left + right, left - right])


def left_right(audio: Tensor) -> Tensor:
    """(B, L, 2) -> (2 B, L)"""
    return torch.cat(audio.unbind(-1))


def waveform_loss(prediction: Tensor, reference: Tensor) -> Tensor:
    """Squared error of every item relative to its energy, averaged: (B, L, channels) each -> scalar."""
    error = (prediction - reference).square().mean((1, 2))
    return (error / (reference.square().mean((1, 2)) + 1e-4)).mean()


def soft_norm_loss(z: Tensor) -> Tensor:
    """Divergence of the moments of (B, T, C) latents from a standard normal (training spec 1.4.2).

    var + 1e-4 in place of a clamp, so that constant latents still get a gradient (13.1).
    """

    def divergence(dim: int) -> Tensor:
        variance = z.var(dim) + 1e-4
        return (z.mean(dim).square() + variance - variance.log() - 1).mean()

    return divergence(1) + 0.4 * divergence(2)


def flow_loss(prediction: Tensor, target: Tensor, generate: Tensor, keep: Tensor, context_weight: float) -> Tensor:
    """Squared error per item over generated frames, plus the weighted error over kept ones (training spec 4.2).

    prediction, target (B, T, C); generate, keep (B, T) bool. Items without such frames count as 0.
    """
    error = (prediction.float() - target.float()).square().mean(-1)  # (B, T)

    def masked_mean(mask: Tensor) -> Tensor:
        return ((error * mask).sum(1) / mask.sum(1).clamp_min(1)).mean()

    return masked_mean(generate) + context_weight * masked_mean(keep)
