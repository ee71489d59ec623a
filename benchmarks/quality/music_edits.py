"""Measure whether edited music keeps tempo and key: ``python -m benchmarks music-edits``.

Held-out clips that have a tempo, of the set "music": the middle third of each is made again, and its second half is
made from the first, both by its own caption. Tempo and key are judged as those of the untouched clip are, of the whole
and of the second half alone, where nothing that was kept can be heard. Seams of tonal clips are read beside the same
place of the untouched clip.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.options import BACKEND, MODEL, RENDERED, SamplingChoice, open_pipeline
from benchmarks.quality.music_adherence import Rows, with_intervals
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Inpaint, Item, Request, extend
from sa3_mlx.common.measures.seam import MEASURES, seam
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.terminal import show
from sa3_torch.evaluate.judge.music.judge import MusicJudge
from sa3_torch.evaluate.real import audio_of, captioned
from sa3_torch.train.data.clip_cache import Audio, CachedClip, ClipSet

KEPT = ("tempo", "key")  # of what is judged
_TONAL = ("line", "music")
_UNTOUCHED = ", untouched"
_LEVEL = MEASURES.index("level")


def edits(pipeline: BasePipeline[Any], audio: Audio, clip: CachedClip, sampling: Sampling, seed: int) -> list[Audio]:
    """Return a clip with a new middle third, and with a new second half."""
    seconds = len(audio) / pipeline.config.sample_rate
    item = Item(prompt=clip.caption, seconds=seconds, seed=seed)
    ways = (
        Inpaint(audio=audio, regions=((seconds / 3, 2 * seconds / 3),)),
        extend(audio[: len(audio) // 2], seconds, pipeline.config),
    )
    return [
        pipeline.generate(Request(items=(item,), sampling=sampling, inpaint=(way,))).audio[0][: len(audio)]
        for way in ways
    ]


def seam_levels(audio: Audio, places: tuple[int, ...], rate: int) -> Iterator[float]:
    """Yield by how many dB the level changes at each place."""
    for place in places:
        yield seam(audio, place, rate).values[_LEVEL]


@click.command(cls=TypedCommand)
@MODEL
@BACKEND
@RENDERED
@click.option("--clips", "count", type=click.IntRange(2), default=48, show_default=True, help="Held-out clips.")
@click.option("--seed", type=int, default=0, show_default=True)
def music_edits(model: str, backend: str, choice: SamplingChoice, data: Path, count: int, seed: int) -> None:
    """Measure whether inpainted and extended music keeps tempo and key, and how loud its seams are."""
    pipeline, judge, clips = open_pipeline(model, backend), MusicJudge(), ClipSet(data)
    sampling, rate = choice.resolved(pipeline.config.usual_sampling), pipeline.config.sample_rate
    chosen = [clip for clip in captioned(clips, pipeline.config, "validation") if "bpm" in clip.fields]
    if len(chosen) < 2:
        raise ValueError(f"{data}: fewer than two held-out clips with a tempo fit {pipeline.config.name}")
    chosen = chosen[:: -(-len(chosen) // count)]
    heard: dict[str, Rows] = {}
    levels: dict[str, list[float]] = {}
    for number, clip in enumerate(chosen):
        real = audio_of(clips, clip, pipeline.config.audio_channels)
        inpainted, extended = edits(pipeline, real, clip, sampling, seed + number)
        half, third = len(real) // 2, len(real) // 3
        sounds = {"real": real, "inpainted": inpainted, "extended": extended}
        sounds |= {"real, second half": real[half:], "extended, second half": extended[half:]}
        for name, audio in sounds.items():
            verdict = {f"{clip.kind} {k}": right for k, right in judge.check(audio, clip).items() if k in KEPT}
            heard.setdefault(name, []).append((clip.caption, verdict))
        if clip.kind in _TONAL:
            for name, audio, places in (("inpainted", inpainted, (third, 2 * third)), ("extended", extended, (half,))):
                levels.setdefault(name, []).extend(seam_levels(audio, places, rate))
                levels.setdefault(f"{name}{_UNTOUCHED}", []).extend(seam_levels(real, places, rate))
    kept = {name: with_intervals(rows) for name, rows in heard.items()}
    for name, row in kept.items():
        shown = (
            f"{k} {100 * v['value']:.0f} % ({100 * v['low']:.0f} to {100 * v['high']:.0f})" for k, v in row.items()
        )
        show(f"{name:22} {', '.join(shown)}")
    seams = {name: {"median": float(np.median(v)), "most": float(np.quantile(v, 0.9))} for name, v in levels.items()}
    for name in [name for name in seams if f"{name}{_UNTOUCHED}" in seams]:
        more = np.subtract(levels[name], levels[f"{name}{_UNTOUCHED}"])
        seams[name]["more"] = float(np.median(more))  # pair by pair
    for name, value in seams.items():
        more = f", {value['more']:+.2f} dB more than untouched" if "more" in value else ""
        show(f"seams, {name:22} {value['median']:.2f} dB{more}, 90 % below {value['most']:.2f} dB")
    about = {"model": pipeline.config.name, "sampling": str(sampling), "clips": len(chosen), "seed": seed}
    show(json.dumps({**about, "kept": kept, "seams_db": seams}))
