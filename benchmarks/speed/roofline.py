"""Arithmetic and traffic of a generation, counted from the configuration, and the least time a chip needs for them.

Counted is the graph that the twins execute: products of matrices and attention, 2 FLOP a multiply-add. Bytes are the
weights, read once per evaluation, and what every product reads and writes; pointwise work counts as fused into it. A
test holds the FLOPs to those of the executed graph. The floor of a stage is the longer of both times; real programs
reach about 70 % of it in long products, and launches, loading and pointwise work come on top.

Shapes: T latent frames, S text tokens, C context tokens, N tokens of a transformer, E width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sa3_mlx.common.chips import Chip
from sa3_mlx.common.model.chunks import chunk_plan, default_chunk_frames, halo, pad_frames
from sa3_mlx.common.model.config import (
    TIMESTEP_FEATURES,
    DiffusionConfig,
    DiTConfig,
    ModelConfig,
    SAMEConfig,
    TextEncoderConfig,
)
from sa3_mlx.common.model.lengths import clip_lengths, samples_to_frames, seconds_to_samples


@dataclass(frozen=True, kw_only=True)
class Count:
    """FLOPs, numbers of weights read, and numbers of activations read and written."""

    flops: int = 0
    weights: int = 0
    activations: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            flops=self.flops + other.flops,
            weights=self.weights + other.weights,
            activations=self.activations + other.activations,
        )

    def times(self, repeats: int) -> Count:
        return Count(flops=repeats * self.flops, weights=repeats * self.weights, activations=repeats * self.activations)

    def bytes(self, width: int) -> int:
        return width * (self.weights + self.activations)


def linear(rows: int, size_in: int, size_out: int) -> Count:
    return Count(
        flops=2 * rows * size_in * size_out, weights=size_in * size_out, activations=rows * (size_in + size_out)
    )


def attention(queries: int, keys_per_query: int, keys: int, width: int, maps: int) -> Count:
    """Scores and weighted sums of all heads; ``maps`` 2 for differential attention."""
    return Count(
        flops=4 * maps * queries * keys_per_query * width,
        activations=(maps * (queries + keys) + queries + keys) * width,  # q, k, values and the result
    )


def total(counts: Iterator[Count]) -> Count:
    return sum(counts, Count())


def mlp(rows: int, size_in: int, width: int, size_out: int) -> Count:
    return linear(rows, size_in, width) + linear(rows, width, size_out)


def feed_forward(rows: int, width: int, mult: int) -> Count:
    return linear(rows, width, 2 * mult * width) + linear(rows, mult * width, width)


# --- text and diffusion -----------------------------------------------------------------------------------------------


def text_encoder(tokens: int, config: TextEncoderConfig) -> Count:
    """One prompt of ``tokens`` slots."""
    width = config.width
    layer = linear(tokens, width, width).times(4) + attention(tokens, tokens, tokens, width, 1)
    layer += linear(tokens, width, config.intermediate).times(2) + linear(tokens, config.intermediate, width)
    return layer.times(config.depth)


def prepare(context: int, local_rows: int, config: DiffusionConfig, channels: int) -> Count:
    """Once per prompt: context, duration, keys and values, and the local term of ``local_rows`` different frames."""
    width, text = config.dit.width, config.text_encoder.width
    block = linear(context, width, (3 if config.dit.differential else 2) * width)
    block += mlp(local_rows, channels + 1, width, width)
    return mlp(context, text, width, width) + mlp(1, text, width, width) + block.times(config.dit.depth)


def modulation(rows: int, config: DiffusionConfig) -> Count:
    """Of ``rows`` times at once."""
    width = config.dit.width
    return mlp(rows, TIMESTEP_FEATURES, width, width) + mlp(rows, width, width, 6 * width)


def velocity(frames: int, context: int, config: DiffusionConfig, channels: int) -> Count:
    """One evaluation of the diffusion transformer for one item, modulation not included."""
    dit = config.dit
    tokens, width = frames + dit.memory_tokens, dit.width
    ends = linear(frames, channels, channels).times(2) + linear(frames, channels, width)
    ends += linear(frames, width, channels)
    inner = _dit_block(tokens, tokens, context, dit).times(dit.depth - 1)
    return ends + inner + _dit_block(frames, tokens, context, dit)


def _dit_block(queries: int, tokens: int, context: int, config: DiTConfig) -> Count:
    """``queries``: tokens that leave the block, all of them or in the last block the frames alone."""
    width, maps = config.width, 2 if config.differential else 1
    count = _self_attention(queries, tokens, tokens, width, maps)
    count += linear(queries, width, maps * width) + attention(queries, context, context, width, maps)
    return count + linear(queries, width, width) + feed_forward(queries, width, config.ff_mult)


def _self_attention(queries: int, tokens: int, keys_per_query: int, width: int, maps: int) -> Count:
    projections = linear(queries, width, maps * width) + linear(tokens, width, (maps + 1) * width)
    if queries == tokens:  # one product
        projections = linear(tokens, width, (2 * maps + 1) * width)
    return projections + attention(queries, keys_per_query, tokens, width, maps) + linear(queries, width, width)


# --- autoencoder ------------------------------------------------------------------------------------------------------


def decoder(frames: int, config: SAMEConfig, audio_channels: int) -> Count:
    """One chunk of ``frames``, without decoder noise."""
    padded, width = pad_frames(frames, config), config.width
    tokens = padded * (config.stride + 1)
    count = linear(frames, config.latent_channels, width)
    for number, rows in enumerate(_block_tokens(tokens, config.decoder_depth, config)):
        block = _same_block(rows, rows, config)
        if number == 0:  # every latent and one new token, instead of all tokens
            block = _less(block, linear(rows, width, 5 * width)) + linear(padded + 1, width, 5 * width)
        count += block
    patch = audio_channels * config.patch_size
    return count + linear(padded * config.stride, config.decoder_kernel * width, patch)


def encoder(frames: int, config: SAMEConfig, audio_channels: int) -> Count:
    """One chunk of ``frames``."""
    padded, width = pad_frames(frames, config), config.width
    tokens = padded * (config.stride + 1)
    count = linear(padded * config.stride, audio_channels * config.patch_size, width)
    rows = _block_tokens(tokens, config.encoder_depth, config)
    for size in rows[:-1]:
        count += _same_block(size, size, config)
    count += _same_block(rows[-1] // (config.stride + 1), rows[-1], config)
    return count + linear(padded, width, config.latent_channels)


def _block_tokens(tokens: int, depth: int, config: SAMEConfig) -> list[int]:
    """Tokens that each layer runs on: the shifted half of a chunked transformer sees one chunk more."""
    more = config.span * (config.stride + 1) if config.attention == "chunked" else 0
    return [tokens + (more if number >= depth // 2 else 0) for number in range(depth)]


def _same_block(queries: int, tokens: int, config: SAMEConfig) -> Count:
    group = config.stride + 1
    window = config.span * group if config.attention == "chunked" else 3 * group
    count = _self_attention(queries, tokens, window, config.width, 2)
    return count + feed_forward(queries, config.width, config.ff_mult)


def _less(count: Count, other: Count) -> Count:
    return count + other.times(-1)


# --- a whole generation -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a generation."""

    name: str
    count: Count
    width: int  # bytes a number
    precise: bool  # fp32 unless the chip's faster fp32 is asked for


