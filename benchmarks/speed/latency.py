"""Time generations, cold (a new process, loading included) and warm, by stage: ``python -m benchmarks latency``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.options import RESULTS_FOLDER, SamplingChoice, parse_lengths
from sa3_mlx.cli.backend import choose
from sa3_mlx.cli.models.listing import table as columns
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.model.lengths import longest
from sa3_mlx.common.model.precision import DTYPES, TEXT_DTYPES

from .machine import Machine, busy_cores, describe
from .models import PROMPT, MeasuredModel, find
from .worker import USUAL, Work

FORMAT = "sa3-latency/1"
STAGES = ("total", "cpu", "text", "sample", "decode", "first_sound")
WARM = (
    "steps",
    "sampler",
    "guidance",
    "frames",
    "device",
    "dtype",
    "text_dtype",
    "ways",
    "energy",
)  # taken from the warm runs
KEY = (
    "model",
    "weights",
    "recipe",
    "backend",
    "compiled",
    "device",
    "dtype",
    "text_dtype",
    "seconds",
    "steps",
    "sampler",
    "guidance",
    "ways",
)


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Say how often a generation is timed."""

    cold: int  # processes
    warmups: int
    repeats: int
    sustained_minutes: float


def measure(model: MeasuredModel, work: Work, repeats: Repeats, machine: Machine) -> dict[str, Any]:
    """Measure one entry of a results file, in seconds; ``values`` are those of single runs, in their order.

    Raises ValueError where a measured process fails, and for audio that is not finite.
    """
    entry: dict[str, Any] = {  # busy: other programs are running
        "model": model.name,
        "weights": model.weights,
        "recipe": model.recipe,
        "backend": work.backend,
        "compiled": work.compiled,
        "seconds": work.seconds,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine.slug(),
        "busy": busy_cores() > 0.5,
    }
    if repeats.cold:
        runs = [start(replace(work, warmups=0, repeats=1, minutes=0, write=True)) for _ in range(repeats.cold)]
        entry["cold"] = {"wall": spread([run["wall"] for run in runs])} | _memory(runs[-1])
    warm = start(replace(work, warmups=repeats.warmups, repeats=repeats.repeats, minutes=0, write=False))
    entry |= {name: warm[name] for name in WARM}
    entry["warm"] = {stage: spread([timing[stage] for timing in warm["timings"]]) for stage in STAGES} | _memory(warm)
    entry["real_time_factor"] = work.seconds / entry["warm"]["total"]["p50"]
    if not warm["finite"]:
        raise ValueError(f"{model.name}: the audio is not finite; a time of that means nothing")
    if repeats.sustained_minutes:
        entry["sustained"] = sustained(
            start(replace(work, warmups=0, repeats=2, minutes=repeats.sustained_minutes, write=False))
        )
    return entry


