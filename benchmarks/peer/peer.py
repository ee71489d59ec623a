"""Measure our speed beside that of the official MLX port: ``python -m benchmarks peer``."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import click

from benchmarks.options import RESULTS_FOLDER
from benchmarks.speed.machine import describe
from sa3_mlx.common.files.atomic import write_json

from .files import Whole, generating, loading, write_8bit, write_files
from .networks import decoding, encoding, sampling
from .sides import MODELS, STEPS, Checkout, Sides, config_of, frames_of, measure

WHOLE = {
    "generate": Whole(dtype="float32", steps=STEPS),
    "memory": Whole(dtype="float16", steps=1),
    "memory-8bit": Whole(dtype="float16", steps=1, packed=True),
    "memory-8bit-chunks": Whole(dtype="float16", steps=1, packed=True, chunk_frames=32),
    "memory-streamed": Whole(dtype="float16", steps=1, residency="step"),
}
CASES = ("sample", "guided", "decode", "encode", "load", *WHOLE)


@dataclass(frozen=True, kw_only=True)
class PeerRow:
    """Hold what was measured: CPU seconds of every round."""

    case: str
    model: str
    seconds: float
    frames: int
    ours: list[float]
    peer: list[float]
    ours_peak_bytes: int  # MLX's peak counter, what both sides hold in memory before included
    peer_peak_bytes: int
    difference: float  # relative L2 of the outputs
    note: str

    @property
    def ratio(self) -> float:
        """Return how many times faster ours is."""
        return statistics.median(self.peer) / statistics.median(self.ours)


def make(case: str, checkout: Checkout, model: str, seconds: float, depth: int | None, work: Path) -> Sides:
    """Prepare a case: ``WHOLE`` are runs from nothing in memory to audio, ``memory`` is one step as shipped."""
    frames, config = frames_of(model, seconds), config_of(model, None)
    if case == "load":
        return loading(checkout, config, write_files(work, config, "float16"))
    if case in WHOLE:
        run = WHOLE[case]
        files = write_files(work, config, run.dtype)
        if run.packed:
            files = write_8bit(work, files, config)
        return generating(checkout, config, files, frames, seconds, run)
    if case in ("sample", "guided"):
        return sampling(checkout, model, frames, depth, guided=case == "guided")
    return (decoding if case == "decode" else encoding)(checkout, model, frames)


def line(row: PeerRow) -> str:
    """Return one line for people."""
    times = "  ".join(f"{ours:.2f}/{peer:.2f}" for ours, peer in zip(row.ours, row.peer, strict=True))
    return (
        f"{row.case:18} {row.model:7} {row.seconds:4.0f} s  {row.ratio:5.3f}x  difference {row.difference:.1e}  "
        f"peak {row.ours_peak_bytes / 1e9:.2f}/{row.peer_peak_bytes / 1e9:.2f} GB  "
        f"n = {len(row.ours)}  CPU-s ours/peer {times}  {row.note}"
    )


@click.command()
@click.option(
    "--peer",
    "path",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="Checkout of Stability-AI/stable-audio-3, or of its folder optimized/mlx.",
)
@click.option("--model", type=click.Choice(list(MODELS)), default="small", show_default=True)
@click.option("--seconds", type=click.FloatRange(1), default=5.0, show_default=True)
@click.option("--case", "cases", type=click.Choice(CASES), multiple=True, help="Default: all.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--depth", type=click.IntRange(1), help="Fewer blocks of the DiT, on both sides; marked in the result.")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("peer-files"),
    show_default=True,
    help="Folder for the files of load, generate and memory: some 9 GB for small.",
)
@RESULTS_FOLDER
def peer(
    path: Path,
    model: str,
    seconds: float,
    cases: tuple[str, ...],
    rounds: int,
    depth: int | None,
    work: Path,
    results: Path,
) -> None:
    """Measure our speed beside that of the official MLX port, with random weights, in ratios of CPU seconds.

    Rows are added to one file per machine and day; a row of the same kind replaces the older one.
    """
    if os.environ.get("OPENBLAS_NUM_THREADS") != "1":
        raise click.UsageError("set OPENBLAS_NUM_THREADS=1: CPU seconds of several BLAS threads cannot be compared")
    machine, checkout = describe("mlx"), Checkout(path)
    target = results / f"peer-{machine.slug()}-{date.today().isoformat()}.json"
    for case in cases or CASES:
        sides = make(case, checkout, model, seconds, depth, work)
        found = measure(sides, rounds)
        row = PeerRow(
            case=case,
            model=model,
            seconds=seconds,
            frames=frames_of(model, seconds),
            ours=found.seconds["ours"],
            peer=found.seconds["peer"],
            ours_peak_bytes=found.peaks["ours"],
            peer_peak_bytes=found.peaks["peer"],
            difference=found.difference,
            note=sides.note,
        )
        click.echo(line(row))
        add(target, row, machine.to_dict())
        click.echo(json.dumps(asdict(row) | {"ratio": row.ratio}))


def add(target: Path, row: PeerRow, machine: dict[str, object]) -> None:
    """Put a row into the file of results."""
    target.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(target.read_text(encoding="utf-8"))["rows"] if target.is_file() else []
    same = (row.case, row.model, row.seconds, row.note)
    rows = [old for old in known if (old["case"], old["model"], old["seconds"], old["note"]) != same]
    rows.append(asdict(row) | {"ratio": row.ratio})
    write_json(target, {"machine": machine, "unit": "process CPU seconds", "rows": rows})
