"""Hold what a prompt, a duration and kept audio tell the diffusion transformer [A5, A6], in arrays of either twin.

Shapes: B batch, T latent frames, S context tokens, D context width, C latent channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

Array = TypeVar("Array")


@dataclass(frozen=True, kw_only=True)
class Conditioning(Generic[Array]):
    """Hold the inputs of ``DiT.prepare``.

    context: (B, S, D) text tokens and the duration token; None is the unconditional input of guidance: zeros, to which
             cross-attention adds exactly nothing, because no layer on the way has a bias [B19].
    repeats: (B, S) how many equal tokens each of the context stands for, 0 for a filler of the batch; None = 1 each.
             Cross-attention has no positions, so n equal keys are one key with ln n added to its logit.
    shares:  (B, N, K) where the context is that of K prompts, one after the other, S slots in all: how much of each the
             N tokens, memory tokens first, are told. They sum to 1. None = one prompt for all.
    seconds: (B, D) the duration vector [B6].
    local:   (B, T, 1 + C) mask (1 = keep) and masked latents, or (B, 1, 1 + C) where all frames agree (zeros for plain
             text-to-audio, which matter [B7]); None leaves the local term out, which no released model was trained for.
    valid:   (B, T) bool, True = real frame; None = all. Padded keys are removed from self-attention [B16].
    """

    context: Array | None
    repeats: Array | None = None
    shares: Array | None = None
    seconds: Array
    local: Array | None
    valid: Array | None

    def unconditional(self) -> Conditioning[Array]:
        """Return a copy with zeros in place of the context; the global duration is kept [B19]."""
        return replace(self, context=None, repeats=None, shares=None)
