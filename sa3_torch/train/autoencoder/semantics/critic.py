"""Train a critic of whether sound, text and latents belong together, against mismatched ones [T1.4.5].

Shapes: B batch, N audio samples, A audio tokens, S text tokens, T latent frames, C latent channels, D width, K shifts,
R rows, that is triples of (sound, text, latents).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from sa3_mlx.common.model.config import HEAD_SIZE, DiTConfig
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.attention import SelfAttention, attend
from sa3_torch.dit import BLOCK_EPS, head_rms_norm
from sa3_torch.layers import FeedForward, RMSNorm, rope
from sa3_torch.train.autoencoder.transforms import wavelet
from sa3_torch.train.run.random import Purpose, item_noise, item_uniforms
from sa3_torch.train.run.settings import check

MARGIN, MAX_GAP = 0.5, 10.0
TOKENS_ZEROED, AUDIO_DROPOUT, LATENT_DROPOUT = 0.4, 0.35, 0.1
LATENT_NOISE, GAIN_RANGE = 1e-2, 0.2
KINDS = 3  # of negatives per shift: another sound, another text, both


@dataclass(frozen=True, kw_only=True)
class CriticConfig(Config):
    """Hold the sizes of the critic, and how many mismatched triples it sees."""

    width: int
    depth: int
    levels: int  # of the wavelet: an audio token holds 2^levels samples
    max_rows: int  # mismatched triples in a step

    def __post_init__(self) -> None:
        check(self, 1, 64, "depth")
        check(self, 1, 14, "levels")
        check(self, 2 * KINDS, 1 << 20, "max_rows")
        if self.width < HEAD_SIZE or self.width % HEAD_SIZE:
            raise ConfigError(f"critic.width is {self.width}: expected a multiple of {HEAD_SIZE}")

    def shifts(self, batch: int) -> int:
        """Return K = min(floor(max_rows / 3B), B - 1), at least 1. Raises ValueError where that cannot be."""
        if batch < 2:
            raise ValueError(f"the critic needs a batch of 2 or more to make mismatched pairs, got {batch}")
        if batch * KINDS > self.max_rows:
            raise ValueError(f"critic.max_rows is {self.max_rows}: a batch of {batch} needs {batch * KINDS} or more")
        return min(self.max_rows // (KINDS * batch), batch - 1)


@dataclass(frozen=True, kw_only=True)
class Corruptions:
    """Hold the random numbers of a training step, all made for the whole batch."""

    gain: Tensor  # (B, 1, 1)
    tokens: Tensor  # (B, A, 1) bool, False = zeroed
    audio: Tensor  # (B, A, features) bool, False = dropped
    latents: Tensor  # (B, T, C) bool, False = dropped
    noise: Tensor  # (B, T, C) standard normals


class CriticBlock(nn.Module):
    """Compute x + attn(norm(x)), then x + ff(norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(width, BLOCK_EPS)
        self.self_attn = SelfAttention(width, differential=False, head_norm=head_rms_norm)
        self.ff_norm = RMSNorm(width, BLOCK_EPS)
        self.ff = FeedForward(width, DiTConfig.ff_mult, "silu")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return (R, N, D) for x (R, N, D), mask (R, 1, 1, N) bool, False = no key."""
        table = rope(0, x.shape[1], x.device)
        x = x + self.self_attn(self.pre_norm(x), table, lambda q, k, v: attend(q, k, v, mask))
        return x + self.ff(self.ff_norm(x))


class Critic(nn.Module):
    """Run a transformer over all tokens; its score is read at a token of its own."""

    weights: ClassVar[dict[str, float]] = {"critic": 1.0}

    def __init__(self, config: CriticConfig, audio_channels: int, text_width: int, latent_channels: int) -> None:
        super().__init__()
        self.config, self.audio_channels, self.latent_channels = config, audio_channels, latent_channels
        self.from_audio = nn.Linear(audio_channels << config.levels, config.width)
        self.from_text = nn.Linear(text_width, config.width)
        self.from_latents = nn.Linear(latent_channels, config.width)
        self.token = nn.Parameter(torch.randn(config.width))
        self.layers = nn.ModuleList(CriticBlock(config.width) for _ in range(config.depth))
        self.score = weight_norm(nn.Linear(config.width, 1, bias=False))

    def draw(self, batch: int, samples: int, frames: int, seed: int, step: int) -> Corruptions:
        """Draw the corruptions of a whole batch of sounds with so many samples and latent frames."""
        items, device, latents = slice(0, batch), self.token.device, (frames, self.latent_channels)
        tokens, features = -(-samples // (1 << self.config.levels)), self.audio_channels << self.config.levels
        sizes = [1, tokens, tokens * features, frames * self.latent_channels]
        u = item_uniforms(items, sum(sizes), seed, Purpose.CRITIC, step, device)
        gain, token, audio, latent = u.split(sizes, dim=1)
        return Corruptions(
            gain=(1 + GAIN_RANGE * gain.float())[..., None],
            tokens=token[..., None] >= TOKENS_ZEROED,
            audio=audio.unflatten(1, (tokens, features)) >= AUDIO_DROPOUT,
            latents=latent.unflatten(1, latents) >= LATENT_DROPOUT,
            noise=item_noise(items, latents, seed, Purpose.CRITIC_NOISE, step, device),
        )

    def forward(self, audio: Tensor, text: Tensor, text_mask: Tensor, latents: Tensor) -> Tensor:
        """Score embedded tokens (R, A, D), (R, S, D), (R, T, D) with text_mask (R, S) bool, False = padding -> (R,)."""
        x = torch.cat([self.token.to(audio.dtype).expand(len(audio), 1, -1), audio, text, latents], dim=1)
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        first = 1 + audio.shape[1]
        mask[:, first : first + text.shape[1]] = text_mask
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return self.score(F.normalize(x[:, 0].float(), dim=-1))[:, 0].float()

    def loss(
        self,
        audio: Tensor,
        text: Tensor,
        text_mask: Tensor,
        z: Tensor,
        captions: Tensor,
        corruptions: Corruptions | None,
        *,
        rows: slice,
        detach: bool,
    ) -> dict[str, Tensor]:
        """Return softplus of the margin by which true triples beat mismatched ones ("critic"), and how often they do.

        audio (B, N, channels), text (B, S, Dt), text_mask (B, S) bool, z (B, T, C); captions (B,) int64, equal for
        equal ones: where only the text is exchanged, such pairs are no negatives and are left out. ``rows``: the items
        whose triples are scored; with several processes B is the gathered batch and rows are those of this one.
        ``corruptions`` None outside training. Raises ValueError for a batch of 1.
        """
        shifts = self.config.shifts(len(audio))
        sounds, words, latents = self._embed(audio, text, z.detach() if detach else z, corruptions)
        item = torch.arange(len(audio), device=audio.device)[rows]  # (n,)
        other = (item[:, None] + torch.arange(1, shifts + 1, device=audio.device)) % len(audio)  # (n, K)
        same = item[:, None].expand_as(other)
        sound_of = torch.stack([other, same, other], dim=-1)  # (n, K, 3)
        text_of = torch.stack([same, other, other], dim=-1)
        sound_rows = torch.cat([item, sound_of.flatten()])
        text_rows = torch.cat([item, text_of.flatten()])
        latent_rows = torch.cat([item, same[..., None].expand_as(text_of).flatten()])
        # index_select, because gradients of x[rows] are summed in the order in which threads get there
        scores = self(
            sounds.index_select(0, sound_rows),
            words.index_select(0, text_rows),
            text_mask[text_rows],
            latents.index_select(0, latent_rows),
        )
        gap = scores[: len(item), None, None] - scores[len(item) :].view(text_of.shape)
        valid = (captions[same] != captions[other])[..., None] | (sound_of != same[..., None])  # (n, K, 3)
        count = valid.sum((1, 2))
        value = (F.softplus(MARGIN - gap.clamp_max(MAX_GAP)) * valid).sum((1, 2)) / count
        return {"critic": value.mean(), "critic_accuracy": (((gap > 0) & valid).sum((1, 2)) / count).detach().mean()}

    def _embed(
        self, audio: Tensor, text: Tensor, z: Tensor, corruptions: Corruptions | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if corruptions is None:
            sounds = wavelet(audio, self.config.levels)
        else:
            sounds = wavelet(audio * corruptions.gain, self.config.levels)
            sounds = sounds * corruptions.tokens * corruptions.audio / (1 - AUDIO_DROPOUT)
            z = z * corruptions.latents / (1 - LATENT_DROPOUT) + LATENT_NOISE * corruptions.noise
        return self.from_audio(sounds), self.from_text(text), self.from_latents(z)
