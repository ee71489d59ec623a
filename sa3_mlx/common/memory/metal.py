"""Say what MLX needs and may keep on an Apple GPU beyond what a CPU takes: estimates, not measured on a Mac [P8.3].

An array is freed when the command buffer is done that used it last, and the CPU is some buffers ahead of the GPU. So
beside what a phase needs in order stand the arrays of the buffers under way. Attention is fused: no matrix of scores.
"""

from __future__ import annotations

from dataclasses import dataclass

BUFFERS = 11  # under way at most: MLX waits while more than ten are
READ = 1.25  # hidden states that an operation of a block reads, on average
DISPATCHES = 40  # of a block, at least
OWN_OPERATIONS, OWN_BUFFER_MB = 40, 40  # of a command buffer where nothing is set; a few more on large chips
KEPT_SHARE, KEPT_MOST = 0.25, 500_000_000  # of activations, and bytes, that the cache may keep in any case
CACHE_SHARE, CACHE_LEAST = 1 / 8, 10**9  # of the machine's memory, and bytes, that it may keep where there is no limit
WIRED_MARGIN = 1.05  # of the weights


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Hold what MLX is told, in bytes."""

    memory: int  # of arrays: above it, MLX waits for what is under way before it goes on
    cache: int  # of freed arrays that are kept
    wired: int  # that the system may not page out


@dataclass(frozen=True, kw_only=True)
class Metal:
    """Describe an Apple GPU and how MLX hands work to it."""

    memory: int  # bytes of the machine
    working_set: int  # bytes that the GPU should use at most
    operations: int  # of a command buffer, at most
    buffer_bytes: int  # of their inputs, after which a command buffer is handed over
    long_chunks: bool  # the autoencoder works on long chunks where there is room

    def activations(self, needed: int, *, hidden: int, block: int, widest: float) -> int:
        """Return the bytes of a phase that needs ``needed`` in order: with buffers under way and what the cache keeps.

        ``hidden``: bytes of the hidden states; ``block``: of the weights of a block; ``widest``: output of the widest
        operation, in hidden states, of which half goes beyond what a buffer takes, on average.
        """
        operations = min(self.operations, self.buffer_bytes / (READ * hidden + block / DISPATCHES))
        under_way = BUFFERS * hidden * (operations + widest / 2)
        return needed + int(under_way) + kept(needed)

    def limits(self, *, peak: int, weights: int, activations: int, limit: int | None) -> Limits:
        """Return what to tell MLX for a run of which these bytes are known, within ``limit`` bytes if there is one.

        Without one the cache would grow to nearly the working set. Weights are wired, activations need not be.
        """
        if limit is None:
            cache = max(CACHE_LEAST, int(CACHE_SHARE * self.memory))
        else:
            cache = max(kept(activations), limit - peak)
        wired = min(int(WIRED_MARGIN * weights), self.working_set)
        return Limits(memory=self.working_set if limit is None else limit, cache=cache, wired=wired)


def kept(activations: int) -> int:
    """Return the bytes of freed arrays that the cache keeps in any case: without them every array is a new request."""
    return min(KEPT_MOST, int(KEPT_SHARE * activations))
