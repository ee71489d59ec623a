"""Make regions of audio that is longer than a run of the model: one window around them, the rest stays as it is.

All numbers are samples. Audio is (L, channels).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sa3_mlx.common.generation.regions import to_regions
from sa3_mlx.common.generation.request import Inpaint, Patch, Request, per_item
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import samples_to_seconds, seconds_to_samples

from .windows import MADE_MAX, around_samples, item_between


@dataclass(frozen=True, kw_only=True)
class Around:
    """Hold the window around the regions of a request, as a request of its own."""

    request: Request
    start: int  # its first sample
    inpaint: Inpaint  # of the whole
    samples: int  # of the whole


def around(request: Request, config: ModelConfig) -> Around:
    """Find the window, as long as the model's clips are, with the regions in its middle.

    Raises ValueError where the regions lie too far apart for one, and for audio that fits into a clip.
    """
    inpaints, item = per_item(request.inpaint, Inpaint, "inpaint", request), request.items[0]
    assert inpaints is not None
    inpaint, rate, ratio = inpaints[0], config.sample_rate, config.same.samples_per_latent
    regions, total = to_regions(inpaint.spans, rate), seconds_to_samples(item.seconds, rate)
    size = around_samples(request, config)
    if total <= size:
        raise ValueError(f"{item.seconds:g} s fit into one clip of {config.name}: leave long out")
    first, last = regions[0].start, regions[-1].stop
    if last - first > MADE_MAX * size:
        raise ValueError(
            f"regions from {first / rate:.3f} to {last / rate:.3f} s: in audio longer than a clip, {config.name} "
            f"makes up to {MADE_MAX * size / rate:.2f} s around what it hears; make them in several runs"
        )
    start = min(max(0, first - (size - (last - first)) // 2), total - size)
    start -= start % ratio
    stop = min(start + size, total)
    offset, seconds = samples_to_seconds(start, rate), samples_to_seconds(stop - start, rate)
    part = replace(
        request,
        items=(item_between(item, offset, seconds, ratio / rate),),
        inpaint=replace(
            inpaint,
            audio=inpaint.audio[start:stop],
            regions=tuple(_moved(region, start, rate) for region in inpaint.regions),
        ),
        long=None,
    )
    return Around(request=part, start=start, inpaint=inpaint, samples=total)


def _moved(region: tuple[float, float] | Patch, start: int, rate: int) -> tuple[float, float] | Patch:
    """Return a region in the time of a window that begins at sample ``start``."""
    span = (region.start, region.end) if isinstance(region, Patch) else region
    first, last = (samples_to_seconds(seconds_to_samples(time, rate) - start, rate) for time in span)
    return replace(region, start=first, end=last) if isinstance(region, Patch) else (first, last)
