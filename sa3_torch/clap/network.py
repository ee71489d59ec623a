"""Compare latents, at any noise level, with texts by two towers of unit vectors, a latent CLAP [T6].

    a = clap.embed_audio(latents, valid, t)
    u = clap.embed_states(*text_encoder_states_and_mask)
    cosine = (a * u).sum(1)

Shapes: B batch, T latent frames, C latent channels, N tokens of P frames, D width, S text tokens, Dt text width, E size
of the shared vectors. t = 0 is data, t = 1 noise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.common.model.config import TIMESTEP_FEATURES, DiTConfig, LatentClapConfig, TowerConfig
from sa3_torch.attention import Attend, SelfAttention, attend_to
from sa3_torch.dit import BLOCK_EPS, head_rms_norm, timestep_features
from sa3_torch.layers import MLP, FeedForward, RMSNorm, Rope, add_gated, modulate, rope, split_modulation


class ModulatedBlock(nn.Module):
    """Apply modulated self-attention and feed-forward as in the DiT; both end in zeros at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_shift_gate = nn.Parameter(torch.zeros(6 * width))
        self.pre_norm = RMSNorm(width, BLOCK_EPS)
        self.self_attn = SelfAttention(width, differential=False, head_norm=head_rms_norm)
        self.ff_norm = RMSNorm(width, BLOCK_EPS)
        self.ff = FeedForward(width, DiTConfig.ff_mult, "silu")
        for last in (self.self_attn.to_out, self.ff.proj_out):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, modulation: Tensor, table: Rope, attend: Attend) -> Tensor:
        """Map x (B, N, D), with modulation (B, 6 D), to (B, N, D)."""
        (scale_a, scale_f), (shift_a, shift_f), (gate_a, gate_f) = split_modulation(self.scale_shift_gate + modulation)
        x = add_gated(x, self.self_attn(modulate(self.pre_norm(x), scale_a, shift_a), table, attend), gate_a)
        return add_gated(x, self.ff(modulate(self.ff_norm(x), scale_f, shift_f)), gate_f)


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
        self.layers = nn.ModuleList(ModulatedBlock(width) for _ in range(config.depth))
        self.norm = RMSNorm(width, BLOCK_EPS)
        self.projection = MLP(width, width, config.embedding, bias=True)

    def forward(self, x: Tensor, valid: Tensor, t: Tensor) -> Tensor:
        """Embed x (B, T, C), valid (B, T) bool, t (B,) -> (B, E). Raises ValueError for an item without a
        valid frame."""
        return self.projection(self.pooled(x, valid, t))

    def pooled(self, x: Tensor, valid: Tensor, t: Tensor) -> Tensor:
        """Return what is projected: (B, D) float32, the mean over tokens."""
        if not bool(valid.any(1).all()):
            items = (~valid.any(1)).nonzero().flatten().tolist()
            raise ValueError(f"item(s) {', '.join(map(str, items))} have no valid frame: leave them out")
        size = self.frames_per_token
        rest = -x.shape[1] % size
        x = F.pad(torch.where(valid[..., None], x, 0.0), (0, 0, 0, rest))
        real = F.pad(valid, (0, rest)).unflatten(1, (-1, size)).any(-1)  # (B, N)
        h = self.project_in(x.unflatten(1, (-1, size)).flatten(2))  # (B, N, D)
        length = min(h.shape[1], self.max_tokens or h.shape[1])  # of a window
        more = -h.shape[1] % length
        h, real = F.pad(h, (0, 0, 0, more)), F.pad(real, (0, more))
        windows = h.shape[1] // length
        modulation = self.to_modulation(self.to_timestep_embed(timestep_features(t).to(h.dtype)))
        h, modulation = h.unflatten(1, (windows, length)).flatten(0, 1), modulation.repeat_interleave(windows, 0)
        seen = real.unflatten(1, (windows, length)).flatten(0, 1)
        seen = seen | ~seen.any(1, keepdim=True)  # a window of padding sees itself, and counts for nothing below
        table, attend_real = rope(0, length, h.device), attend_to(seen, h)
        for layer in self.layers:
            h = layer(h, modulation, table, attend_real)
        return masked_mean(self.norm(h).unflatten(0, (-1, windows)).flatten(1, 2), real)


class ClapTowers(nn.Module):
    """Hold the audio tower, and the projection of the states of the model's text encoder."""

    def __init__(self, config: LatentClapConfig) -> None:
        super().__init__()
        self.config = config
        self.audio = AudioTower(config.tower, config.latent_channels, config.max_frames)
        self.text = MLP(config.text.width, config.tower.width, config.tower.embedding, bias=True)

    def embed_audio(self, latents: Tensor, valid: Tensor, t: Tensor) -> Tensor:
        """Embed latents (B, T, C) with noise of level t (B,), valid (B, T) bool -> unit vectors (B, E) float32.

        Values at frames that are not valid do not matter.
        """
        return F.normalize(self.audio(latents, valid, t).float(), dim=-1)

    def embed_states(self, states: Tensor, mask: Tensor) -> Tensor:
        """Embed states (B, S, Dt) of texts, mask (B, S) bool, true at tokens -> unit vectors (B, E) float32."""
        return F.normalize(self.text(masked_mean(states, mask)).float(), dim=-1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average (B, N, D) over the tokens that mask (B, N) has -> (B, D) float32; 0 where there are none (an
    empty text)."""
    kept = torch.where(mask[..., None], x.float(), 0.0)
    return kept.sum(1) / mask.sum(1).clamp_min(1)[:, None]