def start(work: Work) -> dict[str, Any]:
    """Run one worker to its end and return what it tells. Raises ValueError with its last line when it fails."""
    text = json.dumps(replace(work, spawned=time.time()).to_dict())
    command = [sys.executable, "-m", "benchmarks.speed.worker", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise ValueError(f"the measured process failed: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median and 95th percentile; with fewer than 20 values the latter leans on the slowest."""
    return {
        "p50": float(np.percentile(values, 50)),
        "p95": float(np.percentile(values, 95)),
        "values": [round(value, 6) for value in values],
    }


def sustained(run: dict[str, Any]) -> dict[str, Any]:
    """Tell whether the machine slows down: medians of the runs in the first and in the last fifth of the time."""
    timings = run["timings"]
    end = timings[-1]["begun"] + timings[-1]["total"]
    first = [timing["total"] for timing in timings if timing["begun"] <= end / 5]
    last = [timing["total"] for timing in timings if timing["begun"] + timing["total"] >= 4 * end / 5]
    begin, finish = float(np.median(first)), float(np.median(last))
    return {
        "minutes": end / 60,
        "runs": len(timings),
        "first_p50": begin,
        "last_p50": finish,
        "slowdown": finish / begin,
        "values": [round(timing["total"], 6) for timing in timings],
        "energy": run["energy"],
    }


def _memory(run: dict[str, Any]) -> dict[str, Any]:
    return {name: run[name] for name in ("peak_memory_bytes", "memory_counter", "peak_rss_bytes")}


def save(folder: Path, machine: Machine, entries: Sequence[dict[str, Any]]) -> Path:
    """Add entries to the file of this machine and day; a newer measurement of the same thing replaces the older."""
    day = datetime.now(UTC).date().isoformat()
    path = folder / f"latency-{machine.slug()}-{day}.json"
    old = json.loads(path.read_text(encoding="utf-8"))["entries"] if path.is_file() else []
    kept = [entry for entry in old if all(key(entry) != key(new) for new in entries)]
    data = {"format": FORMAT, "machine": machine.to_dict(), "date": day, "entries": [*kept, *entries]}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, data)
    return path


def key(entry: dict[str, Any]) -> tuple[object, ...]:
    """Return what was measured, without how long it took."""
    return tuple(entry.get(name, USUAL) if name == "ways" else entry[name] for name in KEY)


def table(entries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return rows for people, the head first."""
    rows: list[tuple[str, ...]] = [
        (
            "audio",
            "cold",
            "warm p50",
            "p95",
            "CPU time",
            "text",
            "sample",
            "per step",
            "decode",
            "first sound",
            "x real time",
            "memory",
            "energy",
        )
    ]
    for entry in entries:
        warm = entry["warm"]
        cold = f"{entry['cold']['wall']['p50']:.2f} s" if "cold" in entry else "-"
        middle = {stage: warm[stage]["p50"] for stage in STAGES}
        memory = warm["peak_memory_bytes"]
        counted = f"{memory / 1e9:.2f} GB" if memory is not None else f"{warm['peak_rss_bytes'] / 1e9:.2f} GB RSS"
        energy = f"{entry['energy']['joules_each']:.0f} J" if entry["energy"] else "-"
        rows.append(
            (
                f"{entry['seconds']:g} s",
                cold,
                f"{middle['total']:.3f} s",
                f"{warm['total']['p95']:.3f} s",
                f"{middle['cpu']:.2f} s",
                f"{middle['text']:.3f} s",
                f"{middle['sample']:.3f} s",
                f"{middle['sample'] / entry['steps'] * 1e3:.1f} ms",
                f"{middle['decode']:.3f} s",
                f"{middle['first_sound']:.3f} s",
                f"{entry['real_time_factor']:.2f}",
                counted,
                energy,
            )
        )
    return rows


@click.command(cls=TypedCommand)
@click.option(
    "--model",
    "name",
    default="small-music",
    show_default=True,
    metavar="NAME|PATH",
    help="Installed model, folder, or known name: then with random weights.",
)
@click.option("--backend", type=click.Choice(["auto", "mlx", "torch"]), default="auto", show_default=True)
@click.option("--device", default="auto", show_default=True, help="Of torch: cpu, cuda, mps.")
@click.option("--mps", is_flag=True, help="PyTorch on a Mac's GPU: short for --backend torch --device mps.")
@click.option("--seconds", "lengths", default="5,30", show_default=True, callback=parse_lengths, metavar="N,N")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--text-dtype", type=click.Choice(TEXT_DTYPES), default="auto", show_default=True)
@click.option("--compile", "compiled", is_flag=True, help="PyTorch: compile the step and the decoder; long warm-up.")
@click.option("--untuned", is_flag=True, help="Go the usual ways, whatever `sa3 tune` found here.")
@click.option("--cold", type=click.IntRange(0), default=1, show_default=True, help="Fresh processes to time.")
@click.option("--warmups", type=click.IntRange(1), default=1, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--sustained",
    type=click.FloatRange(0),
    default=0.0,
    metavar="MINUTES",
    help="Also generate for so long, to see the machine slow down.",
)
@RESULTS_FOLDER
@click.option("--no-save", is_flag=True, help="Write no results file.")
def latency(
    name: str,
    backend: str,
    device: str,
    mps: bool,
    lengths: tuple[float, ...],
    choice: SamplingChoice,
    dtype: str,
    text_dtype: str,
    compiled: bool,
    untuned: bool,
    cold: int,
    warmups: int,
    repeats: int,
    sustained: float,
    results: Path,
    no_save: bool,
) -> None:
    """Time a generation: cold and warm, every stage; memory, and energy where the system tells it.

    Times are wall clock of an otherwise idle machine. The last line is JSON.
    """
    framework = choose("torch" if mps else backend)
    model, config = find(name)
    if compiled and framework != "torch":
        raise click.UsageError("--compile is for --backend torch; MLX compiles by itself on a GPU")
    machine = describe(framework)
    click.echo(f"{machine.text()}\n{model.name} ({model.weights_text()}), {framework}, {dtype}", err=True)
    sampling = choice.resolved(config.usual_sampling)
    counts = Repeats(cold=cold, warmups=warmups, repeats=repeats, sustained_minutes=sustained)
    entries = []
    for seconds in lengths:
        if seconds > config.max_seconds:
            click.echo(f"{seconds:g} s: left out, {model.name} makes up to {longest(config)}", err=True)
            continue
        work = Work(
            backend=framework,
            device="mps" if mps else device,
            folder=str(model.folder),
            dtype=dtype,
            text_dtype=text_dtype,
            compiled=compiled,
            tuned=not untuned,
            prompt=PROMPT,
            seconds=seconds,
            sampling=sampling,
            warmups=warmups,
            repeats=repeats,
            minutes=0,
            write=False,
            spawned=0,
        )
        entries.append(measure(model, work, counts, machine))
    if not entries:
        raise click.UsageError("no length left to measure")
    _show(entries)
    if not no_save:
        click.echo(f"file   {save(results, machine, entries)}")
    sys.stdout.flush()
    click.echo(json.dumps({"machine": machine.to_dict(), "entries": entries}))


def _show(entries: Sequence[dict[str, Any]]) -> None:
    """Print the table and what else a reader should know."""
    click.echo(columns(table(entries)))
    for entry in entries:
        if "sustained" in entry:
            run = entry["sustained"]
            click.echo(
                f"{entry['seconds']:g} s, sustained {run['minutes']:.1f} min, {run['runs']} runs: "
                f"{run['first_p50']:.3f} s at first, {run['last_p50']:.3f} s at last, "
                f"{run['slowdown']:.2f} times as long"
            )
    if any(entry["busy"] for entry in entries):
        click.echo("other programs were running here: the times are too long, and `report` leaves them out")
