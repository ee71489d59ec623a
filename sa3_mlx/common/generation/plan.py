"""Turn a request into lengths, masks, schedule and regions, which both twins carry out.

Shapes: B batch, T latent frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.model.config import ModelConfig, SAMEConfig
from sa3_mlx.common.model.lengths import Lengths, clip_lengths
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.tuning.chunk import FACTORS, chunk_frames

from .checks import validate
from .frames import FrameSeed, PatchFrames, prompt_shares
from .loop import Ring
from .regions import Region, keep_frames, to_regions
from .request import InitAudio, Inpaint, Request, per_item
from .schedule import sigmas


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Describe a request in frames and samples: one entry per item where nothing else is said."""

    frames: int  # T of all
    sampling: Sampling  # of all
    head_room_seconds: float  # of all
    lengths: Lengths
    ring: Ring | None  # of loops that turn
    padding_mask: NDArray[np.bool_]  # (B, T) true at valid frames
    sigmas: NDArray[np.float32]  # (B, steps + 1)
    init: tuple[InitAudio, ...] | None
    inpaint: tuple[Inpaint, ...] | None
    regions: tuple[tuple[Region, ...], ...]  # samples; empty without inpainting
    keep_frames: NDArray[np.float32]  # (B, T) 1 keep, 0 generate; all 0 without inpainting [B7]
    shares: NDArray[np.float32] | None  # (B, M + T, K) of K prompts, see ``prompt_shares``
    levels: NDArray[np.float32] | None  # (B, T) at which frames leave the source; None where all are 1
    seeds: tuple[tuple[FrameSeed, ...], ...]  # of frames that have their own


def plan(request: Request, config: ModelConfig) -> Plan:
    """Validate the request and work out everything that is known before the model runs.

    Raises ValueError, one line, for a request that cannot be done.
    """
    validate(request, config)
    diffusion, sampling = config.require_diffusion(), request.sampling or config.usual_sampling
    head_room = head_room_seconds(request, config)
    ring = ring_of(request, config)
    lengths = request_lengths(request, config)
    init = per_item(request.init, InitAudio, "init", request)
    inpaint = per_item(request.inpaint, Inpaint, "inpaint", request)
    regions = tuple(to_regions(item.spans, config.sample_rate) for item in inpaint or ())
    ratio = config.same.samples_per_latent
    keep = np.zeros((len(request.items), lengths.frames), dtype=np.float32)
    for row, item_regions in enumerate(regions):
        keep[row] = keep_frames(item_regions, lengths.output_samples[row], lengths.frames, ratio)
    placed = [PatchFrames(samples, config.sample_rate, ratio) for samples in lengths.output_samples]
    each = list(zip(placed, inpaint or (), regions, strict=False))
    levels = np.array([find.levels(given, own, lengths.frames) for find, given, own in each], np.float32)
    memory, noise_levels = diffusion.dit.memory_tokens, [item.noise_level for item in init] if init else 1.0
    return Plan(
        frames=lengths.frames,
        sampling=sampling,
        head_room_seconds=head_room,
        lengths=lengths,
        ring=ring,
        padding_mask=np.arange(lengths.frames)[None] < np.array(lengths.valid)[:, None],
        sigmas=sigmas(diffusion.shift, sampling.steps, noise_levels, lengths.effective, schedule=request.schedule),
        init=init,
        inpaint=inpaint,
        regions=regions or tuple(() for _ in request.items),
        keep_frames=keep,
        shares=prompt_shares(request, lengths.valid, lengths.frames, ratio / config.sample_rate, memory),
        levels=None if (levels == 1).all() else levels,
        seeds=tuple(find.seeds(given) for find, given, _ in each) or tuple(() for _ in request.items),
    )


def ring_of(request: Request, config: ModelConfig) -> Ring | None:
    """Return where the loops of a request lie, None unless they turn."""
    turns = request.loop is not None and request.loop.way == "turn"
    return Ring.of(request.items[0].seconds, config) if turns else None


def head_room_seconds(request: Request, config: ModelConfig) -> float:
    """Return what is made beyond the end: as asked for, or the model's own, which a loop has not."""
    if request.head_room_seconds is not None:
        return request.head_room_seconds
    return config.require_diffusion().head_room_seconds if request.loop is None else 0.0


def told_seconds(request: Request, config: ModelConfig) -> list[float]:
    """Return the duration of every item that the model is told: of a loop more than its own, so that nothing ends."""
    more = 0.0 if request.loop is None else config.require_diffusion().head_room_seconds
    return [item.seconds if not more else min(item.seconds + more, config.max_seconds) for item in request.items]


def request_lengths(request: Request, config: ModelConfig) -> Lengths:
    """Return the lengths of a request, which must be valid."""
    ring = ring_of(request, config)
    if ring is not None:
        return ring.lengths(len(request.items))
    return clip_lengths([item.seconds for item in request.items], config, head_room_seconds(request, config))


def with_chunks(request: Request, way: str, config: SAMEConfig) -> Request:
    """Return a request that names the chunks of this way, where it left them open and they are not the usual ones."""
    if way not in FACTORS:
        return request
    return replace(
        request,
        chunk_frames=request.chunk_frames or chunk_frames(way, config, "decode"),
        encode_chunk_frames=request.encode_chunk_frames or chunk_frames(way, config, "encode"),
    )
