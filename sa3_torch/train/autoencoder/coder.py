"""Run the autoencoder as it is trained: noise on latents, and running_std [T1.3].

Shapes: B items of a slice, N audio samples, T latent frames, C latent channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sa3_mlx.common.schema import ConfigError
from sa3_torch.same import SAME, patch, unpatch
from sa3_torch.train.run.parallel import BatchSlice, follow
from sa3_torch.train.run.random import Purpose, item_noise
from sa3_torch.train.run.stage import TrainConfig

STD_DECAY = 0.999
NOISE = 0.05  # on the latents while training, relative to running_std


class Coder:
    """Run both directions of ``model`` in a step, on slices of a batch of ``items``."""

    def __init__(self, model: SAME, train: TrainConfig, items: int) -> None:
        self.model, self.train, self.items = model, train, items
        self.settled = False  # whether running_std is that of these weights from the first step

    def check_crops(self, samples: int, name: str) -> None:
        """Raise ConfigError for crops that are not made of whole groups of model ``name``."""
        ratio = self.model.config.samples_per_latent * self.model.config.frame_multiple
        if samples % ratio:
            raise ConfigError(f"crop_samples is {samples}: {name} needs a multiple of {ratio}")

    def raw_latents(self, audio: Tensor) -> Tensor:
        """Encode (B, N, 2) -> u (B, T, C) float32, latents before the division by running_std."""
        bottleneck = self.model.bottleneck
        u = self.model.encoder(patch(audio, self.model.config.patch_size)).float()
        return u * bottleneck.scale + bottleneck.bias

    def decoded(self, z: Tensor, step: int, batch_slice: BatchSlice) -> Tensor:
        """Decode (B, T, C) -> (B, N, 2), with the training noise of these items."""
        r = self.model.bottleneck.running_std.clone()
        rows, shape = batch_slice.rows(self.items), tuple(z.shape[1:])
        noise = item_noise(rows, shape, self.train.seed, Purpose.CODER_NOISE, step, z.device)
        noisy = r * (z + NOISE * noise)
        return unpatch(self.model.decoder(noisy), self.model.audio_channels).float()

    @torch.no_grad()
    def follow_std(self, std: Tensor, step: int) -> None:
        """Let running_std follow the standard deviation of u; that of new weights starts at the first batch."""
        decay = STD_DECAY if self.settled else min(STD_DECAY, step / (step + 10))
        follow(self.model.bottleneck.running_std, std.clamp_min(1e-4), decay)
