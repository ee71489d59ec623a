"""Models that denoise at once, in training: the network, and what ODE warm-up and post-training share.

The text encoder and the autoencoder stay as they are. What is exported says that it is a denoiser: users get the
ping-pong sampler, 8 steps without guidance [T7.3].

Shapes: B batch, T latent frames, C latent channels. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import LOGSNR
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.conditioner import Conditioner
from sa3_torch.dit import DiT
from sa3_torch.same import SAME
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.flow.conditioning import ConditionInputs, Networks, conditioning, prepare_to_train
from sa3_torch.train.flow.demo import demo_batch, sample, write_demo
from sa3_torch.train.flow.latent_data import LatentData
from sa3_torch.train.flow.masks import Masks
from sa3_torch.train.flow.model import diffusion_of
from sa3_torch.train.run import parallel

DEMO_STEPS = (1, 4, 8)


class Denoiser(nn.Module):
    """Estimate the clean latents by one network with its own conditioner."""

    def __init__(self, conditioner: Conditioner, dit: DiT) -> None:
        super().__init__()
        self.conditioner, self.dit = conditioner, dit

    @classmethod
    def frozen_copy(cls, model: nn.Module) -> Self:
        """Copy the conditioner and the DiT of ``model``, in evaluation mode, without gradients."""
        networks = Networks.of(model)
        return cls(copy.deepcopy(networks.conditioner), copy.deepcopy(networks.dit)).eval().requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor, inputs: ConditionInputs) -> Tensor:
        """Return x - t v: (B, T, C) float32, t (B,) -> (B, T, C) float32."""
        velocity = self.dit(x, t, prepare_to_train(self.dit, conditioning(self.conditioner, inputs)))
        return x - t[:, None, None] * velocity.float()


@torch.no_grad()
def frozen_inputs(networks: Networks, batch: LatentBatch, masks: Masks) -> ConditionInputs:
    """Return what a batch is conditioned on, with its texts as states of the frozen text encoder."""
    return networks.inputs(batch, masks)


def channel_moments(x: Tensor, shown: Tensor) -> Tensor:
    """Return count, sum and sum of squares of every channel of x (B, T, C) over the frames ``shown`` (B, T): (3, C)
    float64. Those of the parts of a batch add up."""
    frames = shown[..., None].double()
    values = x.double() * frames
    return torch.stack([frames.sum((0, 1)).expand(x.shape[2]), values.sum((0, 1)), values.square().sum((0, 1))])


def few_step_sampling(steps: int) -> Sampling:
    """Return how a denoiser is sampled."""
    return Sampling(sampler="pingpong", steps=steps)


def few_step_config(config: ModelConfig) -> ModelConfig:
    """Return the configuration of a model that denoises at once; its schedule is that of the released post-trained
    models (7.3)."""
    diffusion = replace(diffusion_of(config), objective="rf_denoiser", shift=LOGSNR)
    return replace(config, name=config.name.removesuffix("-base"), diffusion=diffusion, sampling=None)


def write_few_step_demos(
    folder: Path, step: int, networks: Networks, data: LatentData, same: SAME, config: ModelConfig
) -> None:
    """Write the same prompts from the same noise in 1, 4 and 8 steps."""
    batch, shift = demo_batch(data), diffusion_of(config).shift
    rows = parallel.own_rows(len(batch.items))
    for steps in DEMO_STEPS:
        latents = sample(networks, batch, rows, few_step_sampling(steps), shift)
        write_demo(folder, f"{step:06d}-{steps}", batch, latents, same, config.sample_rate)
