"""Read pitch classes and the level difference of the channels from latents by linear heads [T1.4.4].

Shapes: B batch, N audio samples, T latent frames, C latent channels, F one-sided bins, K windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.common.measures.spectra import mel_filters
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.autoencoder.filters import chroma_filters
from sa3_torch.train.autoencoder.spectral import magnitude
from sa3_torch.train.autoencoder.transforms import full_precision, spectrogram
from sa3_torch.train.run.settings import check

MEL_LOW_HZ = 30.0
LEVEL_FLOOR = 1e-3


@dataclass(frozen=True, kw_only=True)
class ChromaBand(Config):
    """Choose the octaves of one chroma head, and its weight."""

    octave: float  # centre, octaves above 27.5 Hz
    width: float  # standard deviation, octaves
    weight: float

    def __post_init__(self) -> None:
        check(self, 0, 12, "octave")
        check(self, 1e-3, 12, "width")


@dataclass(frozen=True, kw_only=True)
class RegressorsConfig(Config):
    """Choose the heads and the windows of their targets."""

    size: int  # FFT window, samples
    hop: int
    chroma_bins: int
    chroma_bands: tuple[ChromaBand, ...]
    level_bands: int  # mel bands per channel
    level_weight: float

    def __post_init__(self) -> None:
        check(self, 12, 1024, "chroma_bins")
        check(self, 1, 256, "level_bands")
        if self.hop < 1 or self.size % self.hop or self.size < 2 * self.hop:
            raise ConfigError(f"regressors: hop is {self.hop}, expected size ({self.size}) divided by 2 or more")
        if not self.chroma_bands:
            raise ConfigError("regressors.chroma_bands is empty: expected at least one")


BANDS = (  # of the official code
    ChromaBand(octave=1.0, width=1.0, weight=0.035),
    ChromaBand(octave=5.0, width=1.5, weight=0.05),
    ChromaBand(octave=9.0, width=1.0, weight=0.2),
)
OFFICIAL = RegressorsConfig(size=8192, hop=4096, chroma_bins=128, chroma_bands=BANDS, level_bands=32, level_weight=0.1)


def pitch_class(chroma: Tensor) -> Tensor:
    """Return the pitch class of the highest bin: (..., bins) -> (...) int64, 0 for C to 11 for B.

    The layout is that of ``chroma_filters``.
    """
    bins = chroma.shape[-1]
    octave = (chroma.argmax(-1) + 3 * (bins // 12)) % bins / bins  # above A
    return (9 + (12 * octave).round().long()) % 12


class Regressors(nn.Module):
    """Hold one linear head per chroma band and one for the level difference, on every latent."""

    def __init__(
        self, config: RegressorsConfig, sample_rate: int, samples_per_latent: int, latent_channels: int
    ) -> None:
        super().__init__()
        self.config, self.samples_per_latent = config, samples_per_latent
        self.bands = {f"chroma_{band.octave:g}".replace(".", "_"): band for band in config.chroma_bands}
        self.heads = nn.ModuleDict({name: nn.Linear(latent_channels, config.chroma_bins) for name in self.bands})
        self.level = nn.Linear(latent_channels, config.level_bands)
        for name, band in self.bands.items():
            filters = chroma_filters(config.chroma_bins, config.size, sample_rate, band.octave, band.width)
            self.register_buffer(f"filters_{name}", torch.from_numpy(filters.T.copy()), persistent=False)
        mel = mel_filters(config.level_bands, config.size, sample_rate, MEL_LOW_HZ)
        self.register_buffer("mel", torch.from_numpy(mel).float(), persistent=False)

    @property
    def weights(self) -> dict[str, float]:
        """Return the weight of every head."""
        return {**{name: band.weight for name, band in self.bands.items()}, "level": self.config.level_weight}

    @torch.no_grad()
    def targets(self, audio: Tensor, frames: int, samples_per_latent: int | None = None) -> dict[str, Tensor]:
        """Return chroma (B, T, bins) by band and "level" (B, T, level_bands), above 0 on the left, for stereo (B, N,
        2).

        ``samples_per_latent``: where it is not that of the autoencoder. The targets depend on the level of the sound.
        Raises ValueError for audio shorter than the window.
        """
        if audio.shape[1] < self.config.size or audio.shape[2] != 2:
            raise ValueError(
                f"audio {tuple(audio.shape)}: regressors need stereo of at least {self.config.size} samples"
            )
        with full_precision(audio):
            levels = magnitude(spectrogram(audio, self.config.size, self.config.hop))  # (B, 2, K, F)
            mean = torch.log1p(levels.mean(1))
            found = {name: mean @ self.get_buffer(f"filters_{name}") for name in self.bands}
            left, right = (levels @ self.get_buffer("mel") + LEVEL_FLOOR).log10().unbind(1)
        found["level"] = (left - right) / 3
        size = samples_per_latent or self.samples_per_latent
        return {name: self._at_latents(value, frames, size) for name, value in found.items()}

    def _at_latents(self, value: Tensor, frames: int, samples_per_latent: int) -> Tensor:
        """Interpolate linearly from the middles of the windows to those of the latents: (B, K, n) -> (B, T, n)."""
        middle = (torch.arange(frames, device=value.device) + 0.5) * samples_per_latent
        position = ((middle - self.config.size / 2) / self.config.hop).clamp(0, value.shape[1] - 1)
        below = position.long().clamp(max=max(0, value.shape[1] - 2))
        share = (position - below)[:, None]
        return torch.lerp(value[:, below], value[:, (below + 1).clamp(max=value.shape[1] - 1)], share)

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Read from latents (B, T, C) what ``targets`` gives."""
        chroma = {name: self.heads[name](z) for name in self.bands}
        return {**chroma, "level": self.level(z)}

    def loss(self, z: Tensor, audio: Tensor, *, detach: bool) -> dict[str, Tensor]:
        """Return mean absolute errors by head; z (B, T, C), audio (B, N, 2) of whole latents."""
        targets = self.targets(audio, z.shape[1], audio.shape[1] // z.shape[1])
        outputs = self(z.detach() if detach else z)
        return {name: F.l1_loss(outputs[name].float(), target) for name, target in targets.items()}
