"""Train a small unconditional diffusion transformer beside the autoencoder: latents it predicts well are easy to model.

Shapes: B batch, T latent frames, C latent channels, D width [T1.4.3].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sa3_mlx.common.model.config import HEAD_SIZE, TIMESTEP_FEATURES
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.attention import attend
from sa3_torch.clap.network import ModulatedBlock
from sa3_torch.dit import BLOCK_EPS, timestep_features
from sa3_torch.layers import MLP, RMSNorm, rope
from sa3_torch.train.flow.path import interpolate
from sa3_torch.train.run.parallel import follow
from sa3_torch.train.run.settings import check

STD_DECAY = 0.99


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig(Config):
    """Hold the sizes of the network."""

    width: int
    depth: int

    def __post_init__(self) -> None:
        check(self, 1, 64, "depth")
        if self.width < HEAD_SIZE or self.width % HEAD_SIZE:
            raise ConfigError(f"alignment.width is {self.width}: expected a multiple of {HEAD_SIZE}")


class Alignment(nn.Module):
    """Predict the velocity of latents, and follow their standard deviation, which the noise gets."""

    weights: ClassVar[dict[str, float]] = {"alignment": 1.0}
    latent_std: Tensor

    def __init__(self, config: AlignmentConfig, latent_channels: int) -> None:
        super().__init__()
        width = config.width
        self.register_buffer("latent_std", torch.ones(()))
        self.to_timestep_embed = MLP(TIMESTEP_FEATURES, width, width, bias=True)
        self.to_modulation = MLP(width, width, 6 * width, bias=True)
        self.project_in = nn.Linear(latent_channels, width)
        self.layers = nn.ModuleList(ModulatedBlock(width) for _ in range(config.depth))
        self.norm = RMSNorm(width, BLOCK_EPS)
        self.project_out = nn.Linear(width, latent_channels)
        for last in (self.to_modulation.fc2, self.project_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, T, C) of x (B, T, C) at t (B,) in 0..1, 1 = noise."""
        modulation = self.to_modulation(self.to_timestep_embed(timestep_features(t).to(self.project_in.weight.dtype)))
        h, table = self.project_in(x), rope(0, x.shape[1], x.device)
        for layer in self.layers:
            h = layer(h, modulation, table, attend)
        return self.project_out(self.norm(h))

    @torch.no_grad()
    def follow(self, std: Tensor) -> None:
        """Follow ``std`` of the latents of all processes; once per step, before the loss."""
        follow(self.latent_std, std, STD_DECAY)

    def loss(self, z: Tensor, t: Tensor, noise: Tensor, *, detach: bool) -> dict[str, Tensor]:
        """Return the mean squared error of the velocity ("alignment"), and that of predicting zero, beside which it is
        to be read.

        z, noise (B, T, C), the noise standard normal; t (B,). Not detached, the gradient reaches z through the input
        and the target. An attached target rewards latents of low rank: watch "alignment_zero" and the effective rank.
        """
        z = z.detach().float() if detach else z.float()
        eps = self.latent_std * noise
        target = eps - z
        velocity = self(interpolate(z, eps, t), t).float()
        return {"alignment": (velocity - target).square().mean(), "alignment_zero": target.detach().square().mean()}
