"""Sounds of a diffusion model while it is trained.

Shapes: B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sa3_mlx.common.generation.noise import INITIAL, NoiseStream, batch_noise
from sa3_mlx.common.generation.noise import step as noise_of_step
from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.config import ShiftConfig
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.guidance import GuidedVelocity
from sa3_torch.same import SAME
from sa3_torch.samplers import SAMPLERS
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.run import parallel
from sa3_torch.train.run.logs import save_sound

from .conditioning import Networks
from .latent_data import LatentData

DEMO_PROMPTS = 6


def demo_batch(data: LatentData) -> LatentBatch:
    """Draw some held-out prompts, always the same."""
    return data.validation.batch(10**6)[:DEMO_PROMPTS]


@torch.no_grad()
def sample(networks: Networks, batch: LatentBatch, rows: slice, sampling: Sampling, shift: ShiftConfig) -> Tensor:
    """Return latents (B, T, C) for the prompts and durations of the items ``rows`` of a batch, from fixed seeds."""
    seeds, frames, channels = range(len(batch.items))[rows], int(batch.valid.sum(1).max()), batch.latents.shape[2]
    if not seeds:
        return torch.zeros(0, frames, channels, device=networks.device)
    cond = networks.conditioning(batch[rows], None)
    velocity = GuidedVelocity(
        dit=networks.dit,
        cond=networks.dit.prepare(cond),
        null=None if sampling.guidance.scale == 1 else networks.dit.prepare(cond.unconditional()),
        guidance=sampling.guidance,
    )

    def noise(purpose: NoiseStream) -> Tensor:
        return torch.from_numpy(batch_noise(seeds, purpose, frames, channels)).to(networks.device)

    schedule = sigmas(shift, sampling.steps, 1.0, [frames] * len(seeds))
    *_, last = SAMPLERS[sampling.sampler](velocity, noise(INITIAL), schedule, lambda k: noise(noise_of_step(k)))
    return last.x


@torch.no_grad()
def write_demo(folder: Path, name: str, batch: LatentBatch, latents: Tensor, same: SAME, sample_rate: int) -> None:
    """Write the decoded latents of a batch in turn to ``name``.wav with its spectrogram, prompts to ``name``.txt.

    ``latents`` (B, T, C) are those of this process, ``own_rows`` of the batch: each decodes its own, the first writes.
    """
    lengths = [int(item.seconds * sample_rate) for item in batch.items[parallel.own_rows(len(batch.items))]]
    audio = [same.decode(z[None])[0, :length].float().cpu() for z, length in zip(latents, lengths, strict=True)]
    sounds = parallel.gather_lists([sound.numpy() for sound in audio])
    if not parallel.is_first():
        return
    captions = [item.captions[0] for item in batch.items]
    save_sound(
        folder / f"{name}.wav",
        np.concatenate(sounds),
        sample_rate,
        title=f"step {name}: {', '.join(captions)}",
    )
    (folder / f"{name}.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
