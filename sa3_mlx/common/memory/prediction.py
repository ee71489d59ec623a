"""Predict the memory of a run before it begins, and find the largest chunks that fit into a limit.

A phase (text, encode, sample, decode) needs the weights of the parts that are in memory plus its activations. In MLX's
evaluation order the activations of a transformer are a fixed number of copies of its hidden states (tokens x width),
plus, where attention is not fused, one matrix of attention scores. These numbers of copies do not depend on width,
depth or length; they are measured on MLX's CPU backend (``python -m benchmarks memory`` repeats it) and tests hold the
prediction to within 10 % of MLX's own peak counter. In PyTorch the same numbers serve as an upper estimate, and on an
Apple GPU terms of its own come on top (``metal.py``). Python itself, the audio and the drawn noise are not counted.

Shapes: B batch, T latent frames, N tokens, D width, S text tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sa3_mlx.common.files.safetensors import FLOATS, STORAGE, TensorFile
from sa3_mlx.common.generation.request import Request, Residency
from sa3_mlx.common.model.checkpoint import expected_tensors
from sa3_mlx.common.model.chunks import Direction, default_chunk_frames, halo, long_chunk_frames
from sa3_mlx.common.model.config import DiffusionConfig, ModelConfig
from sa3_mlx.common.model.precision import Precision

from .activations import PhaseName, activations, coded_frames, largest_chunk
from .metal import Metal

MARGIN = 1.1  # of a prediction that has to fit into a limit

# Where the blocks of the DiT are read in every step, a whole feed-forward is in memory, and these shares of the rest of
# its block and, where its type changes, of its bytes in the file.
STREAMED_REST = 0.25
STREAMED_CAST = 0.82

# Residencies to try in one number type before the next one is tried; ``DISK_LAST`` reads the DiT in every step at last.
IN_MEMORY: tuple[tuple[Residency, ...], ...] = (("run", "phase"),)
DISK_LAST: tuple[tuple[Residency, ...], ...] = (*IN_MEMORY, ("step",))
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

    @property
    def weights(self) -> int:
        """Return the most bytes of weights of all phases."""
        return max(phase.weights for phase in self.phases)

    @property
    def activations(self) -> int:
        """Return the most bytes of activations of all phases."""
        return max(phase.activations for phase in self.phases)

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
    metal: Metal | None = None,
) -> MemoryPlan:
    """Predict the peaks of the phases of a run, with the chunk sizes of the request, which must be valid.

    ``tokens``: of the longest text; None stands for as many as the model takes. ``weights``: bytes by part, where they
    are not those of the configuration; a latent CLAP among them ranks what is made. ``metal``: the Apple GPU that MLX
    runs on.
    """
    diffusion, weights = config.require_diffusion(), weights or weight_bytes(config, precision)
    needs: dict[PhaseName, tuple[str, ...]] = {"text": ("text_encoder", "conditioner")}
    if request.init is not None or request.inpaint is not None:
        needs["encode"] = ("same.encoder",)
    needs["sample"] = ("dit", "same.decoder") if residency == "run" else ("dit",)  # the decoder is read meanwhile
    needs["decode"] = ("same.decoder",)
    if "clap" in weights:
        needs["rank"] = ("text_encoder", "clap")
    phases, loaded = [], set[str]()
    for name, parts in needs.items():
        loaded = loaded | set(parts) if residency == "run" else set(parts)
        held = sum(
            _streamed_bytes(weights) if (part, residency) == ("dit", "step") else weights[part] for part in loaded
        )
        size = activations(name, request, config, precision, _slots(tokens, precision, diffusion), metal)
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
    metal: Metal | None = None,
    residencies: Sequence[Sequence[Residency]] = DISK_LAST,
) -> MemoryPlan:
    """Choose the best way to run within ``limit`` bytes.

    Everything in memory, else parts freed after use, else smaller chunks too, all of these in the first of the allowed
    precisions, then in the next; else the DiT read block by block in every step, in the first precision that fits so.
    An Apple GPU gets longer chunks where they fit.

    ``weights``: bytes by part, where they are not those of the configuration. Raises ValueError, with what would help,
    when nothing fits.
    """
    for allowed in residencies:
        for precision in precisions:
            sizes = weights(precision) if weights else weight_bytes(config, precision)
            ways = [(request, residency) for residency in allowed]
            if metal is not None and metal.long_chunks:
                usual = [
                    predict(request, config, precision, residency=way, weights=sizes, metal=metal) for way in allowed
                ]
                ways = [(_longer(request, config, limit, plan, metal), plan.residency) for plan in usual]
            smaller = replace(
                request,
                chunk_frames=_largest_chunk(request, config, "decode", limit, sizes, metal),
                encode_chunk_frames=_largest_chunk(request, config, "encode", limit, sizes, metal),
            )
            for wanted, residency in (*ways, (smaller, allowed[-1])):
                plan = predict(wanted, config, precision, residency=residency, weights=sizes, metal=metal)
                if plan.peak * MARGIN <= limit:
                    return plan
    raise ValueError(_refusal(plan, smaller, config, limit, metal))


def _slots(tokens: int | None, precision: Precision, config: DiffusionConfig) -> int:
    """Return the slots of the longest text: its tokens, and one or two that stand for all the padding after them."""
    longest = config.text_encoder.max_length
    return longest if tokens is None else min(tokens + (1 if precision.dtype == "float32" else 2), longest)


def _longer(request: Request, config: ModelConfig, limit: int, plan: MemoryPlan, metal: Metal) -> Request:
    """Return the request with longer chunks than the usual ones, where the clip is long and the plan leaves room."""

    def size(direction: Direction, given: int | None) -> int | None:
        default, longest = default_chunk_frames(config.same, direction), long_chunk_frames(config.same, direction)
        weights = [phase.weights for phase in plan.phases if phase.name == direction]
        if given is not None or not weights or coded_frames(request, config, direction) <= default:
            return given
        room = limit / MARGIN - weights[0]
        found = largest_chunk(config, direction, room, metal, longest=longest, least=default)
        return None if found == default else found

    return replace(
        request,
        chunk_frames=size("decode", request.chunk_frames),
        encode_chunk_frames=size("encode", request.encode_chunk_frames),
    )


def _largest_chunk(
    request: Request,
    config: ModelConfig,
    direction: Direction,
    limit: int,
    weights: Mapping[str, int],
    metal: Metal | None,
) -> int | None:
    """Return the frames of the largest chunk that fits beside the autoencoder; None where it is not used."""
    if direction == "encode" and request.init is None and request.inpaint is None:
        return None
    room, same = limit / MARGIN - weights[f"same.{direction}r"], config.same
    smallest = 2 * halo(same, direction) + same.frame_multiple
    default = default_chunk_frames(same, direction)
    return largest_chunk(config, direction, room, metal, longest=default, least=smallest)


def _refusal(plan: MemoryPlan, request: Request, config: ModelConfig, limit: int, metal: Metal | None) -> str:
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
        peak = predict(other, config, types, residency="step", metal=metal).peak
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
