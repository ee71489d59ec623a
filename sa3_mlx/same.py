"""SAME autoencoder: audio <-> latents (architecture spec, section 11).

Shapes: B batch, L audio samples, P patches, s patches per latent, T latent frames, C latent channels, D width,
N = T (s + 1) tokens: every latent is a group of s patch tokens and one latent token.
"""

from __future__ import annotations

from functools import partial

from . import blas  # noqa: F401 (before mlx)

# isort: split
import mlx.core as mx
import mlx.nn as nn

from .attention import Attend, SelfAttention, attend, attend_window, window_mask
from .layers import DynamicTanh, FeedForward, Rope, rope
from .spec.config import FF_MULT_SAME, SAMEConfig

LATENT_NOISE = 1e-3  # of running_std, on the latents, when decoder noise is asked for [B47]


def patch(audio: mx.array, size: int) -> mx.array:
    """(B, L, channels) -> (B, L / size, channels * size), channel-major [B38]."""
    batch, length, channels = audio.shape
    return audio.reshape(batch, length // size, size, channels).transpose(0, 1, 3, 2).flatten(2)


def unpatch(patches: mx.array, channels: int) -> mx.array:
    """(B, P, channels * size) -> (B, P * size, channels)"""
    batch, count, width = patches.shape
    return patches.reshape(batch, count, channels, width // channels).transpose(0, 1, 3, 2).flatten(1, 2)


class SAMEBlock(nn.Module):
    """x + attn(dyt(x)), then x + ff(dyt(x)) [B43]."""

    def __init__(self, width: int, *, sine_gate: bool) -> None:
        super().__init__()
        self.pre_norm = DynamicTanh(width)
        self.self_attn = SelfAttention(width, differential=True, head_norm=DynamicTanh)
        self.ff_norm = DynamicTanh(width)
        self.ff = FeedForward(width, FF_MULT_SAME, "sine" if sine_gate else "silu")

    def __call__(self, x: mx.array, table: Rope, attend: Attend) -> mx.array:
        x = x + self.self_attn(self.pre_norm(x), table, attend)
        return x + self.ff(self.ff_norm(x))


def run_blocks(layers: list[SAMEBlock], x: mx.array, config: SAMEConfig) -> mx.array:
    """The transformer over whole groups: (B, N, D) -> (B, N, D) [B41, B42]."""
    batch, length, width = x.shape
    group = config.stride + 1
    if config.attention == "sliding":
        table = rope(0, length)
        mask = window_mask(length // group, group)
        for layer in layers:
            x = layer(x, table, partial(attend_window, mask=mask))
        return x
    chunk, half = config.span * group, config.span * group // 2
    table = rope(0, chunk)  # positions restart in every chunk
    x = x.reshape(-1, chunk, width)  # (B chunks, chunk, D)
    for index, layer in enumerate(layers):
        if index == len(layers) // 2:  # from here on chunks are shifted by half, both ends repeated
            x = x.reshape(batch, length, width)
            x = mx.concatenate([x[:, :half], x, x[:, -half:]], axis=1).reshape(-1, chunk, width)
        x = layer(x, table, attend)
    return x.reshape(batch, -1, width)[:, half : half + length]


class Bottleneck(nn.Module):
    """Soft-norm: encode (x scale + bias) / running_std, decode only x running_std [B46]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = mx.ones(channels)
        self.bias = mx.zeros(channels)
        self.running_std = mx.ones(1)
        self.freeze(keys=["running_std"], recurse=False)  # an average, not trained

    def encode(self, x: mx.array) -> mx.array:
        return (x * self.scale + self.bias) / self.running_std

    def decode(self, z: mx.array) -> mx.array:
        return z * self.running_std


class Encoder(nn.Module):
    """Patches to latents before the bottleneck: (B, P, channels * patch) -> (B, T, C), whole chunks of P [B39]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.mapping = nn.Linear(audio_channels * config.patch_size, config.width)
        self.new_token = mx.zeros(config.width)
        self.layers = [SAMEBlock(config.width, sine_gate=False) for _ in range(config.encoder_depth)]
        self.project_out = nn.Linear(config.width, config.latent_channels)

    def __call__(self, patches: mx.array) -> mx.array:
        batch, count, _ = patches.shape
        frames, stride, width = count // self.config.stride, self.config.stride, self.config.width
        x = self.mapping(patches).reshape(batch, frames, stride, width)  # (B, T, s, D)
        x = mx.concatenate([x, mx.broadcast_to(self.new_token, (batch, frames, 1, width))], axis=2)
        x = run_blocks(self.layers, x.flatten(1, 2), self.config)
        return self.project_out(x.reshape(batch, frames, stride + 1, width)[:, :, -1])


class Decoder(nn.Module):
    """Latents to patches: (B, T, C) -> (B, T s, channels * patch) [B39, B40]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.project_in = nn.Linear(config.latent_channels, config.width)
        self.new_token = mx.zeros(config.width)
        self.layers = [
            SAMEBlock(config.width, sine_gate=config.decoder_depth - i <= config.sine_gate_layers)
            for i in range(config.decoder_depth)
        ]
        self.mapping = nn.Linear(config.decoder_kernel * config.width, audio_channels * config.patch_size)

    def __call__(self, z: mx.array, token_noise: mx.array | None = None) -> mx.array:
        """``token_noise`` (B, T, s, D): standard normals for the new tokens [B47]."""
        batch, frames, _ = z.shape
        stride, width = self.config.stride, self.config.width
        missing = -frames % self.config.frame_multiple
        x = mx.pad(self.project_in(z), [(0, 0), (0, missing), (0, 0)])  # zeros behind the Linear [B39]
        tokens = mx.broadcast_to(self.new_token, (batch, frames + missing, stride, width))
        if token_noise is not None:
            tokens = tokens + self.config.token_noise * mx.pad(token_noise, [(0, 0), (0, missing), (0, 0), (0, 0)])
        x = mx.concatenate([x[:, :, None], tokens], axis=2)  # (B, T, 1 + s, D)
        x = run_blocks(self.layers, x.flatten(1, 2), self.config)
        x = x.reshape(batch, frames + missing, stride + 1, width)[:, :, 1:].flatten(1, 2)  # (B, P, D)
        if self.config.decoder_kernel == 3:  # zero 'same' padding over the whole padded sequence
            y = mx.pad(x, [(0, 0), (1, 1), (0, 0)])
            x = mx.concatenate([y[:, :-2], x, y[:, 2:]], axis=-1)
        return self.mapping(x)[:, : frames * stride]


class SAME(nn.Module):
    """The autoencoder. Latents are (B, T, C); audio is (B, L, channels), not limited to [-1, 1]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.audio_channels = audio_channels
        self.bottleneck = Bottleneck(config.latent_channels)
        self.encoder = Encoder(config, audio_channels)
        self.decoder = Decoder(config, audio_channels)

    def encode(self, audio: mx.array) -> mx.array:
        """(B, L, channels) -> (B, ceil(L / R), C); the end is padded with zeros [B39, decision 5]."""
        size = self.config.samples_per_latent
        frames = -(-audio.shape[1] // size)
        audio = mx.pad(audio, [(0, 0), (0, -audio.shape[1] % (size * self.config.frame_multiple)), (0, 0)])
        return self.bottleneck.encode(self.encoder(patch(audio, self.config.patch_size)))[:, :frames]

    def decode(
        self, z: mx.array, latent_noise: mx.array | None = None, token_noise: mx.array | None = None
    ) -> mx.array:
        """(B, T, C) -> (B, T R, channels). The noises are standard normals, (B, T, C) and (B, T, s, D) [B47]."""
        z = self.bottleneck.decode(z)
        if latent_noise is not None:
            z = z + LATENT_NOISE * self.bottleneck.running_std * latent_noise
        return unpatch(self.decoder(z, token_noise), self.audio_channels)
