"""Run the autoencoder as it is trained: noise on latents, running_std, and other ways to train [T1.3].

Shapes: B items of a slice, N audio samples, T latent frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.same import SAME, patch, unpatch
from sa3_torch.train.run.parallel import BatchSlice, follow
from sa3_torch.train.run.random import Purpose, purpose_generator, step_generator
from sa3_torch.train.run.settings import check
from sa3_torch.train.run.stage import TrainConfig, maybe_compile

STD_DECAY = 0.999
NOISE = 0.05  # on the latents while training, relative to running_std


@dataclass(frozen=True, kw_only=True)
class VariantsConfig(Config):
    """Choose other ways to train ([T1.3], step 6)."""

    train_encoder: float  # share of the run in which the encoder is trained; from then on only the decoder is
    latent_mask: float  # share of the numbers of the latents that the decoder gets as zeros
    other_stride: int  # patches per latent in some batches; 0: in none
    other_every: int  # one batch of so many is one of them

    def __post_init__(self) -> None:
        check(self, 0, 1, "train_encoder")
        check(self, 0, 0.99, "latent_mask")
        check(self, 0, 1024, "other_stride")
        check(self, 2, 1 << 20, "other_every")


PLAIN = VariantsConfig(train_encoder=1.0, latent_mask=0.0, other_stride=0, other_every=9)


class Coder:
    """Run both directions of ``model`` in a step. Random numbers are those of the global batch of ``items``."""

    def __init__(self, model: SAME, variants: VariantsConfig, train: TrainConfig, items: int) -> None:
        """Raise ConfigError for another stride that the model cannot have."""
        self.model, self.variants, self.train, self.items = model, variants, train, items
        self.settled = False  # whether running_std is that of these weights from the first step
        self.other = replace(model.config, stride=variants.other_stride) if variants.other_stride else model.config
        self._encode = maybe_compile(model.encoder, train.compile)
        self._decode = maybe_compile(model.decoder, train.compile)

    def check_crops(self, samples: int, name: str) -> None:
        """Raise ConfigError for crops that are not made of whole groups, of model ``name`` and at the other stride."""
        for who, config in ((name, self.model.config), (f"variants.other_stride = {self.other.stride}", self.other)):
            ratio = config.samples_per_latent * config.frame_multiple
            if samples % ratio:
                raise ConfigError(f"crop_samples is {samples}: {who} needs a multiple of {ratio}")

    def frozen(self, step: int) -> list[Tensor]:
        """Return the parameters that a step does not change: those that make latents, once only the decoder
        is trained."""
        if step < self.variants.train_encoder * self.train.steps:
            return []
        return [*self.model.encoder.parameters(), *self.model.bottleneck.parameters()]

    @contextmanager
    def stride(self, step: int) -> Iterator[None]:
        """Let the model work at the stride of this step's batch."""
        parts: tuple[Any, ...] = (self.model, self.model.encoder, self.model.decoder)
        own, every = self.model.config, self.variants.other_every
        for part in parts:
            part.config = self.other if step % every == every - 1 else own
        try:
            yield
        finally:
            for part in parts:
                part.config = own

    def raw_latents(self, audio: Tensor, step: int) -> Tensor:
        """Encode (B, N, 2) -> u (B, T, C) float32, latents before the division by running_std."""
        frozen = self.frozen(step)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            bottleneck = self.model.bottleneck
            u = self._encode(patch(audio, self.model.config.patch_size)).float()
            u = u * bottleneck.scale + bottleneck.bias
        return _Zeros.apply(u, *frozen) if frozen and torch.is_grad_enabled() else u

    def decoded(self, z: Tensor, step: int, batch_slice: BatchSlice) -> Tensor:
        """Decode (B, T, C) -> (B, N, 2), with the training noise of the global batch."""
        r = self.model.bottleneck.running_std.clone()
        noise = torch.randn(self.items, *z.shape[1:], generator=step_generator(self.train.seed, step))
        noisy = r * (z + NOISE * noise[batch_slice.rows(self.items)].to(z.device))
        return unpatch(self._decode(noisy), self.model.audio_channels).float()

    def masked(self, z: Tensor, step: int, batch_slice: BatchSlice) -> Tensor:
        """Set some numbers of (B, T, C) to zero, against reliance on single ones. Nothing is rescaled."""
        if not self.variants.latent_mask:
            return z
        random = purpose_generator(self.train.seed, Purpose.LATENT_MASK, step)
        kept = torch.rand(self.items, *z.shape[1:], generator=random) >= self.variants.latent_mask
        return z * kept[batch_slice.rows(self.items)].to(z.device)

    @torch.no_grad()
    def follow_std(self, std: Tensor, step: int) -> None:
        """Let running_std follow the standard deviation of u; that of new weights starts at the first batch."""
        if not self.frozen(step):
            decay = STD_DECAY if self.settled else min(STD_DECAY, step / (step + 10))
            follow(self.model.bottleneck.running_std, std.clamp_min(1e-4), decay)


class _Zeros(torch.autograd.Function):
    """Return x itself, and give parameters gradients of zero, which several processes wait for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters  # for their shapes: values may change before the backward pass
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(torch.zeros_like(parameter) for parameter in ctx.parameters)
