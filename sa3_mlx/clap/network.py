"""Compare latents, at any noise level, with texts by two towers of unit vectors, a latent CLAP [T6].

    a = clap.embed_audio(latents, valid, t)
    u = clap.embed_states(*text_encoder_states_and_mask)
    cosine = (a * u).sum(1)

Shapes: B batch, T latent frames, C latent channels, N tokens of P frames, D width, S text tokens, Dt text width, E size
of the shared vectors. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from sa3_mlx.attention import Attend, SelfAttention, attend
from sa3_mlx.common.model.config import TIMESTEP_FEATURES, DiTConfig, LatentClapConfig, TowerConfig
from sa3_mlx.dit import BLOCK_EPS, head_rms_norm, timestep_features
from sa3_mlx.layers import MLP, FeedForward, RMSNorm, Rope, add_gated, modulate, rope
from sa3_mlx.runtime import mx, nn


class ModulatedBlock(nn.Module):
    """Apply modulated self-attention and feed-forward as in the DiT."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_shift_gate = mx.zeros(6 * width)
        self.pre_norm = RMSNorm(width, BLOCK_EPS)
        self.self_attn = SelfAttention(width, differential=False, head_norm=head_rms_norm)
        self.ff_norm = RMSNorm(width, BLOCK_EPS)
        self.ff = FeedForward(width, DiTConfig.ff_mult, "silu")

    def __call__(self, x: mx.array, modulation: mx.array, table: Rope, attend: Attend) -> mx.array:
        """Map x (B, N, D), with modulation (B, 6 D), to (B, N, D)."""
        parts = (self.scale_shift_gate + modulation)[:, None].split(6, axis=-1)  # (B, 1, D) each
        scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = parts
        h = self.self_attn(modulate(self.pre_norm(x), 1 + scale_a, shift_a), table, attend)
        x = add_gated(x, h, mx.sigmoid(1 - gate_a))
        h = self.ff(modulate(self.ff_norm(x), 1 + scale_f, shift_f))
        return add_gated(x, h, mx.sigmoid(1 - gate_f))


class AudioTower(nn.Module):
    """Run a transformer over latents, told their noise level; the mean of its tokens is projected.

    Of longer latents than ``max_frames`` it sees one window of so many frames after the other.
    """

    def __init__(self, config: TowerConfig, latent_channels: int, max_frames: int | None) -> None:
        super().__init__()
        width = config.width
        self.frames_per_token = config.frames_per_token
        self.max_tokens = None if max_frames is None else max_frames // config.frames_per_token
        self.to_timestep_embed = MLP(TIMESTEP_FEATURES, width, width, bias=True)
        self.to_modulation = MLP(width, width, 6 * width, bias=True)
        self.project_in = nn.Linear(config.frames_per_token * latent_channels, width)
        self.layers = [ModulatedBlock(width) for _ in range(config.depth)]
        self.norm = RMSNorm(width, BLOCK_EPS)
        self.projection = MLP(width, width, config.embedding, bias=True)

    def __call__(self, x: mx.array, valid: mx.array, t: mx.array) -> mx.array:
        """Embed x (B, T, C), valid (B, T) bool, t (B,) -> (B, E). Raises ValueError for an item without a
        valid frame."""
        return self.projection(self.pooled(x, valid, t))

    def pooled(self, x: mx.array, valid: mx.array, t: mx.array) -> mx.array:
        """Return what is projected: (B, D) float32, the mean over tokens."""
        empty = np.flatnonzero(~np.array(valid.any(axis=1)))
        if len(empty):
            raise ValueError(f"item(s) {', '.join(map(str, empty))} have no valid frame: leave them out")
        size, batch = self.frames_per_token, len(x)
        rest = -x.shape[1] % size
        x = mx.pad(mx.where(valid[..., None], x, 0.0), [(0, 0), (0, rest), (0, 0)])
        real = mx.pad(valid, [(0, 0), (0, rest)]).reshape(batch, -1, size).any(axis=-1)  # (B, N)
        h = self.project_in(x.reshape(batch, real.shape[1], -1))  # (B, N, D)
        length = min(h.shape[1], self.max_tokens or h.shape[1])  # of a window
        more = -h.shape[1] % length
        h, real = mx.pad(h, [(0, 0), (0, more), (0, 0)]), mx.pad(real, [(0, 0), (0, more)])
        windows = h.shape[1] // length
        modulation = self.to_modulation(self.to_timestep_embed(timestep_features(np.array(t))))
        h, modulation = h.reshape(batch * windows, length, -1), mx.repeat(modulation, windows, axis=0)
        seen = real.reshape(batch * windows, length)
        seen = seen | ~seen.any(axis=1, keepdims=True)  # a window of padding sees itself, and counts for nothing below
        table, attend_real = rope(0, length), partial(attend, mask=seen[:, None, None])
        for layer in self.layers:
            h = layer(h, modulation, table, attend_real)
        return masked_mean(self.norm(h).reshape(batch, windows * length, -1), real)


class ClapTowers(nn.Module):
    """Hold the audio tower, and the projection of the states of the model's text encoder."""

    def __init__(self, config: LatentClapConfig) -> None:
        super().__init__()
        self.config = config
        self.audio = AudioTower(config.tower, config.latent_channels, config.max_frames)
        self.text = MLP(config.text.width, config.tower.width, config.tower.embedding, bias=True)

    def embed_audio(self, latents: mx.array, valid: mx.array, t: mx.array) -> mx.array:
        """Embed latents (B, T, C) with noise of level t (B,), valid (B, T) bool -> unit vectors (B, E) float32.

        Values at frames that are not valid do not matter.
        """
        return _unit(self.audio(latents, valid, t))

    def embed_states(self, states: mx.array, mask: mx.array) -> mx.array:
        """Embed states (B, S, Dt) of texts, mask (B, S) bool, true at tokens -> unit vectors (B, E) float32."""
        return _unit(self.text(masked_mean(states, mask)))


def _unit(x: mx.array) -> mx.array:
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def masked_mean(x: mx.array, mask: mx.array) -> mx.array:
    """Average (B, N, D) over the tokens that mask (B, N) has -> (B, D) float32; 0 where there are none (an
    empty text)."""
    kept = mx.where(mask[..., None], x.astype(mx.float32), 0.0)
    return kept.sum(axis=1) / mx.maximum(mask.sum(axis=1), 1)[:, None]
