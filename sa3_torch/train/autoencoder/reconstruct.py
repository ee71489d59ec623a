"""Measure what an autoencoder makes of held-out clips.

Shapes: N audio samples, T latent frames, C latent channels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sa3_mlx.common.measures.spectra import log_mel_l1
from sa3_torch.same import SAME
from sa3_torch.train.data.clip_cache import Audio, CachedClip, ClipSet

from .losses import soft_norm_loss
from .metrics import effective_rank, kurtosis, multi_stft, si_sdr, spectral_convergence, stereo_correlation

VALIDATION_CLIPS = 48


class Reconstructor:
    """Run clips through the weights now in ``model``, at most 2 s of each."""

    def __init__(self, model: SAME, clips: ClipSet, sample_rate: int, device: torch.device) -> None:
        self.model, self.clips, self.device = model, clips, device
        self.sample_rate, self.samples = sample_rate, 2 * sample_rate

    def latents(self, audio: Audio) -> Tensor:
        """Encode (N, 2) -> (1, T, C)."""
        return self.model.encode(torch.from_numpy(audio)[None].to(self.device))

    def pair(self, clip: CachedClip) -> tuple[Audio, NDArray[np.float32]]:
        """Return original and reconstruction, (N, 2) each."""
        audio = self.audio(clip)
        return audio, self.again(audio)

    def audio(self, clip: CachedClip) -> Audio:
        """Read a clip as (N, 2)."""
        audio = self.clips.read(clip, 0, self.samples)
        return np.repeat(audio, self.model.audio_channels, axis=1) if audio.shape[1] == 1 else audio

    def again(self, audio: Audio) -> NDArray[np.float32]:
        """Reconstruct (N, 2) -> (N, 2)."""
        return np.asarray(self.model.decode(self.latents(audio))[0, : len(audio)].float().cpu().numpy())


def measure_reconstructions(model: SAME, clips: ClipSet, sample_rate: int, device: torch.device) -> dict[str, float]:
    """Return medians over tonal held-out clips (or the user's recordings), means over all kinds, statistics of latents.

    "stereo" is how far the correlation of the channels is off. "softnorm" is the mean over clips. Raises ValueError
    without such clips.
    """
    held_out = clips.select("validation")
    waveform = [clip for clip in held_out if clip.kind in ("note", "chord", "user")][:VALIDATION_CLIPS]
    texture = [clip for clip in held_out if clip.kind in ("drum", "noise")][:VALIDATION_CLIPS]
    if not waveform:
        raise ValueError("no held-out notes, chords or recordings to validate on; add more clips")
    through = Reconstructor(model, clips, sample_rate, device)
    pairs = [through.pair(clip) for clip in waveform + texture]
    coded = [through.latents(audio).float().cpu() for audio, _ in pairs]
    latents = torch.cat([z[0] for z in coded]).numpy()
    return {
        "si_sdr": float(np.median([si_sdr(a, b) for a, b in pairs[: len(waveform)]])),
        "spectral_convergence": float(np.median([spectral_convergence(a, b) for a, b in pairs[: len(waveform)]])),
        "log_mel": float(np.mean([log_mel_l1(a, b) for a, b in pairs])),
        "multi_stft": float(np.mean([multi_stft(a, b) for a, b in pairs])),
        "stereo": float(np.mean([abs(stereo_correlation(a) - stereo_correlation(b)) for a, b in pairs])),
        "effective_rank": effective_rank(latents),
        "latent_std": float(latents.std()),
        "latent_kurtosis": kurtosis(latents),
        "softnorm": float(np.mean([float(soft_norm_loss(z)) for z in coded if z.shape[1] > 1])),
    }
