"""Turn audio into latents and back with the SAME autoencoder [A11].

Shapes: B batch, L audio samples, P patches, s patches per latent, T latent frames, C latent channels, D width,
N = T (s + 1) tokens: every latent is a group of s patch tokens and one latent token.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.common.model.config import SAMEConfig

from .attention import Attend, Heads, SelfAttention, attend, attend_window, window_mask
from .layers import DynamicTanh, FeedForward, Function, Rope, compiled_block, rope

LATENT_NOISE = 1e-3  # of running_std, on the latents, when decoder noise is asked for [B47]


def patch(audio: Tensor, size: int) -> Tensor:
    """Return patches (B, L / size, channels * size) of (B, L, channels), channel-major [B38]."""
    return audio.unflatten(1, (-1, size)).transpose(2, 3).flatten(2)


def unpatch(patches: Tensor, channels: int) -> Tensor:
    """Return (B, P * size, channels) of patches (B, P, channels * size)."""
    return patches.unflatten(2, (channels, -1)).transpose(2, 3).flatten(1, 2)


class SAMEBlock(nn.Module):
    """Return x + attn(dyt(x)), then x + ff(dyt(x)) [B43]."""

    def __init__(self, config: SAMEConfig, *, sine_gate: bool) -> None:
        super().__init__()
        self.pre_norm = DynamicTanh(config.width)
        self.self_attn = SelfAttention(config.width, differential=True, head_norm=DynamicTanh)
        self.ff_norm = DynamicTanh(config.width)
        self.ff = FeedForward(config.width, config.ff_mult, "sine" if sine_gate else "silu")

    def heads(self, x: Tensor) -> Heads:
        """Return what attention makes of every token (B, N, D) by itself: see ``SelfAttention.heads``."""
        return self.self_attn.heads(self.pre_norm(x))

    def forward(self, x: Tensor, table: Rope, attend: Attend, heads: Heads | None = None) -> Tensor:
        """Map (B, N, D) to (B, N, D); ``heads`` are those of x, where they are known already."""
        x = x + self.self_attn.mix(heads or self.self_attn.heads(self.pre_norm(x)), table, table, attend)
        return x + self.ff(self.ff_norm(x))

    def at(self, x: Tensor, rows: slice, table: Rope, attend: Attend) -> Tensor:
        """Return the result for the tokens ``rows`` only: a last layer of which nothing else is read."""
        x = x[:, rows] + self.self_attn.at(self.pre_norm(x), rows, table, attend)
        return x + self.ff(self.ff_norm(x))


def run_blocks(
    layers: nn.ModuleList, x: Tensor, config: SAMEConfig, heads: Heads | None, *, latents_only: bool
) -> Tensor:
    """Run the transformer over whole groups: (B, N, D) -> (B, N, D) [B41, B42].

    ``latents_only``: -> (B, T, D), the last token of every group, all that an encoder reads. ``heads``: those of x in
    the first layer, where they are known already.
    """
    run = _run_sliding if config.attention == "sliding" else _run_chunked
    return run(layers, x, config, heads, latents_only)


def _run_sliding(
    layers: nn.ModuleList, x: Tensor, config: SAMEConfig, heads: Heads | None, latents_only: bool
) -> Tensor:
    length, group = x.shape[1], config.stride + 1
    table, mask = rope(0, length, x.device), window_mask(length // group, group, x.device)
    for layer in layers[:-1]:
        x, heads = _ready(layer)(x, table, partial(attend_window, mask=mask), heads), None
    if latents_only:
        rows = slice(group - 1, None, group)
        return cast(SAMEBlock, layers[-1]).at(x, rows, table, partial(attend_window, mask=mask[:, rows]))
    return _ready(layers[-1])(x, table, partial(attend_window, mask=mask), heads)


def _run_chunked(
    layers: nn.ModuleList, x: Tensor, config: SAMEConfig, heads: Heads | None, latents_only: bool
) -> Tensor:
    batch, length, width = x.shape
    group = config.stride + 1
    chunk, half = config.span * group, config.span * group // 2
    table = rope(0, chunk, x.device)  # positions restart in every chunk
    for layer in layers[: len(layers) // 2]:
        x, heads = _ready(layer)(_fold(x, chunk), table, attend, _fold_heads(heads, chunk)).reshape(x.shape), None
    x = torch.cat([x[:, :half], x, x[:, -half:]], dim=1)  # chunks shifted by half, both ends repeated
    x = _fold(x, chunk)  # (B chunks, chunk, D)
    for layer in layers[len(layers) // 2 : -1]:
        x = _ready(layer)(x, table, attend)
    if not latents_only:
        return _ready(layers[-1])(x, table, attend).reshape(batch, -1, width)[:, half : half + length]
    first = (half + group - 1) % group  # where a chunk has its first latent token
    x = cast(SAMEBlock, layers[-1]).at(x, slice(first, None, group), table, attend).reshape(batch, -1, width)
    before = -(-(half - first) // group)  # latent tokens in the repeated end
    return x[:, before : before + length // group]


def _ready(layer: nn.Module) -> Function:
    return compiled_block(layer, "compiled_decoder")


def _fold(x: Tensor, chunk: int) -> Tensor:
    """Return (B N / chunk, chunk, ...) of (B, N, ...)."""
    return x.reshape(-1, chunk, *x.shape[2:])


def _fold_heads(heads: Heads | None, chunk: int) -> Heads | None:
    return None if heads is None else (_fold(heads[0], chunk), _fold(heads[1], chunk), _fold(heads[2], chunk))


class Bottleneck(nn.Module):
    """Norm softly: encode (x scale + bias) / running_std, decode only x running_std [B46]."""

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
    """Encode patches (B, P, channels * patch), whole chunks, to latents before the bottleneck (B, T, C) [B39]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.mapping = nn.Linear(audio_channels * config.patch_size, config.width)
        self.new_token = nn.Parameter(torch.zeros(config.width))
        self.layers = nn.ModuleList(SAMEBlock(config, sine_gate=False) for _ in range(config.encoder_depth))
        self.project_out = nn.Linear(config.width, config.latent_channels)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.mapping(patches).unflatten(1, (-1, self.config.stride))  # (B, T, s, D)
        x = torch.cat([x, self.new_token.to(x.dtype).expand(*x.shape[:2], 1, -1)], dim=2)
        return self.project_out(run_blocks(self.layers, x.flatten(1, 2), self.config, None, latents_only=True))


