"""Measure how much of what its prompts ask a model makes, by the judge of the set "music".

``python -m benchmarks music-adherence``: shares with 95 % intervals by drawing prompts again, beside what the judge
hears of the real clips and of what the autoencoder makes of them; with ``--against`` the paired differences of two
models.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks.options import BACKEND, MODEL, RENDERED, SamplingChoice, open_pipeline
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.terminal import show
from sa3_torch.evaluate.judge.music.judge import MusicJudge
from sa3_torch.evaluate.measures.paired import paired_difference
from sa3_torch.evaluate.real import audio_of, captioned
from sa3_torch.evaluate.run import batches, clip_items
from sa3_torch.train.data.clip_cache import Audio, CachedClip, ClipSet

Rows = list[tuple[str, dict[str, bool]]]  # prompt, verdict; in the order of the clips


def sounds(
    pipeline: BasePipeline[Any], clips: list[CachedClip], choice: SamplingChoice, seeds: int, batch: int
) -> Iterable[tuple[Audio, CachedClip]]:
    """Generate every clip's caption with every seed, in an order that depends on the clips alone."""
    sampling = choice.resolved(pipeline.config.usual_sampling)
    for seed in range(seeds):
        chosen = clip_items(clips, len(clips), seed)
        for rows in batches(chosen, batch):
            request = Request(items=tuple([chosen[i].item for i in rows]), sampling=sampling)
            yield from zip(pipeline.generate(request).audio, [chosen[i].clip for i in rows], strict=True)


def rebuilt(
    pipeline: BasePipeline[Any], clips: ClipSet, chosen: list[CachedClip]
) -> Iterable[tuple[Audio, CachedClip]]:
    """Encode and decode the clips: the most that a model of these latents can do."""
    for clip in chosen:
        audio = audio_of(clips, clip, pipeline.config.audio_channels)
        yield pipeline.decode(pipeline.encode(audio))[: len(audio)], clip


def judge_all(judge: MusicJudge, made: Iterable[tuple[Audio, CachedClip]]) -> Rows:
    """Judge sounds; a clip's kind goes before what was judged: "loop tempo"."""
    return [
        (clip.caption, {f"{clip.kind} {name}": right for name, right in judge.check(audio, clip).items()})
        for audio, clip in made
    ]


def columns(rows: Rows) -> dict[str, tuple[list[bool], list[str]]]:
    """Return verdicts and their prompts by what was judged."""
    found: dict[str, tuple[list[bool], list[str]]] = defaultdict(lambda: ([], []))
    for prompt, verdict in rows:
        for name, right in verdict.items():
            found[name][0].append(right)
            found[name][1].append(prompt)
    return dict(found)


def with_intervals(rows: Rows, other: Rows | None = None) -> dict[str, dict[str, float]]:
    """Return by what was judged the share, or the difference of two shares, and its 95 % interval.

    What less than two different prompts ask for is left out.
    """
    second = columns(other) if other is not None else None
    out = {}
    for name, (right, prompts) in columns(rows).items():
        if len(set(prompts)) < 2:
            continue
        base = second[name][0] if second is not None else np.zeros(len(right))
        found = paired_difference(right, base, prompts)
        out[name] = {
            "value": round(found.value, 4),
            "low": round(found.low, 4),
            "high": round(found.high, 4),
            "sounds": len(right),
        }
    return out


@click.command(cls=TypedCommand)
@MODEL
@BACKEND
@RENDERED
@click.option("--against", default=None, metavar="NAME|PATH", help="A second model, for paired differences.")
@click.option("--clips", "count", type=click.IntRange(2), default=120, show_default=True, help="Held-out prompts.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Sounds of each.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True)
def music_adherence(
    model: str,
    backend: str,
    choice: SamplingChoice,
    data: Path,
    against: str | None,
    count: int,
    seeds: int,
    batch: int,
) -> None:
    """Measure what of held-out prompts of the set "music" a model makes, with intervals and floors."""
    pipeline, judge, clips = open_pipeline(model, backend), MusicJudge(), ClipSet(data)
    chosen = captioned(clips, pipeline.config, "validation")
    chosen = chosen[:: -(-len(chosen) // count)]

    def bar(made: Iterable[tuple[Audio, CachedClip]], name: str, total: int) -> Iterable[tuple[Audio, CachedClip]]:
        return tqdm(made, desc=name, unit="sound", total=total, disable=None, delay=1)

    real = judge_all(judge, ((clips.read(clip), clip) for clip in chosen))
    again = judge_all(judge, bar(rebuilt(pipeline, clips, chosen), "autoencoder", len(chosen)))
    total = len(chosen) * seeds
    own = judge_all(judge, bar(sounds(pipeline, chosen, choice, seeds, batch), model, total))
    found = {"real": with_intervals(real), "autoencoder": with_intervals(again), "model": with_intervals(own)}
    if against is not None:
        other = open_pipeline(against, backend)
        rows = judge_all(judge, bar(sounds(other, chosen, choice, seeds, batch), against, total))
        found |= {"against": with_intervals(rows), "difference": with_intervals(own, rows)}
    for name, row in found["model"].items():
        value, low, high = (100 * row[key] for key in ("value", "low", "high"))
        ceiling, floor = (100 * found[source][name]["value"] for source in ("autoencoder", "real"))
        show(f"{name:20} {value:5.1f} % ({low:.1f} to {high:.1f}); autoencoder {ceiling:.1f}, real {floor:.1f}")
    show(json.dumps({"model": pipeline.config.name, "prompts": len(chosen), "seeds": seeds, **found}))
