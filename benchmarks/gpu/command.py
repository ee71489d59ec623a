"""Measure an NVIDIA GPU in about nine minutes: ``python -m benchmarks gpu``."""

from __future__ import annotations

import math
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import click
import torch

from benchmarks.options import RESULTS_FOLDER
from sa3_mlx.common.version import revision

from . import kernels, stages, whole
from .journal import Journal, Section, Workbench

# What matters most comes first: a run that is cut keeps what it has. Seconds are those of nine minutes.
PLAN: dict[str, tuple[Section, float]] = {
    "facts": (kernels.facts, 15),
    "correctness": (whole.correctness, 50),
    "latency": (whole.latency, 80),
    "stages": (stages.stages, 185),
    "attention": (kernels.attention, 50),
    "eager": (kernels.eager, 20),
    "compiled": (kernels.compiled, 60),
    "same": (kernels.autoencoder, 40),
    "parts": (kernels.small_parts, 10),
    "training": (whole.training, 20),
    "fp8": (kernels.fp8, 10),
}
_FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)


@click.command()
@click.option(
    "--minutes", type=click.FloatRange(0.1), default=9.0, show_default=True, help="For all that is measured, in shares."
)
@click.option("--only", metavar="NAMES", help=f"Of {', '.join(PLAN)}; joined by commas.")
@click.option("--golden", type=_FOLDER, help="Folder of reference outputs; default: that beside the checkout.")
@click.option("--official", type=_FOLDER, help="Checkout of the official PyTorch code, timed beside ours.")
@click.option("--dry-run", is_flag=True, help="Everything with tiny networks on the CPU: is it in order?")
@RESULTS_FOLDER
def gpu(
    minutes: float, only: str | None, golden: Path | None, official: Path | None, dry_run: bool, results: Path
) -> None:
    """Measure this NVIDIA GPU: facts, correctness, latency, every stage of training, kernels.

    It needs PyTorch with CUDA and, on a machine with nothing else, the packages numpy, safetensors, tokenizers, click,
    tqdm, soundfile and soxr with cffi and pycparser, and for the stages scipy and matplotlib with what it needs, as
    wheels; no weights. Every row is written as soon as it is known, so that a run that is cut keeps what it has.
    Networks have random weights, but for the demo.
    """
    if not dry_run and not torch.cuda.is_available():
        raise click.UsageError("PyTorch finds no CUDA device here; --dry-run goes through everything on any machine")
    names = list(PLAN) if only is None else [name.strip() for name in only.split(",")]
    for name in names:
        if name not in PLAN:
            raise click.UsageError(f"no section is called {name!r}: there are {', '.join(PLAN)}")
    device = torch.device("cpu" if dry_run else "cuda")
    known = Path(__file__).resolve().parents[3] / "shared" / "golden"
    golden = golden or (known if known.is_dir() and not dry_run else None)
    slug = "dry" if dry_run else torch.cuda.get_device_name().lower().replace(" ", "-")
    date = datetime.now(UTC).date().isoformat()
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"gpu-{slug}-{date}.json"
    journal = Journal(path, {"date": date, "sa3": revision(), "short": dry_run, "minutes": minutes})
    end = math.inf if dry_run else time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        bench = Workbench(
            device=device,
            short=dry_run,
            folder=Path(folder),
            golden=golden,
            official=official,
            repeats=1 if dry_run else 5,
        )
        whole_time = sum(PLAN[name][1] for name in names)
        for name in names:
            section, seconds = PLAN[name]
            left = end - time.monotonic()
            if left > 1:
                share = 60 * minutes * seconds / whole_time
                journal.run(name, section, bench, left if dry_run else min(left, share))
    click.echo(f"file   {path}")
