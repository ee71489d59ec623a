"""Predict the memory of a run before it begins, and find the largest chunks that fit into a limit.

A phase (text, encode, sample, decode) needs the weights of the parts that are in memory plus its activations. In MLX's
evaluation order the activations of a transformer are a fixed number of copies of its hidden states (tokens x width),
plus, where attention is not fused, one matrix of attention scores. These numbers of copies do not depend on width,
depth or length; they are measured on MLX's CPU backend (``python -m benchmarks memory`` repeats it) and tests hold the
prediction to within 10 % of MLX's own peak counter. On Metal, where attention and pointwise groups are fused, and in
PyTorch the same numbers serve as an upper estimate. Python itself, the audio and the drawn noise are not counted.

Shapes: B batch, T latent frames, N tokens, D width, S text tokens.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sa3_mlx.common.files.safetensors import FLOATS, STORAGE, TensorFile
from sa3_mlx.common.model.checkpoint import expected_tensors
from sa3_mlx.common.model.chunks import Direction, chunk_plan, default_chunk_frames, halo, pad_frames
from sa3_mlx.common.model.config import DiffusionConfig, ModelConfig
from sa3_mlx.common.model.lengths import clip_lengths, samples_to_frames, seconds_to_samples
from sa3_mlx.common.model.precision import Precision

from .request import Request, Residency

PhaseName = Literal["text", "encode", "sample", "decode"]
MARGIN = 1.1  # of a prediction that has to fit into a limit

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
TEXT_COPIES = 20.0
# Where the blocks of the DiT are read in every step, a whole feed-forward is in memory, and these shares of the rest of
# its block and, where its type changes, of its bytes in the file.
STREAMED_REST = 0.25
STREAMED_CAST = 0.82

_HOW: dict[Residency, str] = {
    "run": "all parts stay",
    "phase": "parts are freed after use",
    "step": "parts are freed after use and the blocks of the DiT read in every step",
}
_BLOCK = re.compile(r"dit\.layers\.\d+")
FEED_FORWARD = ".ff"  # of a block
CAST = "cast"  # among bytes by part: see ``stored_weight_bytes``
_IN_FILE = "embed_tokens.weight"  # its rows are read one by one
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Describe the need of one phase of a run."""

    name: PhaseName
    weights: int  # bytes of the parts in memory
    activations: int  # bytes

    @property
    def peak(self) -> int:
        """Return the bytes at the worst moment."""
        return self.weights + self.activations


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Describe how a run goes and what it needs; ``chunk_frames`` None: the usual ones."""

    phases: tuple[Phase, ...]
    precision: Precision
    residency: Residency
    chunk_frames: int | None
    encode_chunk_frames: int | None

    @property
    def peak(self) -> int:
        """Return the bytes at the worst moment of all phases."""
        return max(phase.peak for phase in self.phases)

    def text(self) -> str:
        """Return one line for people."""
        phases = ", ".join(f"{phase.name} {size_text(phase.peak)}" for phase in self.phases)
        how = _HOW[self.residency]
        types = f"{self.precision.dtype}, text in {self.precision.text_dtype or 'the type of the file'}"
        chunks = [f"decoded by {self.chunk_frames} frames"] if self.chunk_frames else []
        chunks += [f"encoded by {self.encode_chunk_frames} frames"] if self.encode_chunk_frames else []
        details = ", ".join([types, how, *chunks])
        return f"memory for arrays of the model {size_text(self.peak)} at most ({phases}; {details})"


def parse_size(text: str) -> int:
    """Return the bytes of "6GB", "800 MB", "2.5GiB". Raises ValueError for anything else."""
    found = _SIZE.fullmatch(text)
    unit = _UNITS.get(found[2].lower()) if found else None
    count = float(found[1]) * (unit or 0) if found else 0.0
    if found is None or unit is None or not 0 < count < 2**60 or (unit == 1 and count < 10**6):
        raise ValueError(f"size is {text[:40]!r}: expected a number with a unit, such as 6GB, 800MB or 4GiB")
    return int(count)


def part_bytes(config: ModelConfig, part: str, width: int) -> int:
    """Return the bytes of a part, or of "same.encoder" or "same.decoder", in memory at ``width`` bytes a number.

    The table of token embeddings stays in the file.
    """
    shapes = expected_tensors(config, [part.split(".")[0]])
    held = [name for name in shapes if name.startswith(part + ".") and not name.endswith(_IN_FILE)]
    return width * sum(math.prod(shapes[name]) for name in held)


def _streamed_bytes(weights: Mapping[str, int]) -> int:
    """Return the bytes of the DiT with only a part of one block in memory."""
    blocks = {name: size for name, size in weights.items() if _BLOCK.fullmatch(name)}
    largest = max(blocks, key=lambda name: blocks[name])
    feed_forward = weights[largest + FEED_FORWARD]
    part = feed_forward + STREAMED_REST * (blocks[largest] - feed_forward) + STREAMED_CAST * weights.get(CAST, 0)
    return weights["dit"] - sum(blocks.values()) + int(part)


def weight_bytes(config: ModelConfig, precision: Precision) -> dict[str, int]:
    """Return the bytes of every part of a checkpoint without quantized layers, of blocks and their feed-forwards."""
    widths = _widths(precision, [f"dit.layers.{number}" for number in range(config.require_diffusion().dit.depth)])
    return {part: part_bytes(config, part, width) for part, width in widths.items()}


def stored_weight_bytes(file: TensorFile, precision: Precision) -> dict[str, int]:
    """Return the same for a weight file, where packed words of quantized layers stay as they are.

    ``CAST``: the bytes in the file of the largest feed-forward of the DiT, as far as they change their type.
    """
    blocks = sorted({found[0] for name in file.names() if (found := _BLOCK.match(name))})
    sizes = {CAST: max((_cast_bytes(file, block + FEED_FORWARD, precision) for block in blocks), default=0)}
    for part, width in _widths(precision, blocks).items():
        names = [name for name in file.names() if name.startswith(part + ".") and not name.endswith(_IN_FILE)]
        kinds = [file.info(name) for name in names]
        sizes[part] = sum(math.prod(shape) * (4 if kind == "U32" else width) for kind, shape in kinds)
    return sizes


def _cast_bytes(file: TensorFile, part: str, precision: Precision) -> int:
    """Return the bytes in a file of the floats of a part that are not of the type of the DiT."""
    kinds = [file.info(name) for name in file.names() if name.startswith(part + ".")]
    own = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[precision.dtype]
    return sum(math.prod(shape) * STORAGE[kind].itemsize for kind, shape in kinds if kind in FLOATS and kind != own)


def _widths(precision: Precision, blocks: Sequence[str]) -> dict[str, int]:
    """Return the bytes of a number in memory, by part; blocks of the DiT and their feed-forwards are parts too."""
    text, dit = precision.text_bytes, precision.bytes
    widths = {"text_encoder": text, "conditioner": 4, "dit": dit, "same.encoder": 4, "same.decoder": 4}
    return widths | {block + end: dit for block in blocks for end in ("", FEED_FORWARD)}


def predict(
    request: Request,
    config: ModelConfig,
    precision: Precision,
    *,
    residency: Residency = "run",
    tokens: int | None = None,
    weights: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """Predict the peaks of the phases of a run, with the chunk sizes of the request, which must be valid.

    ``tokens``: of the longest text; None stands for as many as the model takes. ``weights``: bytes by part, where they
    are not those of the configuration.
    """
    diffusion, weights = config.require_diffusion(), weights or weight_bytes(config, precision)
    needs: dict[PhaseName, tuple[str, ...]] = {"text": ("text_encoder", "conditioner")}
    if request.init is not None or request.inpaint is not None:
        needs["encode"] = ("same.encoder",)
    needs["sample"] = ("dit", "same.decoder") if residency == "run" else ("dit",)  # the decoder is read meanwhile
    needs["decode"] = ("same.decoder",)
    phases, loaded = [], set[str]()
    for name, parts in needs.items():
        loaded = loaded | set(parts) if residency == "run" else set(parts)
        held = sum(
            _streamed_bytes(weights) if (part, residency) == ("dit", "step") else weights[part] for part in loaded
        )
        size = _activations(name, request, config, precision, _slots(tokens, precision, diffusion))
        phases.append(Phase(name=name, weights=held, activations=size))
    return MemoryPlan(
        phases=tuple(phases),
        precision=precision,
        residency=residency,
        chunk_frames=request.chunk_frames,
        encode_chunk_frames=request.encode_chunk_frames,
    )


def fit(
    request: Request,
    config: ModelConfig,
    precisions: Sequence[Precision],
    limit: int,
    *,
    weights: Callable[[Precision], Mapping[str, int]] | None = None,
) -> MemoryPlan:
    """Choose the best way to run within ``limit`` bytes.

    Everything in memory, else parts freed after use, else smaller chunks too, all of these in the first of the allowed
    precisions, then in the next; else the DiT read block by block in every step, in the first precision that fits so.

    ``weights``: bytes by part, where they are not those of the configuration. Raises ValueError, with what would help,
    when nothing fits.
    """
    ways: tuple[tuple[Residency, ...], ...] = (("run", "phase"), ("step",))
    for residencies, precision in itertools.product(ways, precisions):
        sizes = weights(precision) if weights else weight_bytes(config, precision)
        smaller = replace(
            request,
            chunk_frames=_largest_chunk(request, config, "decode", limit, sizes),
            encode_chunk_frames=_largest_chunk(request, config, "encode", limit, sizes),
        )
        for wanted, residency in (*((request, residency) for residency in residencies), (smaller, residencies[-1])):
            plan = predict(wanted, config, precision, residency=residency, weights=sizes)
            if plan.peak * MARGIN <= limit:
                return plan
    raise ValueError(_refusal(plan, smaller, config, limit))


def same_activations(frames: int, config: ModelConfig, direction: Direction) -> int:
    """Return the bytes that one half of the autoencoder needs for a chunk of ``frames``."""
    same = config.same
    shift = same.span if same.attention == "chunked" else 0  # the shifted layers see half a chunk more at both ends
    tokens = (pad_frames(frames, same) + shift) * (same.stride + 1)
    samples = frames * same.samples_per_latent * config.audio_channels if direction == "decode" else 0
    copies = SAME_COPIES[same.attention, direction] + SAME_COPIES_PER_FF_MULT * same.ff_mult
    return int(4 * (copies * tokens * same.width + AUDIO_COPIES[same.attention] * samples))


def dit_activations(rows: int, frames: int, config: DiffusionConfig, width: int) -> int:
    """Return the bytes of one velocity of a batch of ``rows``; ``width`` bytes a number."""
    dit = config.dit
    tokens = frames + dit.memory_tokens
    scores = dit.heads * (2 if dit.differential else 1) * tokens / dit.width
    feed_forward = DIT_FEED_FORWARD_COPIES + DIT_COPIES_PER_FF_MULT * dit.ff_mult
    copies = max(feed_forward, DIT_ATTENTION_COPIES[dit.differential] + scores)
    return int(rows * tokens * dit.width * width * copies * (1 if width == 4 else DIT_HALF_FACTOR))


def prepared_bytes(rows: int, slots: int, config: DiffusionConfig, width: int) -> int:
    """Return the bytes of keys and values of the context, ``slots`` and the duration, in all blocks."""
    per_block = (3 if config.dit.differential else 2) * config.dit.width
    return rows * config.dit.depth * (slots + 1) * per_block * width


def text_activations(texts: int, slots: int, config: DiffusionConfig) -> int:
    """Return the bytes that the text encoder needs for a batch of ``texts``."""
    text = config.text_encoder
    return int(texts * slots * (TEXT_COPIES * text.width + 3 * text.heads * slots) * 4)


def _slots(tokens: int | None, precision: Precision, config: DiffusionConfig) -> int:
    """Return the slots of the longest text: its tokens, and one or two that stand for all the padding after them."""
    longest = config.text_encoder.max_length
    return longest if tokens is None else min(tokens + (1 if precision.dtype == "float32" else 2), longest)


def _activations(phase: PhaseName, request: Request, config: ModelConfig, precision: Precision, slots: int) -> int:
    diffusion, width = config.require_diffusion(), precision.bytes
    sampling = request.sampling or config.usual_sampling
    head_room = diffusion.head_room_seconds if request.head_room_seconds is None else request.head_room_seconds
    lengths = clip_lengths([item.seconds for item in request.items], config, head_room)
    negatives = {item.negative_prompt for item in request.items} - {None}
    if phase == "text":
        return text_activations(len({item.prompt for item in request.items} | negatives), slots, diffusion)
    if phase == "sample":
        rows = len(request.items) * (1 if sampling.guidance.scale == 1 else 2)
        contexts = len(request.items) * (2 if negatives else 1)
        return dit_activations(rows, lengths.frames, diffusion, width) + prepared_bytes(
            contexts, slots, diffusion, width
        )
    if phase == "encode":
        return _chunk_bytes(lengths.frames, request.encode_chunk_frames, config, "encode")
    audible = max(
        samples_to_frames(seconds_to_samples(item.seconds, config.sample_rate), config.same) for item in request.items
    )
    frames = min(lengths.frames, pad_frames(audible + halo(config.same, "decode"), config.same))
    return _chunk_bytes(frames, request.chunk_frames, config, "decode")


def _chunk_bytes(frames: int, chunk_frames: int | None, config: ModelConfig, direction: Direction) -> int:
    size = chunk_frames or default_chunk_frames(config.same, direction)
    chunks = chunk_plan(frames, size, config.same, direction)
    return same_activations(max(chunk.stop - chunk.start for chunk in chunks), config, direction)


def _largest_chunk(
    request: Request, config: ModelConfig, direction: Direction, limit: int, weights: Mapping[str, int]
) -> int | None:
    """Return the frames of the largest chunk that fits beside the autoencoder; None where it is not used."""
    if direction == "encode" and request.init is None and request.inpaint is None:
        return None
    same = config.same
    room = limit / MARGIN - weights[f"same.{direction}r"]
    smallest = 2 * halo(same, direction) + same.frame_multiple
    size = default_chunk_frames(same, direction)
    while size > smallest and same_activations(size, config, direction) > room:
        size -= same.frame_multiple
    return size


def _refusal(plan: MemoryPlan, request: Request, config: ModelConfig, limit: int) -> str:
    precision = plan.precision
    worst = max(plan.phases, key=lambda phase: phase.peak)
    first = request.items[:1]
    others: dict[str, tuple[Request, Precision]] = {}
    if len(request.items) > 1:
        others["--batch 1"] = (replace(request, items=first, init=None, inpaint=None), precision)
    if precision.dtype == "float32":
        others["--dtype float16"] = (request, replace(precision, dtype="float16"))
    if precision.text_dtype == "float32":
        others["--text-dtype bfloat16"] = (request, replace(precision, text_dtype="bfloat16"))
    if len(others) > 1:
        both = Precision(dtype="float16", text_dtype="bfloat16")
        others[" ".join(others)] = (replace(request, items=first, init=None, inpaint=None), both)
    for name, (other, types) in others.items():
        peak = predict(other, config, types, residency="step").peak
        if peak * MARGIN <= limit:
            return f"{_too_much(plan, worst, config, limit)}; with {name} it is {size_text(peak)}"
    needed = size_text(int(plan.peak * MARGIN))
    return f"{_too_much(plan, worst, config, limit)}; allow {needed}, or choose a smaller model or fewer seconds"


def _too_much(plan: MemoryPlan, worst: Phase, config: ModelConfig, limit: int) -> str:
    return (
        f"memory: {config.name} needs {size_text(plan.peak)} (phase {worst.name}: weights {size_text(worst.weights)}, "
        f"activations {size_text(worst.activations)}), which with {MARGIN - 1:.0%} to spare is more than "
        f"{size_text(limit)}"
    )


def size_text(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
