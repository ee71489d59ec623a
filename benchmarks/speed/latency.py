"""Latency of generations: cold (a new process, loading included) and warm, by stage, with the machine's description."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from .machine import Machine, busy_cores
from .worker import Work

FORMAT = "sa3-latency/1"
RESULTS = Path(__file__).parents[1] / "results"
STAGES = ("total", "cpu", "text", "sample", "decode", "first_sound")
WARM = ("steps", "sampler", "guidance", "frames", "device", "dtype", "text_dtype", "energy")  # taken from the warm runs
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
)


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    folder: Path
    weights: str  # "random", or the hash of the file
    recipe: str | None  # of a quantized model


@dataclass(frozen=True, kw_only=True)
class Counts:
    cold: int  # processes
    warmups: int
    repeats: int
    sustained_minutes: float


def measure(model: Model, work: Work, counts: Counts, machine: Machine) -> dict[str, Any]:
    """One entry of a results file. All seconds; ``values`` are those of single runs, in the order they were made."""
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
    if counts.cold:
        runs = [start(replace(work, warmups=0, repeats=1, minutes=0, write=True)) for _ in range(counts.cold)]
        entry["cold"] = {"wall": spread([run["wall"] for run in runs])} | _memory(runs[-1])
    warm = start(replace(work, warmups=counts.warmups, repeats=counts.repeats, minutes=0, write=False))
    entry |= {name: warm[name] for name in WARM}
    entry["warm"] = {stage: spread([timing[stage] for timing in warm["timings"]]) for stage in STAGES} | _memory(warm)
    entry["real_time_factor"] = work.seconds / entry["warm"]["total"]["p50"]
    if not warm["finite"]:
        raise ValueError(f"{model.name}: the audio is not finite; a time of that means nothing")
    if counts.sustained_minutes:
        entry["sustained"] = sustained(
            start(replace(work, warmups=0, repeats=2, minutes=counts.sustained_minutes, write=False))
        )
    return entry


def start(work: Work) -> dict[str, Any]:
    """Run one worker to its end. Raises ValueError with its last line when it fails."""
    text = json.dumps(asdict(replace(work, spawned=time.time())))
    command = [sys.executable, "-m", "benchmarks.speed.worker", text]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    if done.returncode:
        raise ValueError(f"the measured process failed: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and 95th percentile; with fewer than 20 values the latter leans on the slowest."""
    return {
        "p50": float(np.percentile(values, 50)),
        "p95": float(np.percentile(values, 95)),
        "values": [round(value, 6) for value in values],
    }


def sustained(run: dict[str, Any]) -> dict[str, Any]:
    """Does the machine slow down? Medians of the runs that began in the first and in the last fifth of the time."""
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
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def key(entry: dict[str, Any]) -> tuple[object, ...]:
    """What was measured, without how long it took."""
    return tuple(entry[name] for name in KEY)


def table(entries: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Rows for people, the head first."""
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
