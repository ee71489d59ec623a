"""Predict what the phases of a run need beside weights: copies of hidden states, and what an Apple GPU adds.

The numbers of copies are measured: see ``prediction.py``.

Shapes: B batch, T latent frames, N tokens, D width, S text tokens.
"""

from __future__ import annotations

from typing import Literal

from sa3_mlx.common.generation.clips import Texts
from sa3_mlx.common.generation.long.windows import run_frames
from sa3_mlx.common.generation.plan import request_lengths, ring_of
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.model.chunks import Direction, chunk_plan, default_chunk_frames, halo, pad_frames
from sa3_mlx.common.model.config import HEAD_SIZE, DiffusionConfig, DiTConfig, ModelConfig
from sa3_mlx.common.model.lengths import samples_to_frames, seconds_to_samples
from sa3_mlx.common.model.precision import Precision

from .metal import Metal

PhaseName = Literal["text", "encode", "sample", "decode", "rank"]

# Copies of the hidden states that are in memory at the worst moment; a few more or less from run to run, as MLX frees
# them while it computes. Those of a feed-forward grow with its multiplier.
SAME_COPIES = {
    ("chunked", "decode"): 33.0,
    ("chunked", "encode"): 30.0,
    ("sliding", "decode"): 26.0,
    ("sliding", "encode"): 26.0,
}
SAME_COPIES_PER_FF_MULT = 3.0
AUDIO_COPIES = {"chunked": 1.0, "sliding": 1.5}  # of the decoded samples, on top
DIT_FEED_FORWARD_COPIES, DIT_COPIES_PER_FF_MULT = 13.0, 3.25
DIT_ATTENTION_COPIES = {False: 22.0, True: 35.5}  # by ``differential``; the scores come on top
DIT_HALF_FACTOR = 1.42  # 16-bit activations meet fp32 ones in norms and rotations
CLAP_COPIES = 6.0  # on top of those of a DiT
TEXT_COPIES = 20.0


def activations(
    phase: PhaseName, request: Request, config: ModelConfig, precision: Precision, slots: int, metal: Metal | None
) -> int:
    """Return the bytes that a phase needs beside weights; ``slots`` of the longest text, ``metal`` the Apple GPU."""
    diffusion, width = config.require_diffusion(), precision.bytes
    sampling = request.sampling or config.usual_sampling
    negatives = {item.negative_prompt for item in request.items} - {None}
    if phase == "text":
        return text_activations(len(Texts.of(request).texts), slots, diffusion, metal)
    if phase == "sample":
        rows = len(request.items) * (1 if sampling.guidance.scale == 1 else 2)
        contexts = len(request.items) * Texts.of(request).most * (2 if negatives else 1)
        prepared = prepared_bytes(contexts, slots, diffusion, width)
        return dit_activations(rows, _frames(request, config), diffusion, width, metal) + prepared
    if phase == "rank":
        encoded = text_activations(len(Texts.of(request).texts), slots, diffusion, metal)
        return max(encoded, clap_activations(coded_frames(request, config, "decode"), config, metal))
    given = request.encode_chunk_frames if phase == "encode" else request.chunk_frames
    size = given or default_chunk_frames(config.same, phase)
    chunks = chunk_plan(coded_frames(request, config, phase), size, config.same, phase)
    return same_activations(max(chunk.stop - chunk.start for chunk in chunks), config, phase, metal)


def _frames(request: Request, config: ModelConfig) -> int:
    """Return the frames that the DiT runs on: of a long piece in each of its runs."""
    return request_lengths(request, config).frames if request.long is None else run_frames(request, config)


def coded_frames(request: Request, config: ModelConfig, direction: Direction) -> int:
    """Return how many frames the encoder or the decoder sees."""
    frames = _frames(request, config)
    if direction == "encode":
        return frames
    ring = ring_of(request, config)
    if ring is not None:
        return len(ring.heard)
    audible = max(
        samples_to_frames(seconds_to_samples(item.seconds, config.sample_rate), config.same) for item in request.items
    )
    needed = pad_frames(audible + halo(config.same, "decode"), config.same)
    return needed if request.long is not None else min(frames, needed)