def seconds_at_least(stage: Stage, chip: Chip, *, tf32: bool) -> float:
    """The longer of arithmetic and traffic at the chip's peaks."""
    rate = chip.fp16
    if stage.precise:
        rate = chip.tf32 if tf32 and chip.tf32 is not None else chip.fp32
    return max(stage.count.flops / rate / 1e12, stage.count.bytes(stage.width) / chip.gb_per_s / 1e9)


def stages(config: ModelConfig, seconds: float, *, tokens: int, steps: int, dit_width: int = 2) -> list[Stage]:
    """Text-to-audio of one item without guidance: 16-bit text encoder, ``dit_width`` bytes in the DiT, fp32 codec.

    ``tokens``: of the prompt; one more slot stands for all its padding, and one is the duration.
    """
    diffusion, same = config.diffusion, config.same
    if diffusion is None:
        raise ValueError(f"{config.name} is an autoencoder alone and cannot generate; choose a model with a DiT")
    lengths = clip_lengths([seconds], config, diffusion.head_room_seconds)
    slots = min(tokens + 1, diffusion.text_encoder.max_length)
    channels = same.latent_channels
    once = prepare(slots + 1, 1, diffusion, channels) + modulation(steps, diffusion)
    sampling = once + velocity(lengths.frames, slots + 1, diffusion, channels).times(steps)
    return [
        Stage(name="text", count=text_encoder(slots, diffusion.text_encoder), width=2, precise=False),
        Stage(name="sample", count=sampling, width=dit_width, precise=dit_width == 4),
        Stage(name="decode", count=decoding(config, seconds), width=4, precise=True),
    ]


def decoding(config: ModelConfig, seconds: float) -> Count:
    """The chunks that a clip of this length is decoded in."""
    same = config.same
    assert config.diffusion is not None
    lengths = clip_lengths([seconds], config, config.diffusion.head_room_seconds)
    audible = samples_to_frames(seconds_to_samples(seconds, config.sample_rate), same)
    frames = min(lengths.valid[0], pad_frames(audible + halo(same, "decode"), same))
    plan = chunk_plan(frames, default_chunk_frames(same, "decode"), same, "decode")
    used = [chunk for chunk in plan if chunk.keep_start < audible]
    return total(decoder(chunk.stop - chunk.start, same, config.audio_channels) for chunk in used)


def floor(config: ModelConfig, seconds: float, chip: Chip, *, tokens: int, steps: int, tf32: bool) -> float:
    """Seconds that the chip's peaks allow at best."""
    return sum(
        seconds_at_least(stage, chip, tf32=tf32) for stage in stages(config, seconds, tokens=tokens, steps=steps)
    )