class Decoder(nn.Module):
    """Decode latents (B, T, C) to patches (B, T s, channels * patch) [B39, B40]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.project_in = nn.Linear(config.latent_channels, config.width)
        self.new_token = nn.Parameter(torch.zeros(config.width))
        self.layers = nn.ModuleList(
            SAMEBlock(config, sine_gate=config.decoder_depth - i <= config.sine_gate_layers)
            for i in range(config.decoder_depth)
        )
        self.mapping = nn.Linear(config.decoder_kernel * config.width, audio_channels * config.patch_size)

    def forward(self, z: Tensor, token_noise: Tensor | None = None) -> Tensor:
        """Decode, with normals ``token_noise`` (B, T, s, D) for the new tokens, T with or without the padding [B47]."""
        frames = z.shape[1]
        x = self.project_in(z)
        x = F.pad(x, (0, 0, 0, -frames % self.config.frame_multiple))  # zeros after the Linear [B39]
        new = self.new_token.to(x.dtype).expand(len(x), 1, -1)
        heads = None
        if token_noise is None:  # all new tokens are one: the first layer makes its heads once
            q, k, v = cast(SAMEBlock, self.layers[0]).heads(torch.cat([x, new], dim=1))
            heads = self._spread(q), self._spread(k), self._spread(v)
            x = self._spread(torch.cat([x, new], dim=1))  # (B, N, D)
        else:
            noise = F.pad(token_noise, (0, 0, 0, 0, 0, x.shape[1] - token_noise.shape[1]))
            x = torch.cat([x[:, :, None], new[:, None] + self.config.token_noise * noise], dim=2).flatten(1, 2)
        x = run_blocks(self.layers, x, self.config, heads, latents_only=False)
        x = x.unflatten(1, (-1, self.config.stride + 1))[:, :, 1:].flatten(1, 2)  # (B, P, D)
        if self.config.decoder_kernel == 3:  # zero 'same' padding over the whole padded sequence
            x = torch.cat([F.pad(x, (0, 0, 1, 0))[:, :-1], x, F.pad(x, (0, 0, 0, 1))[:, 1:]], dim=-1)
        return self.mapping(x)[:, : frames * self.config.stride]

    def _spread(self, x: Tensor) -> Tensor:
        """Give every token of the groups, (B, N, ...), what its latent or, last, the new token has, (B, T + 1, ...)."""
        latents, new = x[:, :-1, None], x[:, -1:, None]
        new = new.expand(*latents.shape[:2], self.config.stride, *x.shape[2:])
        return torch.cat([latents, new], dim=2).flatten(1, 2)


class SAME(nn.Module):
    """Hold the autoencoder. Latents are (B, T, C); audio is (B, L, channels), not limited to [-1, 1]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.audio_channels = audio_channels
        self.bottleneck = Bottleneck(config.latent_channels)
        self.encoder = Encoder(config, audio_channels)
        self.decoder = Decoder(config, audio_channels)

    def encode(self, audio: Tensor) -> Tensor:
        """Encode (B, L, channels) to (B, ceil(L / R), C); the end is padded with zeros [B39, A15.5]."""
        size = self.config.samples_per_latent
        frames = -(-audio.shape[1] // size)
        audio = F.pad(audio, (0, 0, 0, -audio.shape[1] % (size * self.config.frame_multiple)))
        return self.bottleneck.encode(self.encoder(patch(audio, self.config.patch_size)))[:, :frames]

    def decode(self, z: Tensor, latent_noise: Tensor | None = None, token_noise: Tensor | None = None) -> Tensor:
        """Decode (B, T, C) to (B, T R, channels). The noises are normals, (B, T, C) and (B, T, s, D) [B47]."""
        z = self.bottleneck.decode(z)
        if latent_noise is not None:
            z = z + LATENT_NOISE * self.bottleneck.running_std * latent_noise
        return unpatch(self.decoder(z, token_noise), self.audio_channels)
