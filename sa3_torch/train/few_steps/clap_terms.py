"""What a latent CLAP tells a generator: how far a sound is from its prompt, and the features of the sound.

Shapes: B batch, T latent frames, C latent channels, D features.
"""

from __future__ import annotations

from torch import Tensor

from sa3_torch.train.clap.network import LatentClap
from sa3_torch.train.data.batches import LatentBatch

from .arc_losses import geodesic


def prompt_distance(clap: LatentClap, latents: Tensor, t: Tensor, batch: LatentBatch) -> Tensor:
    """Return the mean geodesic distance of latents (B, T, C) with noise of level t (B,) to the prompts of ``batch``."""
    sound = clap.embed_audio(latents, batch.valid.to(latents.device, non_blocking=True), t)
    text = clap.embed_text(batch.ids, batch.mask)
    return geodesic(sound, text).mean()


def clean_features(clap: LatentClap, latents: Tensor, batch: LatentBatch) -> Tensor:
    """Return what the CLAP hears in latents (B, T, C) without noise, beside their prompts: (B, D)."""
    return clap.audio_features(
        latents, batch.valid.to(latents.device, non_blocking=True), latents.new_zeros(len(latents))
    )
