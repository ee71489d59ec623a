"""Compare ways of asking for one instrument after the other: ``python -m benchmarks over-time``.

A clip of two halves, each with its own instrument at one pitch; the judge names what it hears in each half. By frames,
each frame is told its own prompt in one run; by windows, the first half is made by itself and then continued with the
second prompt. A plain clip of either prompt says what could be expected at most. Then a region in the middle of a plain
clip, with its own prompt and with the common one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import click
import numpy as np

from benchmarks.options import BACKEND, MODEL, SamplingChoice, open_pipeline
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import DEFAULT_PROMPT_FADE, Inpaint, Item, Patch, Request, TimedPrompt, extend
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.train.demo_set.sounds import INSTRUMENTS, note_captions

PITCHES = (52, 57, 62, 67)
HALF = 1.5  # seconds
FADES = (0.0, 0.1, 0.2, 0.5, 1.0)
_EDGE = 0.05  # seconds beside the change whose levels are compared
_BATCH = 8

Pair = tuple[str, str, int]  # first and second instrument, MIDI pitch
Way = Callable[[Sequence[Pair], int], Sequence[Audio]]


class Halves:
    """Make and judge clips of two halves."""

    def __init__(self, pipeline: BasePipeline[Any], sampling: Sampling) -> None:
        self._pipeline, self._sampling, self._judge = pipeline, sampling, Judge()
        names = list(INSTRUMENTS)
        self._pairs = [(name, names[(i + 1) % len(names)], pitch) for pitch in PITCHES for i, name in enumerate(names)]

    def plain(self, which: int) -> Way:
        """Ask for one of the instruments all the time."""
        return lambda pairs, seed: self._made(pairs, seed, lambda pair: self._item(pair, which))

    def by_frames(self, fade: float) -> Way:
        """Ask each frame for its own."""

        def item(pair: Pair) -> Item:
            later = TimedPrompt(start=HALF, prompt=_prompt(pair, 1))
            return replace(self._item(pair, 0), prompts_over_time=(later,))

        return lambda pairs, seed: self._made(pairs, seed, item, fade=fade)

    def by_windows(self, pairs: Sequence[Pair], seed: int) -> Sequence[Audio]:
        """Make the first half, then continue it."""
        first = self._made(pairs, seed, lambda pair: self._item(pair, 0, HALF))
        inpaint = tuple(extend(audio, 2 * HALF, self._pipeline.config) for audio in first)
        return self._made(pairs, seed, lambda pair: self._item(pair, 1), inpaint=inpaint)

    def region(self, own: bool) -> Way:
        """Make the second half of a plain clip of the first instrument again."""

        def made(pairs: Sequence[Pair], seed: int) -> Sequence[Audio]:
            sources = self.plain(0)(pairs, seed)
            prompts = [_prompt(pair, 1) if own else None for pair in pairs]
            regions = [Patch(start=HALF, end=2 * HALF, prompt=prompt, seed=seed + 500) for prompt in prompts]
            pasted = zip(sources, regions, strict=True)
            inpaint = tuple(Inpaint(audio=audio, regions=(region,)) for audio, region in pasted)
            return self._made(pairs, seed, lambda pair: self._item(pair, 0), inpaint=inpaint)

        return made

    def row(self, name: str, way: Way) -> dict[str, Any]:
        """Return shares of clips in whose halves each instrument is heard, and the median step in level between."""
        heard, steps = np.zeros((2, 2)), list[float]()
        for first in range(0, len(self._pairs), _BATCH):
            pairs = self._pairs[first : first + _BATCH]
            for pair, audio in zip(pairs, way(pairs, 1 + first), strict=True):
                cut, edge = (round(time * self._pipeline.config.sample_rate) for time in (HALF, _EDGE))
                for half, part in enumerate((audio[:cut], audio[cut:])):
                    found = self._judge.classifier.classify(part).instrument
                    heard[half] += [found == pair[0], found == pair[1]]
                steps.append(abs(_level(audio[cut : cut + edge]) - _level(audio[cut - edge : cut])))
        heard /= len(self._pairs)
        return {
            "way": name,
            "first_in_first": heard[0, 0],
            "second_in_first": heard[0, 1],
            "first_in_second": heard[1, 0],
            "second_in_second": heard[1, 1],
            "step_db": float(np.median(steps)),
        }

    def _item(self, pair: Pair, which: int, seconds: float = 2 * HALF) -> Item:
        return Item(prompt=_prompt(pair, which), seconds=seconds, seed=0)

    def _made(
        self,
        pairs: Sequence[Pair],
        seed: int,
        item: Callable[[Pair], Item],
        inpaint: tuple[Inpaint, ...] | None = None,
        fade: float = DEFAULT_PROMPT_FADE,
    ) -> Sequence[Audio]:
        items = tuple(replace(item(pair), seed=seed + number) for number, pair in enumerate(pairs))
        asked = Request(items=items, sampling=self._sampling, inpaint=inpaint, prompt_fade_seconds=fade)
        return self._pipeline.generate(asked).audio


def _prompt(pair: Pair, which: int) -> str:
    return note_captions(pair[which], pair[2])[0]  # type: ignore[arg-type]  # which is 0 or 1


def _level(audio: Audio) -> float:
    return float(10 * np.log10(np.mean(np.square(audio)) + 1e-12))


@click.command(cls=TypedCommand)
@MODEL
@BACKEND
def over_time(model: str, backend: str, choice: SamplingChoice) -> None:
    """Compare ways of asking for one instrument after the other."""
    pipeline = open_pipeline(model, backend)
    sampling = choice.resolved(pipeline.config.usual_sampling)
    halves = Halves(pipeline, sampling)
    ways: dict[str, Way] = {
        "plain, first": halves.plain(0),
        "plain, second": halves.plain(1),
        **{f"frames, {fade:g} s": halves.by_frames(fade) for fade in FADES},
        "windows": halves.by_windows,
        "region, own": halves.region(True),
        "region, common": halves.region(False),
    }
    rows = list[dict[str, Any]]()
    for name, way in ways.items():
        rows.append(halves.row(name, way))
        if len(rows) == 1:
            click.echo("  ".join(f"{title:>16}" for title in rows[0]))
        click.echo("  ".join(f"{v:16.2f}" if isinstance(v, float) else f"{v:>16}" for v in rows[-1].values()))
    click.echo(
        json.dumps({"model": pipeline.config.name, "backend": backend, "sampling": sampling.to_dict(), "rows": rows})
    )
