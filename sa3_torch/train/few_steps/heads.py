"""Heads of the latent discriminator: hidden states to a map of scores [T7.1].

What stands at frames that are not valid changes no score: it is zeroed before every convolution, and group norm takes
its statistics over valid positions only. All convolutions pad so that n frames give ceil(n / stride) positions; the
official last kernel of 4 without padding, which needs 64 frames, differs in that.

Shapes: B batch, T latent frames, N positions of scores, W channels. Channels-first inside.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.run.settings import check

Map = tuple[Tensor, Tensor]  # values (B, W, N), mask (B, N) bool


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Config):
    """Describe ``layers`` strided convolutions, as the official default, and one to a score."""

    layers: int
    width: int
    groups: int  # of group norm
    kernel: int  # of the last convolution

    def __post_init__(self) -> None:
        check(self, 1, 8, "layers", "kernel")
        check(self, 1, 1 << 14, "width", "groups")
        if self.width % self.groups:
            raise ConfigError(f"head.width is {self.width}: expected a multiple of its {self.groups} groups")


class MaskedGroupNorm(nn.Module):
    """Apply group norm whose statistics, in fp32, are those of valid positions."""

    def __init__(self, groups: int, width: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, W, N), mask (B, N) to (B, W, N) float32, zero where not valid."""
        mask = mask[:, None, None]  # (B, 1, 1, N)
        grouped = torch.where(mask, x.float().unflatten(1, (self.groups, -1)), 0.0)  # (B, G, W / G, N)
        count = mask.sum((2, 3), keepdim=True).clamp_min(1) * grouped.shape[2]
        mean = grouped.sum((2, 3), keepdim=True) / count
        centred = torch.where(mask, grouped - mean, 0.0)
        variance = centred.square().sum((2, 3), keepdim=True) / count
        normed = (centred * torch.rsqrt(variance + 1e-5)).flatten(1, 2)
        return torch.where(mask[:, 0], normed * self.weight[:, None] + self.bias[:, None], 0.0)


class Strided(nn.Module):
    """Halve the positions: convolution k4 s2 p1, group norm, SiLU."""

    def __init__(self, width_in: int, width: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width_in, width, 4, stride=2, padding=1)
        self.norm = MaskedGroupNorm(groups, width)

    def forward(self, values: Tensor, mask: Tensor) -> Map:
        rest = values.shape[-1] % 2
        values, mask = F.pad(values, (0, rest)), F.pad(mask, (0, rest))
        mask = mask.unflatten(1, (-1, 2)).any(-1)
        return F.silu(self.norm(self.conv(values), mask)), mask


class Head(nn.Module):
    """Map hidden states (B, T, width_in) and their mask (B, T) to scores (B, N) float32 and their mask (B, N)."""

    def __init__(self, config: HeadConfig, width_in: int) -> None:
        super().__init__()
        self.kernel = config.kernel
        widths = [width_in, *[config.width] * config.layers]
        self.layers = nn.ModuleList(Strided(a, b, config.groups) for a, b in itertools.pairwise(widths))
        self.project_out = nn.Conv1d(config.width, 1, config.kernel)

    def forward(self, hidden: Tensor, valid: Tensor) -> Map:
        mask = valid
        values = torch.where(mask[..., None], hidden.float(), 0.0).transpose(1, 2)  # (B, W, T)
        for layer in self.layers:
            values, mask = layer(values, mask)
        before = (self.kernel - 1) // 2
        scores = self.project_out(F.pad(values, (before, self.kernel - 1 - before)))
        return scores[:, 0].float(), mask