def largest_chunk(
    config: ModelConfig, direction: Direction, room: float, metal: Metal | None, *, longest: int, least: int
) -> int:
    """Return the frames of the largest chunk whose activations fit into ``room`` bytes, in any case ``least``."""
    same, size = config.same, longest
    while size > least and same_activations(size, config, direction, metal) > room:
        size -= same.frame_multiple
    return size


def same_activations(frames: int, config: ModelConfig, direction: Direction, metal: Metal | None = None) -> int:
    """Return the bytes that one half of the autoencoder needs for a chunk of ``frames``."""
    same = config.same
    shift = same.span if same.attention == "chunked" else 0  # the shifted layers see half a chunk more at both ends
    tokens = (pad_frames(frames, same) + shift) * (same.stride + 1)
    samples = frames * same.samples_per_latent * config.audio_channels if direction == "decode" else 0
    copies = SAME_COPIES[same.attention, direction] + SAME_COPIES_PER_FF_MULT * same.ff_mult
    needed = int(4 * (copies * tokens * same.width + AUDIO_COPIES[same.attention] * samples))
    if metal is None:
        return needed
    needed += 4 * samples  # of the chunk that is brought back meanwhile
    block = 4 * (5 + 1 + 3 * same.ff_mult) * same.width**2
    return metal.activations(needed, hidden=4 * tokens * same.width, block=block, widest=2 * same.ff_mult)


def dit_activations(rows: int, frames: int, config: DiffusionConfig, width: int, metal: Metal | None = None) -> int:
    """Return the bytes of one velocity of a batch of ``rows``; ``width`` bytes a number."""
    dit = config.dit
    tokens = frames + dit.memory_tokens
    scores = 0.0 if metal is not None else dit.heads * (2 if dit.differential else 1) * tokens / dit.width
    feed_forward = DIT_FEED_FORWARD_COPIES + DIT_COPIES_PER_FF_MULT * dit.ff_mult
    copies = max(feed_forward, DIT_ATTENTION_COPIES[dit.differential] + scores)
    hidden = rows * tokens * dit.width * width
    needed = int(hidden * copies * (1 if width == 4 else DIT_HALF_FACTOR))
    if metal is None:
        return needed
    block = width * ((9 if dit.differential else 6) + 3 * dit.ff_mult) * dit.width**2
    return metal.activations(needed, hidden=hidden, block=block, widest=2 * dit.ff_mult)


def clap_activations(frames: int, config: ModelConfig, metal: Metal | None = None) -> int:
    """Return the bytes that the audio tower of the latent CLAP needs for one clip: blocks are those of a DiT."""
    clap = config.clap
    assert clap is not None
    tower, tokens = clap.tower, -(-frames // clap.tower.frames_per_token)
    window = tokens if clap.max_frames is None else min(tokens, clap.max_frames // tower.frames_per_token)
    scores = 0.0 if metal is not None else window / HEAD_SIZE  # heads x window x window, of the width
    hidden = 4 * -(-tokens // window) * window * tower.width
    feed_forward = DIT_FEED_FORWARD_COPIES + DIT_COPIES_PER_FF_MULT * DiTConfig.ff_mult
    needed = int(hidden * (CLAP_COPIES + max(feed_forward, DIT_ATTENTION_COPIES[False] + scores)))
    if metal is None:
        return needed
    block = 4 * (6 + 3 * DiTConfig.ff_mult) * tower.width**2
    return metal.activations(needed, hidden=hidden, block=block, widest=2 * DiTConfig.ff_mult)


def prepared_bytes(rows: int, slots: int, config: DiffusionConfig, width: int) -> int:
    """Return the bytes of keys and values of the context, ``slots`` and the duration, in all blocks."""
    per_block = (3 if config.dit.differential else 2) * config.dit.width
    return rows * config.dit.depth * (slots + 1) * per_block * width


def text_activations(texts: int, slots: int, config: DiffusionConfig, metal: Metal | None = None) -> int:
    """Return the bytes that the text encoder needs for a batch of ``texts``."""
    text = config.text_encoder
    needed = int(texts * slots * (TEXT_COPIES * text.width + 3 * text.heads * slots) * 4)
    if metal is None:
        return needed
    block = 2 * (4 * text.width + 3 * text.intermediate) * text.width
    widest = text.intermediate / text.width
    return metal.activations(needed, hidden=4 * texts * slots * text.width, block=block, widest=widest)
