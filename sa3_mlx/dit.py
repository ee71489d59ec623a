"""Predict velocities with the diffusion transformer [A6].

Shapes: B batch, T latent frames, M memory tokens, N = M + T, S context tokens, D width, C latent channels, H heads,
K head size. What depends only on the prompt, the duration and the kept audio is computed once by ``prepare``; a step is
``velocity = dit(x, t, prepared)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np

from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.model.config import TIMESTEP_FEATURES, DiTConfig
from sa3_mlx.common.model.features import fourier_features
from sa3_mlx.runtime import mx, nn

from .attention import Attend, CrossAttention, SelfAttention, attend
from .layers import MLP, FeedForward, RMSNorm, Rope, add_gated, modulate, pointwise, rope

head_rms_norm = partial(RMSNorm, eps=1e-6)  # [B11]
BLOCK_EPS = 1e-5  # [B11]


@dataclass(frozen=True, kw_only=True)
class Context:
    """Hold the context as one block's cross-attention takes it."""

    keys: mx.array  # (B, H or 2H, S, K)
    values: mx.array  # (B, H, S, K)
    bias: mx.array | None  # (B, 1, 1 or N, S), added to the logits

    def bias_of(self, tokens: int) -> mx.array | None:
        """Return the bias of the last ``tokens``."""
        return self.bias if self.bias is None or self.bias.shape[2] == 1 else self.bias[:, :, -tokens:]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Hold what no sampling step of a prompt changes; made by ``DiT.prepare``.

    A batch may hold more rows than the contexts, which belong to the first ones, and a multiple of those of the local
    terms, which repeat: that is how ``join`` makes one batch of both halves of guidance.
    """

    contexts: tuple[Context | None, ...]  # per block
    local: tuple[mx.array | None, ...]  # per block: (B, N, D), 0 at memory tokens, or one for all frames (B, 1, D)
    seconds: mx.array  # (B, D)
    valid: mx.array | None  # (B, T)


def join(cond: Prepared, null: Prepared) -> Prepared:
    """Return both halves of guidance as one batch of 2B; they differ in their contexts only."""
    contexts = cond.contexts
    if null.contexts[0] is not None:
        contexts = tuple(_join(*pair) for pair in zip(cond.contexts, null.contexts, strict=True))
    valid = None if cond.valid is None else mx.concatenate([cond.valid, cond.valid])
    return Prepared(
        contexts=contexts, local=cond.local, seconds=mx.concatenate([cond.seconds, cond.seconds]), valid=valid
    )


def _join(cond: Context | None, null: Context | None) -> Context:
    assert cond is not None and null is not None
    keys, values = mx.concatenate([cond.keys, null.keys]), mx.concatenate([cond.values, null.values])
    if cond.bias is None or null.bias is None:
        assert cond.bias is null.bias, "either both contexts count their tokens or none does"
        return Context(keys=keys, values=values, bias=None)
    bias = mx.broadcast_to(null.bias, (len(null.bias), *cond.bias.shape[1:]))
    return Context(keys=keys, values=values, bias=mx.concatenate([cond.bias, bias]))


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
        self.scale_shift_gate = mx.zeros(6 * width)
        self.pre_norm = RMSNorm(width, BLOCK_EPS)
        self.self_attn = SelfAttention(width, differential=config.differential, head_norm=head_rms_norm)
        self.cross_attn_norm = RMSNorm(width, BLOCK_EPS)
        self.cross_attn = CrossAttention(width, differential=config.differential, head_norm=head_rms_norm)
        self.ff_norm = RMSNorm(width, BLOCK_EPS)
        self.ff = FeedForward(width, config.ff_mult, "silu")
        self.local_embed = MLP(latent_channels + 1, width, width, bias=True)

    def __call__(
        self,
        x: mx.array,
        modulation: mx.array,
        context: Context | None,
        local: mx.array | None,
        sequence: Sequence,
        last: bool = False,
    ) -> mx.array:
        """Map x (B, N, D) with modulation (B, 6 D) to (B, N, D).

        The ``last`` block leaves out the memory tokens, which nothing reads after it, once they have been keys: it
        returns (B, T, D).
        """
        parts = (self.scale_shift_gate + modulation)[:, None].split(6, axis=-1)  # (B, 1, D) each
        scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = parts
        memory = sequence.memory
        h = modulate(self.pre_norm(x), 1 + scale_a, shift_a)
        if last:
            x, memory = x[:, memory:], 0
            branch = self.self_attn.at(h, slice(sequence.memory, None), sequence.table, sequence.attend)
        else:
            branch = self.self_attn(h, sequence.table, sequence.attend)
        x = add_gated(x, branch, mx.sigmoid(1 - gate_a))
        if context is not None:
            rows = len(context.keys)
            known = x[:rows] + self.cross_attn(
                self.cross_attn_norm(x[:rows]), context.keys, context.values, context.bias_of(x.shape[1])
            )
            x = known if rows == len(x) else mx.concatenate([known, x[rows:]])
        if local is not None:
            x = _add_local(x, local, memory)
        h = modulate(self.ff_norm(x), 1 + scale_f, shift_f)
        return add_gated(x, self.ff(h), mx.sigmoid(1 - gate_f))


def _add_local(x: mx.array, local: mx.array, memory: int) -> mx.array:
    """Return x (n B, N, D) plus a local term, repeated n times. A memory token gets 0, not a copy of x without it."""
    length = x.shape[1]
    term, audio = (local, _audio_column(memory, length)) if local.shape[1] == 1 else (local[:, -length:], None)
    shape = x.shape
    if len(local) not in (1, len(x)):
        x = x.reshape(-1, len(local), *x.shape[1:])
    x = x + term if audio is None else _add_where(x, term, audio)
    return x.reshape(shape)


@pointwise
def _add_where(x: mx.array, term: mx.array, audio: mx.array) -> mx.array:
    return x + term * audio


@lru_cache(maxsize=8)
def _audio_column(memory: int, length: int) -> mx.array | None:
    """Return 0 for memory tokens and 1 for others, (N, 1); None where there are only others."""
    return mx.array((np.arange(length) >= memory).astype(np.float32)[:, None]) if memory else None


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
        self.memory_tokens = mx.zeros((config.memory_tokens, width))
        self.layers = [DiTBlock(config, latent_channels) for _ in range(config.depth)]
        self.project_out = nn.Linear(width, latent_channels, bias=False)
        self.postprocess = nn.Linear(latent_channels, latent_channels, bias=False)

    @property
    def streamed(self) -> bool:
        """Tell whether the blocks stay in the file and are read in every step; see ``load_streamed_dit``."""
        return not isinstance(self.layers, list)

    def prepare(self, cond: Conditioning[mx.array]) -> Prepared:
        """Compute keys and values of the context, local terms and the duration embedding."""
        context, bias = None, None
        if cond.context is not None:
            context = self.to_cond_embed(cond.context)
            if cond.repeats is not None:  # ln 0 takes a filler away
                bias = mx.log(cond.repeats.astype(mx.float32)).astype(context.dtype)[:, None, None]
            if cond.shares is not None:  # a prompt that a token is not told has ln 0 there
                told = mx.log(cond.shares.astype(mx.float32)).astype(context.dtype)
                told = mx.repeat(told, context.shape[1] // told.shape[2], axis=2)[:, None]  # (B, 1, N, S)
                bias = told if bias is None else told + bias
        contexts: list[Context | None] = []
        local: list[mx.array | None] = []
        for layer in self.layers:
            pair = None if context is None else layer.cross_attn.prepare(context)
            contexts.append(None if pair is None else Context(keys=pair[0], values=pair[1], bias=bias))
            local.append(None if cond.local is None else self._local(layer, cond.local))
            if self.streamed:
                mx.eval(pair, local[-1])  # now, one block after the other
        return Prepared(
            contexts=tuple(contexts), local=tuple(local), seconds=self.to_global_embed(cond.seconds), valid=cond.valid
        )

    def _local(self, layer: DiTBlock, given: mx.array) -> mx.array:
        """Return a block's local term; where every frame has its own, that of memory tokens is 0."""
        term = layer.local_embed(given)
        return term if term.shape[1] == 1 else mx.pad(term, [(0, 0), (self.config.memory_tokens, 0), (0, 0)])

    def modulation(self, t: np.ndarray, seconds: mx.array) -> mx.array:
        """Return (B, 6 D), shared by all blocks, of t (B,) fp32 in [0, 1] on the host and seconds (B, D) [B8]."""
        features = timestep_features(t).astype(self.memory_tokens.dtype)
        return self.to_modulation(seconds + self.to_timestep_embed(features))

    def __call__(self, x: mx.array, t: np.ndarray, prepared: Prepared) -> mx.array:
        """Return the velocity (B, T, C) at x (B, T, C), t (B,) fp32 on the host; invalid frames mean nothing."""
        return self.velocity(x, self.modulation(t, prepared.seconds), prepared)

    def velocity(self, x: mx.array, modulation: mx.array, prepared: Prepared) -> mx.array:
        """Return the velocity where the modulation (B, 6 D) of this time is already known."""
        h, sequence = self.begin(x, prepared)
        final = len(self.layers) - 1
        for k, (context, local) in enumerate(zip(prepared.contexts, prepared.local, strict=True)):
            h = self.layers[k](h, modulation, context, local, sequence, k == final)
        y = self.project_out(h)  # (B, T, C)
        return y + self.postprocess(y)

    def begin(self, x: mx.array, prepared: Prepared) -> tuple[mx.array, Sequence]:
        """Return what the first block takes, (B, N, D) of (B, T, C), and what all blocks share."""
        memory = self.config.memory_tokens
        h = self.project_in(x + self.preprocess(x))
        h = mx.concatenate([mx.broadcast_to(self.memory_tokens, (len(h), *self.memory_tokens.shape)), h], axis=1)
        mask = None
        if prepared.valid is not None:
            mask = mx.pad(prepared.valid, [(0, 0), (memory, 0)], constant_values=True)[:, None, None]  # (B, 1, 1, N)
        sequence = Sequence(memory=memory, table=rope(0, h.shape[1]), attend=partial(attend, mask=mask))
        return h, sequence


def timestep_features(t: np.ndarray) -> mx.array:
    """Return (B, 256) fp32 of times (B,), cosines first, made on the host: no device's cosine matters [B5, B8]."""
    return mx.array(fourier_features(t))
