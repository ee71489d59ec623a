"""Measure how long pieces drift, with and without the anchor: ``python -m benchmarks drift demo``.

A piece is a note without an end. The judge hears parts of two seconds of it: is the pitch the asked one, is it a note?
Windows stay in a folder, so that a measurement of hours goes on after a stop; those of ``sa3 generate`` are as good.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from benchmarks.options import BACKEND, MODEL, open_pipeline
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.drift_picture import save_drift
from sa3_mlx.common.generation.events import AudioChunk, WindowMade
from sa3_mlx.common.generation.long.store import FolderStore
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Item, LongForm, Request
from sa3_mlx.common.measures.drift import DriftMeter, DriftRow
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.judge.pitch import judge_note
from sa3_torch.train.demo_set.sounds import note_captions

INSTRUMENT, PITCH = "flute", 60
PART_SECONDS = 2.0
_PARTS = 30  # of a minute


class _Ear:
    """Judge a piece part by part."""

    def __init__(self, sample_rate: int) -> None:
        self._judge, self._samples = Judge(), int(PART_SECONDS * sample_rate)
        self._rest = np.zeros((0, 2), np.float32)
        self.verdicts: list[tuple[bool, bool]] = []  # pitch, a note

    def take(self, audio: np.ndarray) -> None:
        self._rest = np.concatenate([self._rest, audio])
        while len(self._rest) >= self._samples:
            part, self._rest = self._rest[: self._samples], self._rest[self._samples :]
            self.verdicts.append((judge_note(part, PITCH), self._judge.classifier.classify(part).label == "note"))

    def shares(self, minute: int) -> tuple[float, float]:
        pitch, note = np.mean(self.verdicts[minute * _PARTS : (minute + 1) * _PARTS], axis=0)
        return float(pitch), float(note)


def measure(pipeline: BasePipeline[Any], request: Request, folder: Path) -> tuple[list[DriftRow], _Ear]:
    """Make a piece, or the rest of it, and return what its minutes are like."""
    config = pipeline.config
    meter, ear = DriftMeter(config.sample_rate, config.same.samples_per_latent), _Ear(config.sample_rate)
    bar = tqdm(total=request.items[0].seconds, unit="s", disable=None, desc=folder.name)
    with FolderStore.open(folder, {"request": request.to_dict()}, anew=False) as store, bar:
        for event in pipeline.stream(request, store=store):
            if isinstance(event, WindowMade):
                meter.add_latents(event.latents)
            elif isinstance(event, AudioChunk):
                meter.add_audio(event.audio)
                ear.take(event.audio)
                bar.update(len(event.audio) / config.sample_rate)
    return meter.rows(), ear


@click.command(cls=TypedCommand)
@MODEL
@BACKEND
@click.option("--seconds", type=float, default=600.0, show_default=True, help="Length of each piece.")
@click.option("--anchor", "anchors", type=float, multiple=True, default=(0.0, 1.0), show_default=True)
@click.option("--overlap", type=float, help="Seconds. Default: a quarter of a window.")
@click.option("--seed", type=int, default=3, show_default=True)
@click.option("--keep", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of windows.")
@click.option("--picture", type=click.Path(path_type=Path), help="Draw all pieces into one PNG.")
def drift(
    model: str,
    backend: str,
    seconds: float,
    anchors: tuple[float, ...],
    overlap: float | None,
    seed: int,
    keep: Path,
    picture: Path | None,
) -> None:
    """Measure level, brightness, latents and what a judge hears, minute by minute, of a note without an end."""
    pipeline, pieces = open_pipeline(model, backend), dict[str, list[DriftRow]]()
    item = Item(prompt=note_captions(INSTRUMENT, PITCH)[0], seconds=seconds, seed=seed)
    keep.mkdir(exist_ok=True)
    for anchor in anchors:
        name = f"anchor {anchor:g}"
        form, sampling = LongForm(overlap_seconds=overlap, anchor=anchor), pipeline.config.usual_sampling
        rows, ear = measure(pipeline, Request(items=(item,), sampling=sampling, long=form), keep / name)
        pieces[name] = rows
        click.echo(f"{name}: {item.prompt!r}")
        click.echo("minute  level dB  centre Hz    mean  spread   moved  pitch   note")
        for minute, row in enumerate(rows):
            pitch, note = ear.shares(minute)
            click.echo(
                f"{minute:6}  {row.level_db:8.1f}  {row.centroid_hz:9.0f}  {row.mean:6.3f}  {row.spread:6.3f}  "
                f"{row.moved:6.3f}  {pitch:5.0%}  {note:5.0%}"
            )
    if picture is not None:
        save_drift(picture, pieces, title=f"{item.prompt} (seed {seed})")
    click.echo(json.dumps({"model": pipeline.config.name, **{k: [asdict(r) for r in v] for k, v in pieces.items()}}))
