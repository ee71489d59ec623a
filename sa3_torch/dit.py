"""Predict velocities with the diffusion transformer [A6].

Shapes: B batch, T latent frames, M memory tokens, N = M + T, S context tokens, D width, C latent channels, H heads,
K head size. What depends only on the prompt, the duration and the kept audio is computed once by ``prepare``; a step is
``velocity = dit(x, t, prepared)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.model.config import TIMESTEP_FEATURES, DiTConfig
from sa3_mlx.common.model.features import FREQUENCIES

from .attention import Attend, CrossAttention, SelfAttention, attend_to
from .layers import MLP, FeedForward, RMSNorm, Rope, add_gated, compiled_block, modulate, rope, split_modulation

head_rms_norm = partial(RMSNorm, eps=1e-6)  # [B11]
BLOCK_EPS = 1e-5  # [B11]


@dataclass(frozen=True, kw_only=True)
class Context:
    """Hold the context as one block's cross-attention takes it."""

    keys: Tensor  # (B, H or 2H, S, K)
    values: Tensor  # (B, H, S, K)
    bias: Tensor | None  # (B, 1, 1 or N, S), added to the logits

    def bias_of(self, tokens: int) -> Tensor | None:
        """Return the bias of the last ``tokens``."""
        return self.bias if self.bias is None or self.bias.shape[2] == 1 else self.bias[:, :, -tokens:]


@dataclass(frozen=True)
class LocalInput:
    """Hold the local input where the blocks make their terms of it themselves: in training, where a block that is
    computed again then keeps nothing of its term."""

    given: Tensor  # (B, T or 1, 1 + C)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Hold what no sampling step of a prompt changes; made by ``DiT.prepare``.

    A batch may hold more rows than the contexts, which belong to the first ones, and a multiple of those of the local
    terms, which repeat: that is how ``join`` makes one batch of both halves of guidance.
    """

    contexts: tuple[Context | None, ...]  # per block
    local: tuple[Tensor | LocalInput | None, ...]  # per block: (B, T or 1, D)
    seconds: Tensor  # (B, D)
    valid: Tensor | None  # (B, T)


def join(cond: Prepared, null: Prepared) -> Prepared:
    """Return both halves of guidance as one batch of 2B; they differ in their contexts only."""
    contexts = cond.contexts
    if null.contexts[0] is not None:
        contexts = tuple(_join(*pair) for pair in zip(cond.contexts, null.contexts, strict=True))
    valid = None if cond.valid is None else torch.cat([cond.valid, cond.valid])
    return Prepared(contexts=contexts, local=cond.local, seconds=torch.cat([cond.seconds, cond.seconds]), valid=valid)


def _join(cond: Context | None, null: Context | None) -> Context:
    assert cond is not None and null is not None
    keys, values = torch.cat([cond.keys, null.keys]), torch.cat([cond.values, null.values])
    if cond.bias is None or null.bias is None:
        assert cond.bias is null.bias, "either both contexts count their tokens or none does"
        return Context(keys=keys, values=values, bias=None)
    bias = null.bias.expand(-1, *cond.bias.shape[1:])
    return Context(keys=keys, values=values, bias=torch.cat([cond.bias, bias]))


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Hold what all blocks of one evaluation share: N = M + T tokens, memory tokens first."""

    memory: int  # M
    table: Rope
    attend: Attend


class DiTBlock(nn.Module):
    """Apply self-attention, cross-attention, local term and feed-forward, in this order [B10]."""

    def __init__(self, config: DiTConfig, latent_channels: int) -> None:
        super().__init__()
        width = config.width
        self.scale_shift_gate = nn.Parameter(torch.zeros(6 * width))
        self.pre_norm = RMSNorm(width, BLOCK_EPS)
        self.self_attn = SelfAttention(width, differential=config.differential, head_norm=head_rms_norm)
        self.cross_attn_norm = RMSNorm(width, BLOCK_EPS)
        self.cross_attn = CrossAttention(width, differential=config.differential, head_norm=head_rms_norm)
        self.ff_norm = RMSNorm(width, BLOCK_EPS)
        self.ff = FeedForward(width, config.ff_mult, "silu")
        self.local_embed = MLP(latent_channels + 1, width, width, bias=True)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        context: Context | None,
        local: Tensor | LocalInput | None,
        sequence: Sequence,
        last: bool = False,
    ) -> Tensor:
        """Map x (B, N, D) with modulation (B, 6 D) to (B, N, D).

        The ``last`` block leaves out the memory tokens, which nothing reads after it, once they have been keys: it
        returns (B, T, D).
        """
        (scale_a, scale_f), (shift_a, shift_f), (gate_a, gate_f) = split_modulation(self.scale_shift_gate + modulation)
        memory = sequence.memory
        h = modulate(self.pre_norm(x), scale_a, shift_a)
        if last:
            x, memory = x[:, memory:], 0
            branch = self.self_attn.at(h, slice(sequence.memory, None), sequence.table, sequence.attend)
        else:
            branch = self.self_attn(h, sequence.table, sequence.attend)
        x = add_gated(x, branch, gate_a)
        if context is not None:
            rows = len(context.keys)
            known = x[:rows] + self.cross_attn(
                self.cross_attn_norm(x[:rows]), context.keys, context.values, context.bias_of(x.shape[1])
            )
            x = known if rows == len(x) else torch.cat([known, x[rows:]])
        term = self.local_embed(local.given) if isinstance(local, LocalInput) else local
        if term is not None:  # memory tokens get none; x is a sum that nothing else reads
            x[:, memory:].unflatten(0, (-1, len(term))).add_(term)
        h = modulate(self.ff_norm(x), scale_f, shift_f)
        return add_gated(x, self.ff(h), gate_f)


