"""SAME autoencoder: audio <-> latents (architecture spec, section 11).

Shapes: B batch, L audio samples, P patches, s patches per latent, T latent frames, C latent channels, D width,
N = T (s + 1) tokens: every latent is a group of s patch tokens and one latent token.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.spec.config import FF_MULT_SAME, SAMEConfig

from .attention import Attend, SelfAttention, attend, attend_window, window_mask
from .layers import DynamicTanh, FeedForward, Rope, rope

LATENT_NOISE = 1e-3  # of running_std, on the latents, when decoder noise is asked for [B47]


def patch(audio: Tensor, size: int) -> Tensor:
    """(B, L, channels) -> (B, L / size, channels * size), channel-major [B38]."""
    return audio.unflatten(1, (-1, size)).transpose(2, 3).flatten(2)


def unpatch(patches: Tensor, channels: int) -> Tensor:
    """(B, P, channels * size) -> (B, P * size, channels)"""
    return patches.unflatten(2, (channels, -1)).transpose(2, 3).flatten(1, 2)


class SAMEBlock(nn.Module):
    """x + attn(dyt(x)), then x + ff(dyt(x)) [B43]."""

    def __init__(self, width: int, *, sine_gate: bool) -> None:
        super().__init__()
        self.pre_norm = DynamicTanh(width)
        self.self_attn = SelfAttention(width, differential=True, head_norm=DynamicTanh)
        self.ff_norm = DynamicTanh(width)
        self.ff = FeedForward(width, FF_MULT_SAME, "sine" if sine_gate else "silu")

    def forward(self, x: Tensor, table: Rope, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.pre_norm(x), table, attend)
        return x + self.ff(self.ff_norm(x))


def run_blocks(layers: nn.ModuleList, x: Tensor, config: SAMEConfig) -> Tensor:
    """The transformer over whole groups: (B, N, D) -> (B, N, D) [B41, B42]."""
    batch, length, width = x.shape
    group = config.stride + 1
    if config.attention == "sliding":
        table = rope(0, length, x.device)
        mask = window_mask(length // group, group, x.device)
        for layer in layers:
            x = layer(x, table, partial(attend_window, mask=mask))
        return x
    chunk, half = config.span * group, config.span * group // 2
    table = rope(0, chunk, x.device)  # positions restart in every chunk
    x = x.reshape(-1, chunk, width)  # (B chunks, chunk, D)
    for index, layer in enumerate(layers):
        if index == len(layers) // 2:  # from here on chunks are shifted by half, both ends repeated
            x = x.reshape(batch, length, width)
            x = torch.cat([x[:, :half], x, x[:, -half:]], dim=1).reshape(-1, chunk, width)
        x = layer(x, table, attend)
    return x.reshape(batch, -1, width)[:, half : half + length]


class Bottleneck(nn.Module):
    """Soft-norm: encode (x scale + bias) / running_std, decode only x running_std [B46]."""

    running_std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(1))

    def encode(self, x: Tensor) -> Tensor:
        return (x * self.scale + self.bias) / self.running_std

    def decode(self, z: Tensor) -> Tensor:
        return z * self.running_std


class Encoder(nn.Module):
    """Patches to latents before the bottleneck: (B, P, channels * patch) -> (B, T, C), whole chunks of P [B39]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.mapping = nn.Linear(audio_channels * config.patch_size, config.width)
        self.new_token = nn.Parameter(torch.zeros(config.width))
        self.layers = nn.ModuleList(SAMEBlock(config.width, sine_gate=False) for _ in range(config.encoder_depth))
        self.project_out = nn.Linear(config.width, config.latent_channels)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.mapping(patches).unflatten(1, (-1, self.config.stride))  # (B, T, s, D)
        x = torch.cat([x, self.new_token.to(x.dtype).expand(*x.shape[:2], 1, -1)], dim=2)
        x = run_blocks(self.layers, x.flatten(1, 2), self.config)
        return self.project_out(x.unflatten(1, (-1, self.config.stride + 1))[:, :, -1])


class Decoder(nn.Module):
    """Latents to patches: (B, T, C) -> (B, T s, channels * patch) [B39, B40]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.project_in = nn.Linear(config.latent_channels, config.width)
        self.new_token = nn.Parameter(torch.zeros(config.width))
        self.layers = nn.ModuleList(
            SAMEBlock(config.width, sine_gate=config.decoder_depth - i <= config.sine_gate_layers)
            for i in range(config.decoder_depth)
        )
        self.mapping = nn.Linear(config.decoder_kernel * config.width, audio_channels * config.patch_size)

    def forward(self, z: Tensor, token_noise: Tensor | None = None) -> Tensor:
        """``token_noise`` (B, T, s, D): standard normals for the new tokens [B47]."""
        frames = z.shape[1]
        x = self.project_in(z)
        x = F.pad(x, (0, 0, 0, -frames % self.config.frame_multiple))  # zeros behind the Linear [B39]
        tokens = self.new_token.to(x.dtype).expand(*x.shape[:2], self.config.stride, -1)
        if token_noise is not None:
            missing = x.shape[1] - token_noise.shape[1]
            tokens = tokens + self.config.token_noise * F.pad(token_noise, (0, 0, 0, 0, 0, missing))
        x = torch.cat([x[:, :, None], tokens], dim=2)  # (B, T, 1 + s, D)
        x = run_blocks(self.layers, x.flatten(1, 2), self.config)
        x = x.unflatten(1, (-1, self.config.stride + 1))[:, :, 1:].flatten(1, 2)  # (B, P, D)
        if self.config.decoder_kernel == 3:  # zero 'same' padding over the whole padded sequence
            x = torch.cat([F.pad(x, (0, 0, 1, 0))[:, :-1], x, F.pad(x, (0, 0, 0, 1))[:, 1:]], dim=-1)
        return self.mapping(x)[:, : frames * self.config.stride]


class SAME(nn.Module):
    """The autoencoder. Latents are (B, T, C); audio is (B, L, channels), not limited to [-1, 1]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.audio_channels = audio_channels
        self.bottleneck = Bottleneck(config.latent_channels)
        self.encoder = Encoder(config, audio_channels)
        self.decoder = Decoder(config, audio_channels)

    def encode(self, audio: Tensor) -> Tensor:
        """(B, L, channels) -> (B, ceil(L / R), C); the end is padded with zeros [B39, decision 5]."""
        size = self.config.samples_per_latent
        frames = -(-audio.shape[1] // size)
        audio = F.pad(audio, (0, 0, 0, -audio.shape[1] % (size * self.config.frame_multiple)))
        return self.bottleneck.encode(self.encoder(patch(audio, self.config.patch_size)))[:, :frames]

    def decode(self, z: Tensor, latent_noise: Tensor | None = None, token_noise: Tensor | None = None) -> Tensor:
        """(B, T, C) -> (B, T R, channels). The noises are standard normals, (B, T, C) and (B, T, s, D) [B47]."""
        z = self.bottleneck.decode(z)
        if latent_noise is not None:
            z = z + LATENT_NOISE * self.bottleneck.running_std * latent_noise
        return unpatch(self.decoder(z, token_noise), self.audio_channels)
