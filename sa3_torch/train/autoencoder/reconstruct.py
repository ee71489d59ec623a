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
from sa3_torch.train.run import parallel

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

    Each process measures its share of the clips; the first returns what all found, the others an empty dictionary.
    "stereo" is how far the correlation of the channels is off. "softnorm" is the mean over clips. Raises ValueError
    without such clips.
    """
    held_out = clips.select("validation")
    waveform = [clip for clip in held_out if clip.kind in ("note", "chord", "user")][:VALIDATION_CLIPS]
    texture = [clip for clip in held_out if clip.kind in ("drum", "noise")][:VALIDATION_CLIPS]
    if not waveform:
        raise ValueError("no held-out notes, chords or recordings to validate on; add more clips")
    through = Reconstructor(model, clips, sample_rate, device)
    chosen = waveform + texture
    shared = parallel.own_rows(len(chosen))
    found = parallel.gather_lists([_measured(through, clip, clip in waveform) for clip in chosen[shared]])
    if not parallel.is_first():
        return {}
    latents = np.concatenate([z for z, _ in found])
    average = {"si_sdr": np.median, "spectral_convergence": np.median}
    names = {name: None for _, row in found for name in row}
    means = {name: float(average.get(name, np.mean)([row[name] for _, row in found if name in row])) for name in names}
    return {
        **means,
        "effective_rank": effective_rank(latents),
        "latent_std": float(latents.std()),
        "latent_kurtosis": kurtosis(latents),
    }


def _measured(through: Reconstructor, clip: CachedClip, tonal: bool) -> tuple[NDArray[np.float32], dict[str, float]]:
    """Return the latents (T, C) of a clip and its measures."""
    a, b = through.pair(clip)
    z = through.latents(a).float().cpu()
    row = {"si_sdr": si_sdr(a, b), "spectral_convergence": spectral_convergence(a, b)} if tonal else {}
    row |= {
        "log_mel": log_mel_l1(a, b),
        "multi_stft": multi_stft(a, b),
        "stereo": abs(stereo_correlation(a) - stereo_correlation(b)),
    }
    if z.shape[1] > 1:
        row["softnorm"] = float(soft_norm_loss(z))
    return z[0].numpy(), row
