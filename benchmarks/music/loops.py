"""Compare ways to make a loop by the score of its joint: ``python -m benchmarks loops``.

*cut* is the middle of something longer as it is, *fade* its end faded into its beginning, as any editor can; *seam* and
*turn* are those of common/generation/loop.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np

from benchmarks.options import BACKEND, MODEL, open_pipeline
from sa3_mlx.common.files.atomic import new_file
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.files.lettering import quiet_drawing
from sa3_mlx.common.generation.loop import Loop, Way, loop_seconds
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.measures.seam import MEASURES, joint
from sa3_mlx.common.terminal import report

PROMPTS = (
    "piano note A4",
    "snare drum",
    "violin note A4",
    "kick drum",
    "guitar note E3",
    "hi-hat",
    "flute note C5",
    "marimba note A4",
    "trumpet note A4",
    "organ note C4",
)
_FADE_SECONDS = 0.25
_PICTURED_SECONDS = 0.5  # on each side of a joint


def loops(pipeline: BasePipeline[Any], way: Way, bpm: float, beats: int, seeds: int) -> list[Audio]:
    """Make ``seeds`` loops of each prompt."""
    seconds, made = loop_seconds(bpm, beats, pipeline.config.sample_rate), list[Audio]()
    for first in range(0, 100 * seeds, 100):
        items = tuple(Item(prompt=text, seconds=seconds, seed=first + i) for i, text in enumerate(PROMPTS))
        made += pipeline.generate(Request(items=items, loop=Loop(bpm=bpm, beats=beats, way=way))).audio
    return made


def faded(longer: Audio, shorter: Audio, sample_rate: int) -> Audio:
    """Return the beginning of a longer clip, (L, channels) as the shorter one, over which what comes after it fades."""
    fade, length = round(_FADE_SECONDS * sample_rate), len(shorter)
    angle = ((np.arange(fade) + 0.5) / fade * np.pi / 2)[:, None]
    made = longer[:length].copy()
    made[:fade] = np.sin(angle) * longer[:fade] + np.cos(angle) * longer[length : length + fade]
    return made


def summary(audios: list[Audio], sample_rate: int) -> dict[str, Any]:
    """Return medians of the score and of its shares, and which share of joints is rougher than 90 % inside."""
    found = [joint(audio, sample_rate) for audio in audios]
    scores = np.array([one.score for one in found])
    return {
        "loops": len(found),
        "score": round(float(np.median(scores)), 3),
        "quartiles": [round(float(value), 3) for value in np.quantile(scores, (0.25, 0.75))],
        "rough": round(float(np.mean(scores < 0.1)), 3),
        **{
            name: round(float(np.median([one.shares[number] for one in found])), 3)
            for number, name in enumerate(MEASURES)
        },
    }


def draw(path: Path, joints: dict[str, Audio], sample_rate: int) -> None:
    """Draw the end and, after it, the beginning of loops of one sound: waveforms above, spectrograms below."""
    with quiet_drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        axes, half = figure.subplots(2, len(joints), squeeze=False), round(_PICTURED_SECONDS * sample_rate)
        for column, (name, audio) in enumerate(joints.items()):
            around = np.concatenate([audio[-half:], audio[:half]]).mean(axis=1)
            top, bottom = axes[0, column], axes[1, column]
            top.plot((np.arange(len(around)) - half) / sample_rate, around, linewidth=0.5)
            top.set(title=f"{name}: {joint(audio, sample_rate).score:.0%} of the inside is rougher", ylim=(-1, 1))
            bottom.specgram(around + 1e-7, NFFT=1024, noverlap=768, Fs=sample_rate, vmin=-120, vmax=-40)
            bottom.set(ylim=(0, 8000), ylabel="Hz", xlabel="the joint is in the middle (s)")
            for axis, place in ((top, 0.0), (bottom, _PICTURED_SECONDS)):
                axis.axvline(place, color="red", linewidth=0.8, linestyle=":")
        with new_file(path) as partial, partial.open("wb") as file:
            figure.savefig(file, format="png", dpi=90)


@click.command()
@MODEL
@BACKEND
@click.option("--bpm", type=float, default=120.0, show_default=True)
@click.option("--beats", type=int, default=4, show_default=True)
@click.option("--seeds", type=int, default=5, show_default=True, help="Of each of ten prompts.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the joints of one sound.")
@click.option("--pictured", type=int, default=2, show_default=True, help="Which of the sounds.")
def loops_command(
    model: str, backend: str, bpm: float, beats: int, seeds: int, picture: Path | None, pictured: int
) -> None:
    """Compare ways to make a loop: what share of points inside is rougher than the joint, one half is as good as any.

    \b
    python -m benchmarks loops demo --seeds 5 --picture loop.png
    """
    pipeline = open_pipeline(model, backend)
    rate = pipeline.config.sample_rate
    made = {way: loops(pipeline, way, bpm, beats, seeds) for way in get_args(Way)}
    longer = loops(pipeline, "cut", bpm, beats + 1, seeds)
    every = {**made, "fade": [faded(*pair, rate) for pair in zip(longer, made["cut"], strict=True)]}
    rows = {way: summary(audios, rate) for way, audios in every.items()}
    for way, row in rows.items():
        report(f"{way:5} " + "  ".join(f"{name} {value}" for name, value in row.items()))
    if picture is not None:
        draw(picture, {way: made[way][pictured] for way in ("cut", "seam")}, rate)
    report(json.dumps({"model": model, "bpm": bpm, "beats": beats, "ways": rows}))
