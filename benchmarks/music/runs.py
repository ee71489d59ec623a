"""Make what docs/music.md is about once with a model of a real size: ``python -m benchmarks music-runs small-music``.

Each run is the command in a process of its own, with few steps: it says what lengths, kept samples, memory and time are
where the sizes are real. A model that is not installed gets random weights, which say nothing about sound.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import click
import numpy as np

from benchmarks.options import BACKEND, MODEL, MUSIC_RESULTS_FOLDER
from benchmarks.speed.models import find
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.audio import read_audio, write_audio
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.loop import loop_seconds
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import seconds_to_samples
from sa3_mlx.common.terminal import report

SOURCE_SECONDS = 2.5
WINDOW = ("--window", "2", "--overlap", "0.5")

Span = tuple[float, float]  # seconds


@dataclass(frozen=True)
class Run:
    """Describe a run: what is asked for, how long it is, and which parts, in its own time, the source keeps."""

    name: str
    words: tuple[str, ...]
    seconds: float
    kept: tuple[Span, ...] = ()
    moved: float = 0.0  # where the source begins


def music_runs(config: ModelConfig) -> tuple[Run, ...]:
    """Return the runs, each as short as makes sense."""
    rate, source = config.sample_rate, SOURCE_SECONDS
    first, second = "0.5:1.0=soft strings", "1.6:2.1 seed=9 =steady drum"
    return (
        Run(
            "loop of a bar at 170 bpm",
            ("loop", "steady drum", "--bpm", "170", "--bars", "1"),
            loop_seconds(170, 4, rate),
        ),
        Run(
            "two regions, own prompts, feather 0.1 s",
            ("inpaint", "in.wav", "slow piano", "--region", first, "--region", second, "--feather", "0.1"),
            source,
            ((0.0, 0.5), (1.0, 1.6), (2.1, source)),
        ),
        Run(
            "prompts over time",
            ("generate", "--at", "0", "slow piano", "--at", "1", "distant rain", "--seconds", "2"),
            2.0,
        ),
        Run("a piece of two windows", ("generate", "slow piano", "--seconds", "3", *WINDOW), 3.0),
        Run("extend, one run", ("extend", "in.wav", "slow piano", "--seconds", "3"), 3.0, ((0.0, source),)),
        Run(
            "extend, in windows",
            ("extend", "in.wav", "slow piano", "--at", "4", "bright bell", "--seconds", "5", *WINDOW),
            5.0,
            ((0.0, source),),
        ),
        Run(
            "extend before, in windows",
            ("extend", "in.wav", "slow piano", "--before", "2.5", *WINDOW),
            2.5 + source,
            ((2.5, 2.5 + source),),
            2.5,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Hold what came of a run."""

    run: str
    wall_seconds: float
    cpu_seconds: float
    peak_mb: float  # resident, of the process
    samples: int
    exact_length: bool
    kept_exact: bool | None  # None: nothing is kept
    made_differs: bool  # from the source, or from silence


def measure(run: Run, config: ModelConfig, options: Sequence[str], folder: Path) -> Outcome:
    """Run the command in ``folder``, which holds in.wav. Raises ValueError where it fails."""
    words = [sys.executable, "-m", "sa3_mlx", *run.words, *options, "--out", "out.wav", "--force", "--quiet"]
    began = time.monotonic()
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"{run.name}: {said.strip() or 'failed'}")
    wall, rate = time.monotonic() - began, config.sample_rate
    source, made = (read_audio(folder / name, rate, config.audio_channels) for name in ("in.wav", "out.wav"))
    whole = np.zeros_like(made)
    if run.kept:
        start = seconds_to_samples(run.moved, rate)
        whole[start : start + len(source)] = source[: len(made) - start]
    kept = np.zeros(len(made), bool)
    for span in run.kept:
        first, last = (seconds_to_samples(time, rate) for time in span)
        kept[first:last] = True
    differs = (made != whole).any(axis=1)
    return Outcome(
        run=run.name,
        wall_seconds=round(wall, 1),
        cpu_seconds=round(usage.ru_utime + usage.ru_stime, 1),
        peak_mb=round(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6),
        samples=len(made),
        exact_length=len(made) == seconds_to_samples(run.seconds, rate),
        kept_exact=not differs[kept].any() if run.kept else None,
        made_differs=bool(differs[~kept].mean() > 0.5),
    )


def _source(config: ModelConfig) -> Audio:
    """Return a tone in noise that 16 bits hold exactly."""
    time = np.arange(seconds_to_samples(SOURCE_SECONDS, config.sample_rate)) / config.sample_rate
    noise = np.random.default_rng(0).normal(0, 0.05, (len(time), config.audio_channels))
    audio = 0.3 * np.sin(2 * np.pi * 220 * time)[:, None] + noise
    return (np.rint(audio * 32767) / 32768).astype(np.float32)


@click.command(cls=TypedCommand)
@MODEL
@BACKEND
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True)
@MUSIC_RESULTS_FOLDER
def runs(model: str, backend: str, steps: int, results: Path) -> None:
    """Run every feature of music once: time, peak memory, exact lengths, and kept samples bit for bit.

    \b
    python -m benchmarks music-runs small-music
    """
    measured, config = find(model)
    options = ("--steps", str(steps), "--seed", "1", "--backend", backend, "--model", str(measured.folder.resolve()))
    found = list[Outcome]()
    record = {"model": measured.name, "weights": measured.weights, "backend": backend, "steps": steps}
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"music-runs-{config.name}-{backend}-{datetime.now(UTC):%Y-%m-%d}.json"
    with tempfile.TemporaryDirectory() as name:
        write_audio(Path(name) / "in.wav", _source(config), config.sample_rate, "pcm16")
        for run in music_runs(config):
            found.append(measure(run, config, options, Path(name)))
            report("  ".join(f"{key} {value}" for key, value in asdict(found[-1]).items()))
            write_json(path, record | {"runs": [asdict(one) for one in found]})
    report(json.dumps(record | {"runs": [asdict(one) for one in found]}))
    if not all(one.exact_length and one.kept_exact is not False and one.made_differs for one in found):
        raise ValueError("a length or a kept sample is wrong: see the lines above")
