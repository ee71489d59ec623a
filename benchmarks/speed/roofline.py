"""Count arithmetic and traffic of a generation, and the least time a chip needs: ``python -m benchmarks roofline``.

Counted is the graph that the twins execute: products of matrices and attention, 2 FLOP a multiply-add. Bytes are the
weights, read once per evaluation, and what every product reads and writes; pointwise work counts as fused into it. A
test holds the FLOPs to those of the executed graph. The floor of a stage is the longer of both times; real programs
reach about 70 % of it in long products, and launches, loading and pointwise work come on top.

Shapes: T latent frames, S text tokens, C context tokens, N tokens of a transformer, E width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import click

from benchmarks.options import parse_lengths
from sa3_mlx.cli.models.listing import table
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
from sa3_mlx.common.model.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class Count:
    """Hold FLOPs, numbers of weights read, and numbers of activations read and written."""

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
        """Count it so often."""
        return Count(flops=repeats * self.flops, weights=repeats * self.weights, activations=repeats * self.activations)

    def bytes(self, width: int) -> int:
        """Return the bytes that move, with so many per number."""
        return width * (self.weights + self.activations)


def linear(rows: int, size_in: int, size_out: int) -> Count:
    """Count a product with a matrix."""
    return Count(
        flops=2 * rows * size_in * size_out, weights=size_in * size_out, activations=rows * (size_in + size_out)
    )


def attention(queries: int, keys_per_query: int, keys: int, width: int, maps: int) -> Count:
    """Count scores and weighted sums of all heads; ``maps`` is 2 for differential attention."""
    return Count(
        flops=4 * maps * queries * keys_per_query * width,
        activations=(maps * (queries + keys) + queries + keys) * width,  # q, k, values and the result
    )


def total(counts: Iterator[Count]) -> Count:
    """Add counts."""
    return sum(counts, Count())


def mlp(rows: int, size_in: int, width: int, size_out: int) -> Count:
    """Count two products, one after the other."""
    return linear(rows, size_in, width) + linear(rows, width, size_out)


def feed_forward(rows: int, width: int, mult: int) -> Count:
    """Count a gated feed-forward [B14]."""
    return linear(rows, width, 2 * mult * width) + linear(rows, mult * width, width)


# --- text and diffusion -----------------------------------------------------------------------------------------------


def text_encoder(tokens: int, config: TextEncoderConfig) -> Count:
    """Count one prompt of ``tokens`` slots."""
    width = config.width
    layer = linear(tokens, width, width).times(4) + attention(tokens, tokens, tokens, width, 1)
    layer += linear(tokens, width, config.intermediate).times(2) + linear(tokens, config.intermediate, width)
    return layer.times(config.depth)


def prepare(context: int, local_rows: int, config: DiffusionConfig, channels: int) -> Count:
    """Count once per prompt: context, duration, keys, values, and the local term of ``local_rows`` different frames."""
    width, text = config.dit.width, config.text_encoder.width
    block = linear(context, width, (3 if config.dit.differential else 2) * width)
    block += mlp(local_rows, channels + 1, width, width)
    return mlp(context, text, width, width) + mlp(1, text, width, width) + block.times(config.dit.depth)


def modulation(rows: int, config: DiffusionConfig) -> Count:
    """Count the modulation of ``rows`` times at once."""
    width = config.dit.width
    return mlp(rows, TIMESTEP_FEATURES, width, width) + mlp(rows, width, width, 6 * width)


def velocity(frames: int, context: int, config: DiffusionConfig, channels: int) -> Count:
    """Count one evaluation of the diffusion transformer for one item, without modulation."""
    dit = config.dit
    tokens, width = frames + dit.memory_tokens, dit.width
    ends = linear(frames, channels, channels).times(2) + linear(frames, channels, width)
    ends += linear(frames, width, channels)
    inner = _dit_block(tokens, tokens, context, dit).times(dit.depth - 1)
    return ends + inner + _dit_block(frames, tokens, context, dit)


def _dit_block(queries: int, tokens: int, context: int, config: DiTConfig) -> Count:
    """Count a block; ``queries`` are the tokens that leave it: all of them, or in the last block the frames."""
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
    """Count one chunk of ``frames``, without decoder noise."""
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
    """Count one chunk of ``frames``."""
    padded, width = pad_frames(frames, config), config.width
    tokens = padded * (config.stride + 1)
    count = linear(padded * config.stride, audio_channels * config.patch_size, width)
    rows = _block_tokens(tokens, config.encoder_depth, config)
    for size in rows[:-1]:
        count += _same_block(size, size, config)
    count += _same_block(rows[-1] // (config.stride + 1), rows[-1], config)
    return count + linear(padded, width, config.latent_channels)


def _block_tokens(tokens: int, depth: int, config: SAMEConfig) -> list[int]:
    """Return the tokens that each layer runs on: the shifted half of a chunked transformer sees one chunk more."""
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
class StageCount:
    """Count a part of a generation."""

    name: str
    count: Count
    width: int  # bytes a number
    precise: bool  # fp32 unless the chip's faster fp32 is asked for


def seconds_at_least(stage: StageCount, chip: Chip, *, tf32: bool) -> float:
    """Return the longer of arithmetic and traffic at the chip's peaks."""
    rate = chip.fp16
    if stage.precise:
        rate = chip.tf32 if tf32 and chip.tf32 is not None else chip.fp32
    return max(stage.count.flops / rate / 1e12, stage.count.bytes(stage.width) / chip.gb_per_s / 1e9)


