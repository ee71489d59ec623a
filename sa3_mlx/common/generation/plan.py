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
    padding_mask: NDArray[np.bool_]  # (B, T) true at valid frames
    sigmas: NDArray[np.float32]  # (B, steps + 1)
    init: tuple[InitAudio, ...] | None
    inpaint: tuple[Inpaint, ...] | None
    regions: tuple[tuple[Region, ...], ...]  # samples; empty without inpainting
    keep_frames: NDArray[np.float32]  # (B, T) 1 keep, 0 generate; all 0 without inpainting [B7]


def plan(request: Request, config: ModelConfig) -> Plan:
    """Validate the request and work out everything that is known before the model runs.

    Raises ValueError, one line, for a request that cannot be done.
    """
    validate(request, config)
    diffusion, sampling = config.require_diffusion(), request.sampling or config.usual_sampling
    head_room = diffusion.head_room_seconds if request.head_room_seconds is None else request.head_room_seconds
    lengths = clip_lengths([item.seconds for item in request.items], config, head_room)
    init = per_item(request.init, InitAudio, "init", request)
    inpaint = per_item(request.inpaint, Inpaint, "inpaint", request)
    regions = tuple(to_regions(item.regions, config.sample_rate) for item in inpaint or ())
    keep = np.zeros((len(request.items), lengths.frames), dtype=np.float32)
    for row, item_regions in enumerate(regions):
        keep[row] = keep_frames(
            item_regions, lengths.output_samples[row], lengths.frames, config.same.samples_per_latent
        )
    levels = [item.noise_level for item in init] if init else 1.0
    return Plan(
        frames=lengths.frames,
        sampling=sampling,
        head_room_seconds=head_room,
        lengths=lengths,
        padding_mask=np.arange(lengths.frames)[None] < np.array(lengths.valid)[:, None],
        sigmas=sigmas(diffusion.shift, sampling.steps, levels, lengths.effective, schedule=request.schedule),
        init=init,
        inpaint=inpaint,
        regions=regions or tuple(() for _ in request.items),
        keep_frames=keep,
    )


def with_chunks(request: Request, way: str, config: SAMEConfig) -> Request:
    """Return a request that names the chunks of this way, where it left them open and they are not the usual ones."""
    if way not in FACTORS:
        return request
    return replace(
        request,
        chunk_frames=request.chunk_frames or chunk_frames(way, config, "decode"),
        encode_chunk_frames=request.encode_chunk_frames or chunk_frames(way, config, "encode"),
    )