class DiT(nn.Module):
    """Predict the velocity eps - z of the flow x_t = (1 - t) z + t eps."""

    def __init__(self, config: DiTConfig, latent_channels: int, context_width: int) -> None:
        super().__init__()
        width = config.width
        self.config = config
        self.to_timestep_embed = MLP(TIMESTEP_FEATURES, width, width, bias=True)
        self.to_cond_embed = MLP(context_width, width, width, bias=False)
        self.to_global_embed = MLP(context_width, width, width, bias=False)
        self.to_modulation = MLP(width, width, 6 * width, bias=True)
        self.preprocess = nn.Linear(latent_channels, latent_channels, bias=False)
        self.project_in = nn.Linear(latent_channels, width, bias=False)
        self.memory_tokens = nn.Parameter(torch.zeros(config.memory_tokens, width))
        self.layers = nn.ModuleList(DiTBlock(config, latent_channels) for _ in range(config.depth))
        self.project_out = nn.Linear(width, latent_channels, bias=False)
        self.postprocess = nn.Linear(latent_channels, latent_channels, bias=False)

    @property
    def streamed(self) -> bool:
        """Tell whether the blocks stay in the file and are read in every step; see ``load_streamed_dit``."""
        return not isinstance(self.layers, nn.ModuleList)

    def prepare(self, cond: Conditioning[Tensor]) -> Prepared:
        """Compute keys and values of the context, local terms and the duration embedding."""
        context, bias = None, None
        if cond.context is not None:
            context = self.to_cond_embed(cond.context)
            if cond.repeats is not None:  # ln 0 takes a filler away
                bias = cond.repeats.float().log().to(context.dtype)[:, None, None]
            if cond.shares is not None:  # a prompt that a token is not told has ln 0 there
                told = cond.shares.float().log().to(context.dtype)
                told = told.repeat_interleave(context.shape[1] // told.shape[2], dim=2)[:, None]  # (B, 1, N, S)
                bias = told if bias is None else told + bias
        contexts: list[Context | None] = []
        local: list[Tensor | LocalInput | None] = []
        for layer in self.layers:
            block = cast(DiTBlock, layer)
            pair = None if context is None else block.cross_attn.prepare(context)
            contexts.append(None if pair is None else Context(keys=pair[0], values=pair[1], bias=bias))
            local.append(None if cond.local is None else block.local_embed(cond.local))
        return Prepared(
            contexts=tuple(contexts), local=tuple(local), seconds=self.to_global_embed(cond.seconds), valid=cond.valid
        )

    def modulation(self, t: Tensor, seconds: Tensor) -> Tensor:
        """Return (B, 6 D), shared by all blocks, of t (B,) fp32 in [0, 1] and seconds (B, D) [B8]."""
        features = timestep_features(t).to(self.memory_tokens.dtype)
        return self.to_modulation(seconds + self.to_timestep_embed(features))

    def forward(self, x: Tensor, t: Tensor, prepared: Prepared) -> Tensor:
        """Return the velocity (B, T, C) at x (B, T, C), t (B,) fp32; invalid frames mean nothing."""
        return self.velocity(x, self.modulation(t, prepared.seconds), prepared)

    def velocity(self, x: Tensor, modulation: Tensor, prepared: Prepared) -> Tensor:
        """Return the velocity where the modulation (B, 6 D) of this time is already known."""
        h, sequence = self.begin(x, prepared)
        final = len(self.layers) - 1
        for k, (context, local) in enumerate(zip(prepared.contexts, prepared.local, strict=True)):
            block = self.layers[k] if self.streamed else compiled_block(self.layers[k], "compiled_step")
            h = block(h, modulation, context, local, sequence, k == final)
        y = self.project_out(h)  # (B, T, C)
        return y + self.postprocess(y)

    def begin(self, x: Tensor, prepared: Prepared) -> tuple[Tensor, Sequence]:
        """Return what the first block takes, (B, N, D) of (B, T, C), and what all blocks share."""
        memory = self.config.memory_tokens
        h = self.project_in(x + self.preprocess(x))
        h = torch.cat([self.memory_tokens.to(h.dtype).expand(len(h), -1, -1), h], dim=1)  # (B, N, D)
        real = None if prepared.valid is None else F.pad(prepared.valid, (memory, 0), value=True)  # (B, N)
        return h, Sequence(memory=memory, table=rope(0, h.shape[1], h.device), attend=attend_to(real, h))


def timestep_features(t: Tensor) -> Tensor:
    """Return (B, 256) of times (B,), cosines first; the angle is formed in fp32 in the official order [B5, B8]."""
    frequencies = torch.tensor(FREQUENCIES).to(t.device, non_blocking=True)
    angle = (t.float()[:, None] * frequencies * 2.0 * float(np.float32(np.pi))).double()
    return torch.cat([angle.cos(), angle.sin()], dim=-1).float()
