"""Measure the seams between what is kept and what is made: ``python -m benchmarks seams``.

A second in the middle of each sound is made again, with and without a feather, by its own prompt and by another one;
then each sound is cut and continued, in one run and in windows. How much changes over a seam is read beside the same
place of the untouched sound, which says what belongs to the sound itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.options import BACKEND, MODEL, MUSIC_RESULTS_FOLDER, SamplingChoice, open_pipeline
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Inpaint, Item, LongForm, Patch, Request, extend
from sa3_mlx.common.measures.seam import MEASURES, Joint, seam
from sa3_mlx.common.measures.spectra import log_mel
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.terminal import report
from sa3_torch.train.demo_set.sounds import INSTRUMENTS, note_captions

PROMPTS = (
    *(note_captions(name, pitch)[0] for pitch in (52, 57, 62, 67) for name in INSTRUMENTS),
    *("brown noise", "white noise") * 4,
)
SECONDS, REGION, CUT = 3.0, (1.0, 2.0), 1.5137  # the cut is inside of a frame
FEATHERS = (0.0, 0.1, 0.2, 0.4)
_BATCH, _OTHER_SEEDS = 8, 1000

Made = Sequence[Audio]


class Seams:
    """Make sounds with seams, and measure them."""

    def __init__(self, pipeline: BasePipeline[Any], sampling: Sampling, sounds: int) -> None:
        self._pipeline, self._sampling, self._rate = pipeline, sampling, pipeline.config.sample_rate
        self._items = [Item(prompt=text, seconds=SECONDS, seed=i) for i, text in enumerate(PROMPTS[:sounds])]
        self.untouched = self._made(self._items)

    def regions(self, feather: float, *, other: bool = False, crossfade_ms: float = 20.0) -> Made:
        """Make the middle again: with another seed and, with ``other``, by the prompt of the next sound."""
        prompts = [item.prompt for item in self._items]
        own = [*prompts[1:], *prompts[:1]] if other else [None] * len(prompts)
        inpaint = [
            Inpaint(
                audio=audio,
                regions=(Patch(start=REGION[0], end=REGION[1], prompt=prompt, seed=item.seed + _OTHER_SEEDS),),
                feather_seconds=feather,
            )
            for audio, prompt, item in zip(self.untouched, own, self._items, strict=True)
        ]
        return self._made(self._items, inpaint, crossfade_ms=crossfade_ms)

    def continued(self, long: LongForm | None) -> Made:
        """Cut the sounds and continue them: in one run, or in windows, which make more."""
        config = self._pipeline.config
        seconds = SECONDS if long is None else config.max_seconds + 0.5
        items = [replace(item, seconds=seconds, seed=item.seed + _OTHER_SEEDS) for item in self._items]
        kept = [extend(audio[: round(CUT * self._rate)], seconds, config) for audio in self.untouched]
        return [audio[: len(self.untouched[0])] for audio in self._made(items, kept, long=long)]

    def row(self, name: str, made: Made, places: Sequence[float]) -> dict[str, Any]:
        """Return medians over all seams, also of what untouched sounds have less, and how far what was made is away."""
        samples = [round(place * self._rate) for place in places]
        found, before = (self._joints(audios, samples) for audios in (made, self.untouched))
        jumps, own = (np.array([joint.values for joint in joints]) for joints in (found, before))
        scores = np.array([joint.score for joint in found])
        start, stop = round(places[0] * self._rate), round((places[1] if len(places) > 1 else SECONDS) * self._rate)
        pairs = zip(made, self.untouched, strict=True)
        moved = [np.abs(self._mel(a[start:stop]) - self._mel(b[start:stop])).mean() for a, b in pairs]
        return {
            "way": name,
            "seams": len(found),
            **{name: round(float(value), 3) for name, value in zip(MEASURES, np.median(jumps, axis=0), strict=True)},
            **{
                f"{name}_more": round(float(value), 3)
                for name, value in zip(MEASURES, np.median(jumps - own, axis=0), strict=True)
            },
            "level_most": round(float(np.quantile(jumps[:, MEASURES.index("level")], 0.9)), 3),
            "score": round(float(np.median(scores)), 3),
            "rough": round(float(np.mean(scores < 0.1)), 3),
            "moved_db": round(float(np.mean(moved)), 2),
        }

    def _joints(self, audios: Made, places: Sequence[int]) -> list[Joint]:
        return [seam(audio, place, self._rate) for audio in audios for place in places]

    def _mel(self, audio: Audio) -> np.ndarray:
        return 20 * log_mel(audio, self._rate)

    def _made(
        self,
        items: Sequence[Item],
        inpaint: Sequence[Inpaint] | None = None,
        *,
        long: LongForm | None = None,
        crossfade_ms: float = 20.0,
    ) -> list[Audio]:
        made, batch = list[Audio](), _BATCH if long is None else 1
        for first in range(0, len(items), batch):
            part = slice(first, first + batch)
            wanted = Request(
                items=tuple(items[part]),
                sampling=self._sampling,
                inpaint=None if inpaint is None else tuple(inpaint[part]),
                long=long,
                crossfade_ms=crossfade_ms,
            )
            made += self._pipeline.generate(wanted).audio
        return made


@click.command(cls=TypedCommand)
@MODEL
@BACKEND
@click.option("--sounds", type=click.IntRange(1, len(PROMPTS)), default=len(PROMPTS), show_default=True)
@MUSIC_RESULTS_FOLDER
def seams(model: str, backend: str, choice: SamplingChoice, sounds: int, results: Path) -> None:
    """Measure seams with and without a feather, and those of continuations, beside untouched sounds.

    Columns: step, level (dB), spectrum and onset at the seam; the same less that of the untouched sound; the 90th
    percentile of the level; the median share of points that are rougher; seams rougher than 90 % of all points; and the
    log-mel distance of what was made to what was there (dB).
    """
    pipeline = open_pipeline(model, backend)
    sampling = choice.resolved(pipeline.config.usual_sampling)
    found, rows = Seams(pipeline, sampling, sounds), list[dict[str, Any]]()
    ways: dict[str, tuple[Callable[[], Made], Sequence[float]]] = {
        "untouched": (lambda: found.untouched, REGION),
        "hard cut": (lambda: found.regions(0.0, crossfade_ms=0.0), REGION),
        **{f"feather {f:g} s": (lambda f=f: found.regions(f), REGION) for f in FEATHERS},  # type: ignore[misc]
        "other prompt, feather 0 s": (lambda: found.regions(0.0, other=True), REGION),
        "other prompt, feather 0.2 s": (lambda: found.regions(0.2, other=True), REGION),
        "untouched, at the cut": (lambda: found.untouched, (CUT,)),
        "continued in one run": (lambda: found.continued(None), (CUT,)),
        "continued in windows": (lambda: found.continued(LongForm()), (CUT,)),
    }
    for name, (make, places) in ways.items():
        rows.append(found.row(name, make(), places))
        report("  ".join(f"{key} {value}" for key, value in rows[-1].items()))
    record = {
        "model": pipeline.config.name,
        "backend": backend,
        "sampling": sampling.to_dict(),
        "sounds": sounds,
        "seconds": SECONDS,
        "region": REGION,
        "cut": CUT,
        "rows": rows,
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"seams-{pipeline.config.name}-{datetime.now(UTC):%Y-%m-%d}.json", record)
    report(json.dumps(record))
