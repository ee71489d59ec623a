"""Transform audio for discriminators, regressors and the critic by fixed maps, in fp32, autocast or not.

Shapes: B batch, L audio samples, F one-sided bins, K windows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .filters import DAUBECHIES_4
from .spectral import tight_stft


def full_precision(x: Tensor) -> torch.autocast:
    """Return a context without autocast on the device of ``x``."""
    return torch.autocast(x.device.type, enabled=False)


def pad_to_multiple(audio: Tensor, size: int) -> Tensor:
    """Pad (B, L, channels) with zeros at the end, up to a multiple of ``size`` samples."""
    return F.pad(audio, (0, 0, 0, -audio.shape[1] % size))


def wavelet(audio: Tensor, levels: int) -> Tensor:
    """Transform (B, L, channels) -> (B, L / 2^levels, channels * 2^levels), orthogonal: Daubechies 4, periodic.

    Each step holds one approximation and the 1, 2, 4 .. details of its time per channel.
    """
    signal = pad_to_multiple(audio.float(), 2**levels).transpose(1, 2)  # (B, channels, L)
    steps = signal.shape[2] >> levels
    low = torch.tensor(DAUBECHIES_4, device=audio.device)
    high = low.flip(0) * torch.tensor([1.0, -1.0] * (len(low) // 2), device=audio.device)
    parts = []
    with full_precision(audio):
        for _ in range(levels):
            pairs = signal.unflatten(2, (-1, 2))  # (B, channels, n, 2)
            window = torch.cat([torch.roll(pairs, -k, 2) for k in range(len(low) // 2)], dim=3)  # (B, channels, n, 8)
            parts.append((window @ high).unflatten(2, (steps, -1)))
            signal = window @ low
    parts.append(signal[..., None])
    return torch.cat(parts, dim=3).transpose(1, 2).flatten(2)


def spectrogram(audio: Tensor, size: int, hop: int) -> Tensor:
    """Return the tight transform of every channel, (B, L, channels) -> (B, channels, K, F, 2)."""
    channels = audio.transpose(1, 2)
    return tight_stft(channels.flatten(0, 1), size, hop).unflatten(0, channels.shape[:2])
