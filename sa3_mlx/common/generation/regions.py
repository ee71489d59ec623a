"""Turn inpainting regions from seconds to a mask of latent frames, and paste them into the source with clean seams.

A region [start, stop) is generated, the rest is kept. The official code never pastes kept audio back [B30]; here the
kept samples of the result are bit-exact copies of the source.

Shapes: L samples, T latent frames; audio is (L, channels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.audio import going_on
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.model.lengths import seconds_to_samples
from sa3_mlx.common.schema import is_finite, quoted

_LEVEL_WINDOW_MS = 50.0
_SILENCE_DB = -120.0


@dataclass(frozen=True)
class Region:
    """Mark samples ``start .. stop`` (exclusive) that are generated."""

    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Seam:
    """Report one joint between kept and generated audio."""

    sample: int  # first generated sample ("in"), or first kept one after a region ("out")
    side: Literal["in", "out"]  # of the generated region
    crossfade_samples: int  # inside the region
    level_difference_db: float  # generated minus kept, RMS of up to 50 ms on either side; positive: generated is louder


def to_regions(seconds: Sequence[tuple[float, float]], sample_rate: int) -> tuple[Region, ...]:
    """Turn seconds into samples [int(start sr), int(end sr)), in time order; touching regions are joined [B34].

    Raises ValueError for an empty, reversed, negative or overlapping region, for numbers that are not finite and for
    anything but pairs of numbers.
    """
    regions: list[Region] = []
    for pair in seconds:
        if not (isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(time, int | float) for time in pair)):
            raise ValueError(f"region {quoted(pair)}: expected (start, end) in seconds, such as ((0.5, 0.8),)")
        if not all(map(is_finite, pair)):
            raise ValueError(f"region {quoted(pair)}: start and end must be finite seconds")
    for start, end in sorted(seconds):
        name = f"region {start:g}:{end:g}"
        if start < 0:
            raise ValueError(f"{name}: starts before the clip; the start must be 0 or later")
        try:
            region = Region(seconds_to_samples(start, sample_rate), seconds_to_samples(end, sample_rate))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if region.stop <= region.start:
            raise ValueError(f"{name}: is empty; the end must come after the start")
        if regions and region.start < regions[-1].stop:
            raise ValueError(f"{name}: overlaps the region before it; join them into one")
        if regions and region.start == regions[-1].stop:
            regions[-1] = Region(regions[-1].start, region.stop)
        else:
            regions.append(region)
    return tuple(regions)


def keep_frames(
    regions: Sequence[Region], clip_samples: int, frames: int, samples_per_latent: int
) -> NDArray[np.float32]:
    """Return a mask of latent frames (T,) float32: 1 keep, 0 generate [B34].

    Frame i follows its first sample, 4096 i in the released models: generated if that sample lies in a region, or at or
    beyond ``clip_samples``, the item's own duration.
    """
    first = np.arange(frames, dtype=np.int64) * samples_per_latent  # (T,)
    keep = first < clip_samples
    for region in regions:
        keep &= (first < region.start) | (first >= region.stop)
    return keep.astype(np.float32)


def generated_frames(region: Region, samples_per_latent: int) -> int:
    """Count the latent frames that a region makes the model generate; with 0 it is too short to have any effect."""
    return -(-region.stop // samples_per_latent) - -(-region.start // samples_per_latent)


def paste_back(
    generated: Audio, source: Audio, regions: Sequence[Region], sample_rate: int, crossfade_ms: float
) -> tuple[Audio, tuple[Seam, ...]]:
    """Put generated regions into the source -> audio (L, channels) as long as ``generated``, and a report per seam.

    See ``PasteBack``, which does it piece by piece.
    """
    paste = PasteBack(source, regions, len(generated), sample_rate, crossfade_ms)
    return paste.piece(generated, 0), paste.seams()


class PasteBack:
    """Paste generated regions into the source; a sample of the result needs only that sample of the generated audio.

    Outside the regions every sample is the source's, bit for bit. The equal-power crossfade (at most ``crossfade_ms``,
    at most half of a region with two seams) lies inside the regions. It fades from the source itself where the source
    goes on, and from what ``going_on`` gives where it has ended (a continuation): the joint has no step and no corner.

    Raises ValueError if a region leaves the clip of ``length`` samples, or if kept samples lie beyond the source's end.
    """

    def __init__(
        self, source: Audio, regions: Sequence[Region], length: int, sample_rate: int, crossfade_ms: float
    ) -> None:
        _check_cover(regions, length, len(source))
        self._source, self._length, self._sample_rate = source, length, sample_rate
        self._regions = tuple(regions)
        fade = round(crossfade_ms * sample_rate / 1000)
        self._joints: list[_Joint] = []
        for region in regions:
            sides = [side for side, inner in ((1, region.start > 0), (-1, region.stop < length)) if inner]
            samples = min(fade, (region.stop - region.start) // max(1, len(sides)))
            for direction in sides:
                seam = region.start if direction == 1 else region.stop
                self._joints.append(_joint(source, seam, samples, direction))
        self._made = [[source[:0]] for _ in self._joints]  # what comes beside each joint

    def piece(self, generated: Audio, start: int) -> Audio:
        """Return the result for the generated samples from ``start`` on, (n, channels) -> (n, channels)."""
        stop = start + len(generated)
        result = generated.copy()
        kept = 0
        for region in (*self._regions, Region(self._length, self._length)):
            first, last = max(kept, start), min(region.start, stop)
            if first < last:
                result[first - start : last - start] = self._source[first:last]
            kept = region.stop
        for number, joint in enumerate(self._joints):
            here = (joint.inside >= start) & (joint.inside < stop)
            at = joint.inside[here] - start
            result[at] = (joint.kept[here] + joint.gain[here] * generated[at]).astype(np.float32)
            made = self._beside(joint, joint.direction)
            self._made[number].append(generated[max(0, made.start - start) : max(0, made.stop - start)].copy())
        return result

    def seams(self) -> tuple[Seam, ...]:
        """Report all joints, when every piece was taken."""
        seams: list[Seam] = []
        for joint, made in zip(self._joints, self._made, strict=True):
            kept = self._source[self._beside(joint, -joint.direction)]
            seams.append(
                Seam(
                    sample=joint.seam,
                    side="in" if joint.direction == 1 else "out",
                    crossfade_samples=len(joint.inside),
                    level_difference_db=_level_db(np.concatenate(made)) - _level_db(kept),
                )
            )
        return tuple(seams)

    def _beside(self, joint: _Joint, direction: int) -> slice:
        """Return the samples after (1) or before (-1) a joint whose level is reported."""
        window = max(1, round(_LEVEL_WINDOW_MS * self._sample_rate / 1000))
        after = slice(joint.seam, joint.seam + window)
        return after if direction == 1 else slice(max(0, joint.seam - window), joint.seam)


def first_uncovered(regions: Sequence[Region], source_samples: int, clip_samples: int) -> int | None:
    """Find the first sample that is neither in a region nor in the source; None when all are. Regions in order."""
    position = source_samples
    for region in regions:
        if region.start <= position:
            position = max(position, region.stop)
    return position if position < clip_samples else None


def _check_cover(regions: Sequence[Region], length: int, source_length: int) -> None:
    for region in regions:
        if region.stop > length:
            raise ValueError(f"region {region.start}..{region.stop} (samples) leaves the clip of {length} samples")
    gap = first_uncovered(regions, source_length, length)
    if gap is not None:
        raise ValueError(f"the source has {source_length} samples: sample {gap} is neither kept nor generated")


@dataclass(frozen=True)
class _Joint:
    """Crossfade one seam, n samples from the seam into the region: result = kept + gain * generated."""

    seam: int
    direction: int  # 1: the region begins at the seam, -1: it ends there
    inside: NDArray[np.int64]  # (n,) samples of the clip
    kept: NDArray[np.float64]  # (n, channels) faded source
    gain: NDArray[np.float64]  # (n, 1)


def _joint(source: Audio, seam: int, samples: int, direction: int) -> _Joint:
    steps = np.arange(samples)
    inside = seam + steps if direction == 1 else seam - 1 - steps  # from the seam into the region
    angle = ((steps + 0.5) / max(1, samples) * (np.pi / 2))[:, None]
    first = min(seam, int(inside.min(initial=seam)))
    there = source[first : first + samples]
    there = np.concatenate([there, going_on(source, samples - len(there))])  # where it has ended
    return _Joint(seam, direction, inside, np.cos(angle) * there[inside - first], np.sin(angle))


def _level_db(audio: Audio) -> float:
    power = float(np.mean(audio.astype(np.float64) ** 2)) if audio.size else 0.0
    return max(_SILENCE_DB, 10 * math.log10(power)) if power > 0 else _SILENCE_DB
