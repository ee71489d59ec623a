"""Say for every latent frame which prompt, noise level and seed it has.

Shapes: B batch, M memory tokens, T latent frames, K prompts of an item, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.model.lengths import seconds_to_samples
from sa3_mlx.common.text.prompt import Prompt, parse_prompt

from .regions import Region
from .request import Inpaint, Item, Patch, Request, per_item

_NEARLY_ZERO = 1e-4  # rk4 takes its last slope at 1e-5 [B29]


@dataclass(frozen=True, kw_only=True)
class Track:
    """Say which prompts an item has, and from when on."""

    prompts: tuple[Prompt, ...]  # (K,), each once
    starts: tuple[float, ...]  # seconds, ascending, the first 0
    chosen: tuple[int, ...]  # which prompt begins at each

    @classmethod
    def of(cls, item: Item, inpaint: Inpaint | None) -> Track:
        """Return the prompts over time and, in their place inside of regions, the regions' own.

        Raises ValueError for a prompt that cannot be read.
        """
        timed = [(0.0, item.prompt), *((later.start, later.prompt) for later in item.prompts_over_time)]
        regions = inpaint.patches if inpaint is not None else ()
        own = [(region.start, region.end, region.prompt) for region in regions if region.prompt is not None]
        cuts = {start for start, _ in timed} | {time for start, end, _ in own for time in (start, end)}
        rows, starts, chosen = dict[Prompt, int](), list[float](), list[int]()
        for cut in sorted(cut for cut in cuts if cut < item.seconds):
            inside = [text for start, end, text in own if start <= cut < end]
            prompt = parse_prompt(inside[0] if inside else [text for start, text in timed if start <= cut][-1])
            row = rows.setdefault(prompt, len(rows))
            if not chosen or chosen[-1] != row:
                starts.append(cut)
                chosen.append(row)
        return cls(prompts=tuple(rows), starts=tuple(starts), chosen=tuple(chosen))

    def shares(self, seconds: float, frame_starts: NDArray[np.float64], fade: float) -> NDArray[np.float64]:
        """Return how much of every prompt each frame gets (T, K), from when frames begin (T,), in seconds.

        Around each change one prompt goes over into the next on a straight line of ``fade`` seconds, or of as many as
        the shorter of both lasts, so that shares sum to 1 and every prompt is alone in the middle of its time.
        ``seconds``: the length of the clip.
        """
        edges = (*self.starts, seconds)
        ramps = [np.ones_like(frame_starts)]
        for before, edge, after in zip(edges, edges[1:-1], edges[2:], strict=False):
            width = min(fade, edge - before, after - edge)
            step = (frame_starts >= edge).astype(np.float64)
            ramps.append(np.clip((frame_starts - edge) / width + 0.5, 0, 1) if width > 0 else step)
        ramps.append(np.zeros_like(frame_starts))
        shares = np.zeros((len(frame_starts), len(self.prompts)))
        for place, row in enumerate(self.chosen):
            shares[:, row] += ramps[place] - ramps[place + 1]
        return shares


def tracks(request: Request) -> tuple[Track, ...]:
    """Return the track of every item. Raises ValueError for a prompt that cannot be read."""
    inpaints = per_item(request.inpaint, Inpaint, "inpaint", request) or (None,) * len(request.items)
    return tuple(Track.of(*pair) for pair in zip(request.items, inpaints, strict=True))


def prompt_shares(
    request: Request, valid: Sequence[int], frames: int, frame_seconds: float, memory: int
) -> NDArray[np.float32] | None:
    """Return ``Conditioning.shares`` (B, M + T, K), memory tokens first; None where every item has one prompt.

    A memory token, which belongs to no frame, gets the mean over the ``valid`` frames of its item.
    """
    found = tracks(request)
    most = max(len(track.prompts) for track in found)
    if most == 1:
        return None
    shares = np.zeros((len(found), memory + frames, most), np.float32)
    starts = np.arange(frames, dtype=np.float64) * frame_seconds
    for row, (item, track) in enumerate(zip(request.items, found, strict=True)):
        own = track.shares(item.seconds, starts, request.prompt_fade_seconds)
        shares[row, memory:, : own.shape[1]] = own
        shares[row, :memory, : own.shape[1]] = own[: valid[row]].mean(axis=0)
    return shares


def text_shares(request: Request, frames: Sequence[int], frame_seconds: float) -> tuple[dict[str, float], ...]:
    """Return what share of each item every text has, weights of phrases aside: blends, and prompts over its frames.

    ``frames``: latent frames of every item. Raises ValueError for a prompt that cannot be read.
    """
    found: list[dict[str, float]] = []
    for item, track, count in zip(request.items, tracks(request), frames, strict=True):
        starts = np.arange(count, dtype=np.float64) * frame_seconds
        times = track.shares(item.seconds, starts, request.prompt_fade_seconds).mean(axis=0)  # (K,)
        shares: dict[str, float] = {}
        for prompt, time in zip(track.prompts, times.tolist(), strict=True):
            first, second = prompt.texts[0].text, prompt.texts[-1].text
            shares[first] = shares.get(first, 0.0) + time * (1 - prompt.share)
            shares[second] = shares.get(second, 0.0) + time * prompt.share
        found.append({text: share for text, share in shares.items() if share})
    return tuple(found)


@dataclass(frozen=True)
class FrameSeed:
    """Give frames ``start .. stop`` (exclusive, None is the end) the noise of a seed of their own."""

    start: int
    stop: int | None
    seed: int


class PatchFrames:
    """Find the frames of regions: a frame belongs to the one that its first sample lies in, as in ``keep_frames``.

    A region that ends with the clip takes the frames after it too.
    """

    def __init__(self, clip_samples: int, sample_rate: int, samples_per_latent: int) -> None:
        self._clip, self._sample_rate, self._ratio = clip_samples, sample_rate, samples_per_latent

    def of(self, patch: Patch) -> tuple[int, int | None]:
        """Return the first frame, and the one after the last, None where it goes on to the end."""
        start, stop = (seconds_to_samples(time, self._sample_rate) for time in (patch.start, patch.end))
        return -(-start // self._ratio), None if stop >= self._clip else -(-stop // self._ratio)

    def seeds(self, inpaint: Inpaint) -> tuple[FrameSeed, ...]:
        """Return the frames with a seed of their own."""
        return tuple(FrameSeed(*self.of(patch), patch.seed) for patch in inpaint.patches if patch.seed is not None)

    def levels(self, inpaint: Inpaint, regions: Sequence[Region], frames: int) -> NDArray[np.float32]:
        """Return the noise level (T,) at which each frame leaves the source: 1 is made from nothing, 0 stays.

        All 1 where regions are as usual. Else kept frames have 0, regions their own, fading in over the feather where
        they meet kept frames; and what comes after the source's end has 1, as nothing can be kept there. ``regions``:
        in samples, touching ones joined.
        """
        level = np.ones(frames, np.float64)
        if not inpaint.is_soft:
            return level.astype(np.float32)
        level[:] = 0
        for patch in inpaint.patches:
            level[slice(*self.of(patch))] = patch.noise_level
        first = np.arange(frames) * self._ratio
        feather = inpaint.feather_seconds * self._sample_rate
        for region in regions if feather else ():
            into = [np.full(frames, np.inf)]
            into += [first + self._ratio / 2 - region.start] if region.start > 0 else []
            into += [region.stop - first - self._ratio / 2] if region.stop < self._clip else []
            inside = (first >= region.start) & ((first < region.stop) | (region.stop >= self._clip))
            level = np.where(inside, level * np.clip(np.minimum.reduce(into) / feather, 0, 1), level)
        level[first >= min(len(inpaint.audio), self._clip)] = 1
        return level.astype(np.float32)


@dataclass(kw_only=True)
class Held:
    """Keep frames on their way from noise to the source while the time is above their noise level.

    There the velocity is the one that leads to the source, (x - z) / t, whatever the sampler: so each frame starts at
    its own level, though a run has one time. Where a level lies between two times of the schedule, both velocities are
    mixed as they would follow each other.
    """

    source: Any  # (B, T, C) fp32 latents z
    levels: NDArray[np.float32]  # (B, T)
    sigmas: NDArray[np.float32]  # (B, steps + 1)
    array: Callable[[NDArray[Any]], Any]  # puts values on the device
    _back: Any = field(default=None, init=False)  # the latest velocity to the source

    def shares(self, t: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how much of the step that t (B,) lies in each frame is held (B, T)."""
        below = np.where(self.sigmas < t[:, None], self.sigmas, 0).max(axis=1)[:, None]
        above = np.where(self.sigmas >= t[:, None], self.sigmas, 1).min(axis=1)[:, None]
        shares: NDArray[np.float32] = np.clip((above - self.levels) / (above - below), 0, 1)
        return shares

    def __call__(self, x: Any, t: NDArray[np.float32], velocity: Any) -> Any:
        """Return the velocity (B, T, C) at x (B, T, C), t (B,), for the one that the model gives."""
        shares = self.shares(t)[..., None].astype(np.float32)
        if not shares.any():
            return velocity
        if self._back is None or t.min() > _NEARLY_ZERO:  # else x is that of 0; on this way the velocity is constant
            self._back = (x - self.source) * self.array(1 / t[:, None, None])
        return velocity * self.array(1 - shares) + self._back * self.array(shares)
