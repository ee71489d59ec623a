"""Turn audio into latents and back with the SAME autoencoder [A11].

Shapes: B batch, L audio samples, P patches, s patches per latent, T latent frames, C latent channels, D width,
N = T (s + 1) tokens: every latent is a group of s patch tokens and one latent token.
"""

from __future__ import annotations

from sa3_mlx.common.model.config import SAMEConfig
from sa3_mlx.runtime import mx, nn

from .attention import Attend, Heads, Near, SelfAttention, window_mask
from .layers import DynamicTanh, FeedForward, Rope, rope

LATENT_NOISE = 1e-3  # of running_std, on the latents, when decoder noise is asked for [B47]


def patch(audio: mx.array, size: int) -> mx.array:
    """Return patches (B, L / size, channels * size) of (B, L, channels), channel-major [B38]."""
    batch, length, channels = audio.shape
    return audio.reshape(batch, length // size, size, channels).transpose(0, 1, 3, 2).flatten(2)


def unpatch(patches: mx.array, channels: int) -> mx.array:
    """Return (B, P * size, channels) of patches (B, P, channels * size)."""
    batch, count, width = patches.shape
    return patches.reshape(batch, count, channels, width // channels).transpose(0, 1, 3, 2).flatten(1, 2)


class SAMEBlock(nn.Module):
    """Return x + attn(dyt(x)), then x + ff(dyt(x)) [B43]."""

    def __init__(self, config: SAMEConfig, *, sine_gate: bool) -> None:
        super().__init__()
        self.pre_norm = DynamicTanh(config.width)
        self.self_attn = SelfAttention(config.width, differential=True, head_norm=DynamicTanh)
        self.ff_norm = DynamicTanh(config.width)
        self.ff = FeedForward(config.width, config.ff_mult, "sine" if sine_gate else "silu")

    def heads(self, x: mx.array) -> Heads:
        """Return what attention makes of every token (B, N, D) by itself: see ``SelfAttention.heads``."""
        return self.self_attn.heads(self.pre_norm(x))

    def __call__(self, x: mx.array, table: Rope, attend: Attend, heads: Heads | None = None) -> mx.array:
        """Map (B, N, D) to (B, N, D); ``heads`` are those of x, where they are known already."""
        if heads is None:
            x = x + self.self_attn(self.pre_norm(x), table, attend)
        else:
            x = x + self.self_attn.mix(heads, table, table, attend)
        return x + self.ff(self.ff_norm(x))

    def at(self, x: mx.array, rows: slice, table: Rope, attend: Attend) -> mx.array:
        """Return the result for the tokens ``rows`` only: a last layer of which nothing else is read."""
        x = x[:, rows] + self.self_attn.at(self.pre_norm(x), rows, table, attend)
        return x + self.ff(self.ff_norm(x))


def run_blocks(
    layers: list[SAMEBlock], x: mx.array, config: SAMEConfig, heads: Heads | None, *, latents_only: bool
) -> mx.array:
    """Run the transformer over whole groups: (B, N, D) -> (B, N, D) [B41, B42].

    ``latents_only``: -> (B, T, D), the last token of every group, all that an encoder reads. ``heads``: those of x in
    the first layer, where they are known already.
    """
    run = _run_sliding if config.attention == "sliding" else _run_chunked
    return run(layers, x, config, heads, latents_only)


def _run_sliding(
    layers: list[SAMEBlock], x: mx.array, config: SAMEConfig, heads: Heads | None, latents_only: bool
) -> mx.array:
    length, group = x.shape[1], config.stride + 1
    table, mask = rope(0, length), window_mask(length // group, group)
    for layer in layers[:-1]:
        x, heads = layer(x, table, Near(mask), heads), None
    if latents_only:
        rows = slice(group - 1, None, group)
        return layers[-1].at(x, rows, table, Near(mask[:, rows]))
    return layers[-1](x, table, Near(mask), heads)


def _run_chunked(
    layers: list[SAMEBlock], x: mx.array, config: SAMEConfig, heads: Heads | None, latents_only: bool
) -> mx.array:
    batch, length, width = x.shape
    group = config.stride + 1
    chunk, half = config.span * group, config.span * group // 2
    table = rope(0, chunk)  # positions restart in every chunk
    for layer in layers[: len(layers) // 2]:
        x, heads = layer(_fold(x, chunk), table, Near(), _fold_heads(heads, chunk)).reshape(x.shape), None
    x = mx.concatenate([x[:, :half], x, x[:, -half:]], axis=1)  # chunks shifted by half, both ends repeated
    x = _fold(x, chunk)  # (B chunks, chunk, D)
    for layer in layers[len(layers) // 2 : -1]:
        x = layer(x, table, Near())
    if not latents_only:
        return layers[-1](x, table, Near()).reshape(batch, -1, width)[:, half : half + length]
    first = (half + group - 1) % group  # where a chunk has its first latent token
    x = layers[-1].at(x, slice(first, None, group), table, Near()).reshape(batch, -1, width)
    before = -(-(half - first) // group)  # latent tokens in the repeated end
    return x[:, before : before + length // group]


def _fold(x: mx.array, chunk: int) -> mx.array:
    """Return (B N / chunk, chunk, ...) of (B, N, ...)."""
    return x.reshape(-1, chunk, *x.shape[2:])


def _fold_heads(heads: Heads | None, chunk: int) -> Heads | None:
    return None if heads is None else (_fold(heads[0], chunk), _fold(heads[1], chunk), _fold(heads[2], chunk))


class Bottleneck(nn.Module):
    """Norm softly: encode (x scale + bias) / running_std, decode only x running_std [B46]."""

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
    """Encode patches (B, P, channels * patch), whole chunks, to latents before the bottleneck (B, T, C) [B39]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.mapping = nn.Linear(audio_channels * config.patch_size, config.width)
        self.new_token = mx.zeros(config.width)
        self.layers = [SAMEBlock(config, sine_gate=False) for _ in range(config.encoder_depth)]
        self.project_out = nn.Linear(config.width, config.latent_channels)

    def __call__(self, patches: mx.array) -> mx.array:
        batch, count, _ = patches.shape
        frames, stride, width = count // self.config.stride, self.config.stride, self.config.width
        x = self.mapping(patches).reshape(batch, frames, stride, width)  # (B, T, s, D)
        x = mx.concatenate([x, mx.broadcast_to(self.new_token, (batch, frames, 1, width))], axis=2)
        return self.project_out(run_blocks(self.layers, x.flatten(1, 2), self.config, None, latents_only=True))


class Decoder(nn.Module):
    """Decode latents (B, T, C) to patches (B, T s, channels * patch) [B39, B40]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.project_in = nn.Linear(config.latent_channels, config.width)
        self.new_token = mx.zeros(config.width)
        self.layers = [
            SAMEBlock(config, sine_gate=config.decoder_depth - i <= config.sine_gate_layers)
            for i in range(config.decoder_depth)
        ]
        self.mapping = nn.Linear(config.decoder_kernel * config.width, audio_channels * config.patch_size)

    def __call__(self, z: mx.array, token_noise: mx.array | None = None) -> mx.array:
        """Decode, with normals ``token_noise`` (B, T, s, D) for the new tokens, T with or without the padding [B47]."""
        batch, frames, _ = z.shape
        stride, width = self.config.stride, self.config.width
        missing = -frames % self.config.frame_multiple
        x = mx.pad(self.project_in(z), [(0, 0), (0, missing), (0, 0)])  # zeros after the Linear [B39]
        new = mx.broadcast_to(self.new_token, (batch, 1, width))
        heads = None
        if token_noise is None:  # all new tokens are one: the first layer makes its heads once
            q, k, v = self.layers[0].heads(mx.concatenate([x, new], axis=1))
            heads = self._spread(q), self._spread(k), self._spread(v)
            x = self._spread(mx.concatenate([x, new], axis=1))  # (B, N, D)
        else:
            noise = mx.pad(token_noise, [(0, 0), (0, x.shape[1] - token_noise.shape[1]), (0, 0), (0, 0)])
            x = mx.concatenate([x[:, :, None], new[:, None] + self.config.token_noise * noise], axis=2).flatten(1, 2)
        x = run_blocks(self.layers, x, self.config, heads, latents_only=False)
        x = x.reshape(batch, frames + missing, stride + 1, width)[:, :, 1:].flatten(1, 2)  # (B, P, D)
        if self.config.decoder_kernel == 3:  # zero 'same' padding over the whole padded sequence
            y = mx.pad(x, [(0, 0), (1, 1), (0, 0)])
            x = mx.concatenate([y[:, :-2], x, y[:, 2:]], axis=-1)
        return self.mapping(x)[:, : frames * stride]

    def _spread(self, x: mx.array) -> mx.array:
        """Give every token of the groups, (B, N, ...), what its latent or, last, the new token has, (B, T + 1, ...)."""
        latents, new = x[:, :-1, None], x[:, -1:, None]
        new = mx.broadcast_to(new, (*latents.shape[:2], self.config.stride, *x.shape[2:]))
        return mx.concatenate([latents, new], axis=2).flatten(1, 2)


class SAME(nn.Module):
    """Hold the autoencoder. Latents are (B, T, C); audio is (B, L, channels), not limited to [-1, 1]."""

    def __init__(self, config: SAMEConfig, audio_channels: int) -> None:
        super().__init__()
        self.config = config
        self.audio_channels = audio_channels
        self.bottleneck = Bottleneck(config.latent_channels)
        self.encoder = Encoder(config, audio_channels)
        self.decoder = Decoder(config, audio_channels)

    def encode(self, audio: mx.array) -> mx.array:
        """Encode (B, L, channels) to (B, ceil(L / R), C); the end is padded with zeros [B39, A15.5]."""
        size = self.config.samples_per_latent
        frames = -(-audio.shape[1] // size)
        audio = mx.pad(audio, [(0, 0), (0, -audio.shape[1] % (size * self.config.frame_multiple)), (0, 0)])
        return self.bottleneck.encode(self.encoder(patch(audio, self.config.patch_size)))[:, :frames]

    def decode(
        self, z: mx.array, latent_noise: mx.array | None = None, token_noise: mx.array | None = None
    ) -> mx.array:
        """Decode (B, T, C) to (B, T R, channels). The noises are normals, (B, T, C) and (B, T, s, D) [B47]."""
        z = self.bottleneck.decode(z)
        if latent_noise is not None:
            z = z + LATENT_NOISE * self.bottleneck.running_std * latent_noise
        return unpatch(self.decoder(z, token_noise), self.audio_channels)