def stages(config: ModelConfig, seconds: float, *, tokens: int, steps: int, dit_width: int = 2) -> list[StageCount]:
    """Count text-to-audio of one item without guidance: 16-bit text, ``dit_width`` bytes in the DiT, fp32 codec.

    ``tokens`` are those of the prompt; one more slot stands for all its padding, and one is the duration. Raises
    ConfigError for an autoencoder alone.
    """
    diffusion, same = config.require_diffusion(), config.same
    lengths = clip_lengths([seconds], config, diffusion.head_room_seconds)
    slots = min(tokens + 1, diffusion.text_encoder.max_length)
    channels = same.latent_channels
    once = prepare(slots + 1, 1, diffusion, channels) + modulation(steps, diffusion)
    sampling = once + velocity(lengths.frames, slots + 1, diffusion, channels).times(steps)
    return [
        StageCount(name="text", count=text_encoder(slots, diffusion.text_encoder), width=2, precise=False),
        StageCount(name="sample", count=sampling, width=dit_width, precise=dit_width == 4),
        StageCount(name="decode", count=decoding(config, seconds), width=4, precise=True),
    ]


def decoding(config: ModelConfig, seconds: float) -> Count:
    """Count the chunks that a clip of this length is decoded in."""
    same = config.same
    lengths = clip_lengths([seconds], config, config.require_diffusion().head_room_seconds)
    audible = samples_to_frames(seconds_to_samples(seconds, config.sample_rate), same)
    frames = min(lengths.valid[0], pad_frames(audible + halo(same, "decode"), same))
    plan = chunk_plan(frames, default_chunk_frames(same, "decode"), same, "decode")
    used = [chunk for chunk in plan if chunk.keep_start < audible]
    return total(decoder(chunk.stop - chunk.start, same, config.audio_channels) for chunk in used)


def floor(config: ModelConfig, seconds: float, chip: Chip, *, tokens: int, steps: int, tf32: bool) -> float:
    """Return the seconds that the chip's peaks allow at best."""
    return sum(
        seconds_at_least(stage, chip, tf32=tf32) for stage in stages(config, seconds, tokens=tokens, steps=steps)
    )


@click.command()
@click.option(
    "--model",
    type=click.Choice([name for name, config in PRESETS.items() if config.diffusion]),
    default="small-music",
    show_default=True,
)
@click.option("--seconds", "lengths", default="5,30,120", show_default=True, callback=parse_lengths, metavar="N,N")
@click.option("--tokens", type=click.IntRange(1), default=24, show_default=True, help="Of the prompt.")
@click.option("--steps", type=click.IntRange(1), help="Default: the model's.")
def roofline(model: str, lengths: tuple[float, ...], tokens: int, steps: int | None) -> None:
    """Print the least time that a chip's arithmetic and memory allow: modelled, not measured.

    Text encoder and DiT in 16 bits, autoencoder in fp32; the second number computes fp32 products as TF32 where the
    chip can. The last line is JSON.
    """
    config = PRESETS[model]
    count = steps or config.usual_sampling.steps
    rows, floors = [("audio", "stage", "TFLOP", "GB")], []
    for seconds in lengths:
        for stage in stages(config, seconds, tokens=tokens, steps=count):
            size = stage.count.bytes(stage.width) / 1e9
            rows.append((f"{seconds:g} s", stage.name, f"{stage.count.flops / 1e12:.3f}", f"{size:.2f}"))
    click.echo(f"{model}, {count} steps, {tokens} tokens\n{table(rows)}\n")
    lines = [("chip", "GPU cores", *(f"{seconds:g} s" for seconds in lengths), "peaks from")]
    for chip in Chip.load_all():
        cells = []
        for seconds in lengths:
            pair = [floor(config, seconds, chip, tokens=tokens, steps=count, tf32=tf32) for tf32 in (False, True)]
            floors.append({"chip": chip.name, "seconds": seconds, "fp32": pair[0], "tf32": pair[1]})
            cells.append(f"{pair[0]:.3f}" if pair[0] == pair[1] else f"{pair[0]:.3f} / {pair[1]:.3f}")
        lines.append((chip.name, str(chip.gpu_cores or "-"), *cells, chip.source))
    click.echo(f"floors in seconds, modelled\n{table(lines)}")
    click.echo(json.dumps({"model": model, "steps": count, "tokens": tokens, "floors": floors}))
