"""Make a region of any length before, after or between what is given: a piece in windows that goes on from it.

The piece begins with the end of what comes before the region and ends with the beginning of what follows; of both the
model hears as much as windows share. All else of what is given stays as it is and is not looked at.

Shapes: L samples, R samples per latent; audio is (L, channels), latents are (frames, C).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sa3_mlx.common.files.audio import going_on
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.regions import PasteBack, Region, to_regions
from sa3_mlx.common.generation.request import Inpaint, Patch, Request, per_item
from sa3_mlx.common.model.chunks import halo
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import length_multiple, samples_to_frames, samples_to_seconds, seconds_to_samples

from .windows import Layout, head_room_frames, item_between, layout, overlap_frames, window_frames

if TYPE_CHECKING:
    from sa3_mlx.common.generation.events import Latents


@dataclass(frozen=True, kw_only=True)
class Between:
    """Hold the piece around the region of a request, as a request of its own in its own time."""

    request: Request
    source: Audio  # of the whole; it may end where the region begins
    start: int  # sample of the whole at which the piece begins
    stop: int  # sample of the whole at which it ends
    samples: int  # of the whole
    region: Region  # of the whole
    before: int  # frames of the piece that are given at its beginning
    after: int  # and at its end

    def layout(self, config: ModelConfig) -> Layout:
        """Divide the piece into windows."""
        return layout(self.request, config, before=self.before, after=self.after)

    def paste(self, config: ModelConfig) -> PasteBack | None:
        """Return what keeps the samples of the piece that are given; None where the request wants none kept."""
        inpaints, crossfade = (
            per_item(self.request.inpaint, Inpaint, "inpaint", self.request),
            self.request.crossfade_ms,
        )
        if crossfade is None or inpaints is None:
            return None
        region = Region(self.region.start - self.start, self.region.stop - self.start)
        return PasteBack(inpaints[0].audio, [region], self.stop - self.start, config.sample_rate, crossfade)

    def encoded(self, encode: Callable[[Audio], Latents], config: ModelConfig) -> tuple[Latents, Latents]:
        """Encode what is given at the beginning and at the end (``before``, C), (``after``, C), as within the whole.

        Where the source ends ``going_on`` follows, so that the model hears no silence.
        """
        same = config.same
        first = self.start // same.samples_per_latent

        def part(start: int, frames: int) -> Latents:
            if not frames:
                return np.zeros((0, same.latent_channels), np.float32)
            edge, multiple, ratio = halo(same, "encode"), same.frame_multiple, same.samples_per_latent
            begin = max(0, start - edge) // multiple * multiple
            wanted = (start + frames + edge - begin) * ratio
            heard = self.source[begin * ratio : begin * ratio + wanted]
            latents = encode(np.concatenate([heard, going_on(heard, wanted - len(heard))]))
            return latents[start - begin : start - begin + frames]

        stop = first + samples_to_frames(self.stop - self.start, same)
        return part(first, self.before), part(stop - self.after, self.after)


def between(request: Request, config: ModelConfig) -> Between:
    """Find the piece around the one region of a request that is made in windows.

    Raises ValueError for a region with a way of its own.
    """
    inpaints = per_item(request.inpaint, Inpaint, "inpaint", request)
    assert inpaints is not None
    inpaint, item, rate, same = inpaints[0], request.items[0], config.sample_rate, config.same
    if inpaint.is_soft or any(
        isinstance(one, Patch) and (one.prompt is not None or one.seed is not None) for one in inpaint.regions
    ):
        raise ValueError("a region that is made in windows has no prompt, seed, noise level or feather of its own")
    (region,), total = to_regions(inpaint.spans, rate), seconds_to_samples(item.seconds, rate)
    ratio, size, overlap = same.samples_per_latent, window_frames(request, config), overlap_frames(request, config)
    given, goes_on = samples_to_frames(region.start, same), samples_to_frames(region.stop, same)
    room = size - (goes_on - given) - head_room_frames(request, config)  # of one window, beside what it makes
    heard = max(overlap, room) if region.stop >= total else overlap
    first = -(-max(0, given - heard) // same.frame_multiple) * same.frame_multiple
    first = first if first < given else max(0, given - 1) // same.frame_multiple * same.frame_multiple
    most = max(0, min(overlap, (size - overlap) // 2, samples_to_frames(total, same) - goes_on))
    after = most if goes_on - first + most >= size else max(0, most - (goes_on - first + most) % length_multiple(same))
    start, stop = first * ratio, min(total, (goes_on + after) * ratio)
    own = samples_to_seconds(stop - start, rate)
    times = tuple(samples_to_seconds(sample - start, rate) for sample in (region.start, region.stop))
    part = replace(
        request,
        items=(item_between(item, samples_to_seconds(start, rate), own, ratio / rate),),
        inpaint=replace(inpaint, audio=inpaint.audio[start:stop], regions=((times[0], times[1]),)),
    )
    return Between(
        request=part,
        source=inpaint.audio,
        start=start,
        stop=stop,
        samples=total,
        region=region,
        before=given - first,
        after=after,
    )
