"""Compute the phase-aware multi-resolution spectral loss, in real arithmetic and fp32 [T1.4.1].

Shapes: B batch, L audio samples, N window size, F one-sided bins, K windows. Spectra are (B, K, F, 2), real and
imaginary parts. Complex autograd would cost several times as much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sa3_mlx.common.schema import Config, ConfigError, quoted
from sa3_torch.train.run.parallel import mean
from sa3_torch.train.run.stage import TrainConfig

from .filters import k_weighting_fir
from .losses import SILENCE, Comparison

MIN_SCALE = 1e-3
PHASOR_FLOOR = 1e-3  # of the mean of an item: products of neighbouring bins below it say nothing about phase
MAGNITUDE_TERMS = ("contrast", "log_magnitude", "complex")
PHASE_TERMS = ("frequency", "delay")
Distance = Callable[[Tensor, Tensor, "SpectralConfig", bool], Tensor]
Average = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SpectralConfig(Config):
    """Hold sizes and weights of the spectral loss. A term of weight zero is not computed."""

    sizes: tuple[int, ...]  # FFT windows, samples
    overlap: int  # window / hop
    phase_sizes: tuple[int, ...]  # those of ``sizes`` on which the frequency and delay terms are evaluated
    contrast: float  # weights of the five terms
    log_magnitude: float
    complex: float
    frequency: float
    delay: float
    log_scale: float  # of the spread of an item's magnitudes: where the logarithm bends
    k_weighting: bool  # pre-filter
    stereo: Literal["stacked", "alternating"]  # left, right, mid and side at once, or mid / side in odd steps

    def __post_init__(self) -> None:
        if self.overlap < 2 or not self.sizes or any(size < 1 or size % self.overlap for size in self.sizes):
            raise ConfigError(
                f"spectral.sizes {quoted(self.sizes)}: expected multiples of overlap ({self.overlap}), 2 or more"
            )
        if not set(self.phase_sizes) <= set(self.sizes):
            raise ConfigError(
                f"spectral.phase_sizes {quoted(self.phase_sizes)}: allowed are those of sizes, {quoted(self.sizes)}"
            )
        for name, weight in ((term, getattr(self, term)) for term in MAGNITUDE_TERMS + PHASE_TERMS):
            if not weight >= 0:
                raise ConfigError(f"spectral.{name} is {weight!r}: allowed is at least 0")
        if (self.frequency or self.delay) and not self.phase_sizes:
            raise ConfigError("spectral.phase_sizes is empty: frequency and delay need a size, or weights of 0")
        if not self.log_scale > 0:
            raise ConfigError(f"spectral.log_scale is {self.log_scale!r}: allowed is above 0")

    @property
    def weights(self) -> dict[str, float]:
        """Return the weights of the terms that are on."""
        values = {term: getattr(self, term) for term in MAGNITUDE_TERMS + PHASE_TERMS}
        return {term: weight for term, weight in values.items() if weight > 0}


@cache
def tight_window(size: int, hop: int) -> np.ndarray:
    """Return the power-sine window whose squares, overlapped at ``hop``, sum to 1: (N,) float32 [T1.4.1]."""
    overlap = size // hop
    power = overlap - 1
    amplitude = 1.0 / math.sqrt(overlap * math.comb(2 * power, power) / 4**power)
    return (amplitude * np.sin(np.pi * np.arange(size) / size) ** power).astype(np.float32)


def tight_stft(x: Tensor, size: int, hop: int) -> Tensor:
    """Transform (B, L) -> (B, K, F, 2), real and imaginary parts.

    Inside the fully covered interior sum |X|^2 = sum x^2.
    """
    window = torch.from_numpy(tight_window(size, hop)).to(x.device)
    spectrum = torch.fft.rfft(x.float().unfold(-1, size, hop) * window, norm="ortho")
    scale = torch.full((size // 2 + 1,), math.sqrt(2.0), device=x.device)
    scale[0] = scale[-1] = 1.0
    return torch.view_as_real(spectrum * scale)


def magnitude(spectrum: Tensor) -> Tensor:
    """Return magnitudes, (..., 2) -> (...); the floor keeps the gradient finite on silence."""
    return (spectrum.square().sum(-1) + 1e-12).sqrt()


def spectral_distance(prediction: Tensor, reference: Tensor, config: SpectralConfig, phase: bool) -> Tensor:
    """Return the raw terms of every item: two spectra (B, K, F, 2) -> (terms + 1, B), the last row 1 for audible items,
    else 0.

    Rows are those of ``config.weights`` in order, the phase terms among them only if ``phase``; 0 for silent items.
    Scales are those of each item, not of the batch: else the tonal peaks of one clip hide the noise of another. Silent
    items (such as the side channel of mono clips) do not count: on them logarithms only amplify rounding, and waveform
    or silence loss holds them at zero.
    """
    axes = (1, 2)
    a, b = magnitude(prediction), magnitude(reference)
    energy = reference.square().sum(-1).mean(axes, keepdim=True)
    audible = (energy[:, 0, 0] > SILENCE).float()
    terms: dict[str, Tensor] = {}
    if config.contrast:
        terms["contrast"] = ((a - b).square().sum(axes) + 1e-8).sqrt() / ((a + b).square().sum(axes).sqrt() + 1e-2)
    if config.log_magnitude:
        spread = (a.var(axes, keepdim=True) + b.var(axes, keepdim=True)).sqrt().clamp_min(MIN_SCALE)
        scale = config.log_scale * spread.detach()
        terms["log_magnitude"] = (torch.log1p(a / scale) - torch.log1p(b / scale)).abs().mean(axes)
    if config.complex:
        square = (prediction - reference).square().sum(-1)
        terms["complex"] = torch.log1p(square / energy.clamp_min(1e-5)).mean(axes)
    if config.frequency and phase:
        p, q = (rotation(x[:, 1:], x[:, :-1]) for x in (prediction, reference))
        terms["frequency"] = phasor_distance(p, q)
    if config.delay and phase:
        p, q = (rotation(x[:, :, 1:], x[:, :, :-1]) for x in (prediction, reference))
        terms["delay"] = phasor_distance(p, q)
    return torch.stack([*(value * audible for value in terms.values()), audible])


def rotation(later: Tensor, earlier: Tensor) -> Tensor:
    """Return later * conj(earlier), whose angle is the phase between them: (..., 2) each -> (..., 2)."""
    a1, b1 = later.unbind(-1)
    a0, b0 = earlier.unbind(-1)
    return torch.stack([a1 * a0 + b1 * b0, b1 * a0 - a1 * b0], dim=-1)


def phasor_distance(p: Tensor, q: Tensor) -> Tensor:
    """Return the mean of w (1 - cos of the angle between p and q): (B, K, F, 2) each -> (B,).

    The weights w ~ sqrt(|p| |q|) have mean 1. Written as half the squared distance of the unit phasors, which for those
    is the same, so that bins below the floor do not count and equal spectra give exactly zero. The floor goes with the
    level of the item.
    """
    axes = (1, 2)
    length_p, length_q = ((x.square().sum(-1) + 1e-18).sqrt() for x in (p, q))
    floor = PHASOR_FLOOR * length_q.mean(axes, keepdim=True).detach()
    weight = (length_p * length_q).sqrt().detach()
    weight = weight / weight.mean(axes, keepdim=True)
    difference = p / torch.maximum(length_p, floor)[..., None] - q / torch.maximum(length_q, floor)[..., None]
    return (0.5 * weight * difference.square().sum(-1)).mean(axes)


def spectral_terms(
    prediction: Tensor, reference: Tensor, config: SpectralConfig, distance: Distance, average: Average
) -> dict[str, Tensor]:
    """Return raw terms by name, each the mean over its window sizes and the audible items: (B, L) each -> scalars.

    ``distance`` is ``spectral_distance``, perhaps compiled. ``average`` takes a scalar to its mean over all slices
    (with one, the scalar itself), so that a term is divided by the audible items of the whole batch. Raises ValueError
    for audio that is shorter than the windows.
    """
    longest = max(config.sizes)
    if prediction.shape[-1] < longest + longest // config.overlap:
        raise ValueError(
            f"{prediction.shape[-1]} samples: windows of {longest} need {longest + longest // config.overlap}"
        )
    found: dict[str, list[Tensor]] = {name: [] for name in config.weights}
    for size in config.sizes:
        phase = size in config.phase_sizes
        names = [name for name in found if phase or name not in PHASE_TERMS]
        if not names:
            continue
        hop = size // config.overlap
        *rows, audible = distance(tight_stft(prediction, size, hop), tight_stft(reference, size, hop), config, phase)
        count = average(audible.sum())
        count = torch.where(count > 0, count, 1.0)
        for name, row in zip(names, rows, strict=True):
            found[name].append(row.sum() / count)
    return {name: torch.stack(values).mean() for name, values in found.items()}


class SpectralLoss:
    """Compute the spectral terms of comparisons, divided by the audible items of the whole batch."""

    def __init__(self, config: SpectralConfig, train: TrainConfig, sample_rate: int) -> None:
        self.config, self.sample_rate, self.one_slice = config, sample_rate, train.accumulate == 1
        self._distance = torch.compile(spectral_distance) if train.compile else spectral_distance
        self._known: list[Tensor] = []  # by window size, where a process has several slices; see ``know``

    def count(self, audio: Tensor, step: int) -> Tensor:
        """Count the audible items of a slice (B, L, 2) at every window size: (sizes,)."""
        counts: list[Tensor] = []

        def record(count: Tensor) -> Tensor:
            counts.append(count)
            return count

        signals = self._input(audio, step)
        spectral_terms(signals, signals, self.config, self._distance, record)
        return torch.stack(counts)

    def know(self, counts: Tensor) -> None:
        """Take the mean counts (sizes,) over all slices, before a step of several micro-batches."""
        self._known = list(counts)

    def terms(self, comparisons: Iterable[Comparison], step: int) -> Iterator[dict[str, Tensor]]:
        """Yield the raw terms of each comparison; all are divided by the audible items of the first reference."""
        counts: list[Tensor] = []
        known = iter(self._known)

        def record(count: Tensor) -> Tensor:
            counts.append(mean(count) if self.one_slice else next(known))
            return counts[-1]

        for number, compared in enumerate(comparisons):
            again = iter(counts)
            average = record if number == 0 else lambda _count, again=again: next(again)
            prediction, reference = (self._input(x, step) for x in (compared.prediction, compared.reference))
            yield spectral_terms(prediction, reference, self.config, self._distance, average)

    def _input(self, audio: Tensor, step: int) -> Tensor:
        return spectral_input(audio, self.config, self.sample_rate, step)


def spectral_input(audio: Tensor, config: SpectralConfig, sample_rate: int, step: int) -> Tensor:
    """Return the signals that are compared, pre-filtered where asked: (B, L, 2) -> (4 B, L), or (2 B, L) if
    alternating."""
    if config.stereo == "stacked":
        signals = torch.cat([left_right(audio), mid_side(audio)])
    else:
        signals = mid_side(audio) if step % 2 else left_right(audio)
    return k_weighted(signals, sample_rate) if config.k_weighting else signals


def k_weighted(x: Tensor, sample_rate: int) -> Tensor:
    """Filter (..., L) without delay; zeros stand before the start and after the end."""
    taps = torch.from_numpy(k_weighting_fir(sample_rate)).to(x.device)
    size = -(-(x.shape[-1] + len(taps) - 1) // 4096) * 4096  # rarely with the large prime factors that FFTs dislike
    filtered = torch.fft.irfft(torch.fft.rfft(x.float(), size) * torch.fft.rfft(taps, size), size)
    half = len(taps) // 2
    return filtered[..., half : half + x.shape[-1]]


def mid_side(audio: Tensor) -> Tensor:
    """Return (B, L, 2) -> (2 B, L): plain sums, then plain differences."""
    left, right = audio.unbind(-1)
    return torch.cat([left + right, left - right])


def left_right(audio: Tensor) -> Tensor:
    """Return (B, L, 2) -> (2 B, L): left channels, then right ones."""
    return torch.cat(audio.unbind(-1))
