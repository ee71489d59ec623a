"""Measure inpainting: is what was kept still there, and can one tell where the new part begins?

The model's own output is measured; pasting the kept audio back, as the commands do, would hide it. Shapes: T latent
frames, C latent channels, L audio samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import Inpaint, Item, Request
from sa3_mlx.common.measures.spectra import WINDOW, log_mel
from sa3_mlx.common.model.lengths import samples_to_seconds
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.train.data.clip_cache import CachedClip

Audio = NDArray[np.float32]

REGION = (1 / 3, 2 / 3)  # of a clip: the part that is made again
SHORTEST_SAMPLES = 27_000  # of clips that are used: edges need some sound on both sides


@dataclass(frozen=True, kw_only=True)
class Inpainting:
    """Hold the measures of inpainted clips.

    ``kept_error``: squared error of the latents of kept frames relative to the variance of latents; ``seam``: jump of
    the log-mel spectrum across the edges relative to that of the real clips at the same places.
    """

    kept_error: float
    seam: float
    clips: int


def jump(audio: NDArray[np.floating], edges: Sequence[int]) -> float:
    """Return the mean absolute difference of the log-mel spectra (log10) of the windows that end and begin at each
    edge.

    Edges are samples; those nearer than a window to either end are left out. Raises ValueError when none is left.
    """
    inside = [edge for edge in edges if WINDOW <= edge <= len(audio) - WINDOW]
    if not inside:
        raise ValueError(f"edges {list(edges)} of {len(audio)} samples: at least one must lie {WINDOW} samples inside")
    sides = [(audio[edge - WINDOW : edge], audio[edge : edge + WINDOW]) for edge in inside]
    return float(np.mean([np.abs(_level(after) - _level(before)).mean() for before, after in sides]))


def _level(audio: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the log-mel spectrum of the middle of a window's worth of samples, (80,)."""
    spectra = log_mel(audio)
    return np.asarray(spectra[len(spectra) // 2])


def seam(
    made: Sequence[NDArray[np.floating]], real: Sequence[NDArray[np.floating]], edges: Sequence[Sequence[int]]
) -> float:
    """Return the mean jump of the made clips relative to that of the real ones, at the same edges."""
    ours, theirs = ([jump(audio, places) for audio, places in zip(clips, edges, strict=True)] for clips in (made, real))
    return float(np.mean(ours) / max(float(np.mean(theirs)), 1e-12))


def kept_error(
    made: Sequence[NDArray[np.floating]], source: Sequence[NDArray[np.floating]], keep: Sequence[NDArray[np.bool_]]
) -> float:
    """Compare latents (T, C) where masks (T,) keep them: mean squared difference / variance of the source."""
    kept = [(a[mask] - b[mask]).astype(np.float64) for a, b, mask in zip(made, source, keep, strict=True)]
    whole = np.concatenate(source).astype(np.float64)
    variance = np.square(whole - whole.mean(axis=0)).mean()
    return float(np.square(np.concatenate(kept)).mean() / max(variance, 1e-12))


def measure_inpainting(
    pipeline: BasePipeline[Any],
    clips: Sequence[tuple[Audio, CachedClip]],
    sampling: Sampling,
    *,
    seed: int,
    batch: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Inpainting:
    """Make the middle third of real clips (L, channels) new, each with its own caption, and measure what comes out.

    ``advance`` is called with the number of clips that are done. Raises ValueError without a clip of SHORTEST_SAMPLES.
    """
    ratio, rate = pipeline.config.same.samples_per_latent, pipeline.config.sample_rate
    long = sorted((pair for pair in clips if len(pair[0]) >= SHORTEST_SAMPLES), key=lambda pair: len(pair[0]))
    if not long:
        raise ValueError(f"inpainting needs clips of at least {SHORTEST_SAMPLES} samples; there are none")
    made, source, keep, sounds, edges = [], [], [], [], []
    for start in range(0, len(long), batch):
        chosen = long[start : start + batch]
        request = _request(chosen, sampling, rate, seed + start)
        planned, found = plan(request, pipeline.config), pipeline.generate(request)
        for row, (audio, _) in enumerate(chosen):
            z = pipeline.encode(audio)
            frames = min(len(z), len(found.latents[row]))
            mask = planned.keep_frames[row, :frames] > 0
            made.append(found.latents[row][:frames])
            source.append(z[:frames])
            keep.append(mask)
            sounds.append((found.audio[row], audio))
            edges.append(((np.flatnonzero(np.diff(mask.astype(int))) + 1) * ratio).tolist())
        advance(len(chosen))
    return Inpainting(
        kept_error=kept_error(made, source, keep),
        clips=len(long),
        seam=seam([a for a, _ in sounds], [b for _, b in sounds], edges),
    )


def _request(chosen: Sequence[tuple[Audio, CachedClip]], sampling: Sampling, rate: int, seed: int) -> Request:
    lengths = [samples_to_seconds(len(audio), rate) for audio, _ in chosen]
    items = [
        Item(prompt=clip.caption, seconds=seconds, seed=seed + row)
        for row, ((_, clip), seconds) in enumerate(zip(chosen, lengths, strict=True))
    ]
    inpaint = tuple(
        Inpaint(audio=audio, regions=((REGION[0] * seconds, REGION[1] * seconds),))
        for (audio, _), seconds in zip(chosen, lengths, strict=True)
    )
    return replace(Request(items=tuple(items), sampling=sampling), inpaint=inpaint, crossfade_ms=None)
