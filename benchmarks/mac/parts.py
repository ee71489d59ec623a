"""Measure the parts of ``python -m benchmarks mac``; each returns what goes into the file.

Everything runs in processes of its own, in a home of its own: what is tuned here changes nothing for the user.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.speed.latency import Repeats, measure, start, sustained
from benchmarks.speed.machine import Machine
from benchmarks.speed.models import PROMPT, MeasuredModel
from benchmarks.speed.worker import Work
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.tuning.table import read_table

ROOT = Path(__file__).resolve().parents[2]
METAL_TESTS = "tests/twins/test_metal.py"


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Say how much is measured."""

    backend: str
    lengths: tuple[float, ...]  # seconds of clips
    steps: int | None  # None: as many as the model usually takes
    cold: int
    repeats: int
    minutes: float  # of the sustained run
    tests: tuple[str, ...]  # arguments for pytest
    tune: tuple[str, ...]  # arguments for `sa3 tune`
    shapes: tuple[str, ...]  # arguments for the operations


FULL = Extent(
    backend="mlx",
    lengths=(5.0, 30.0),
    steps=None,
    cold=3,
    repeats=10,
    minutes=1.5,
    tests=("-m", "metal"),
    tune=(),
    shapes=(),
)
SHORT = Extent(  # of --dry-run
    backend="mlx",
    lengths=(0.5,),
    steps=2,
    cold=1,
    repeats=2,
    minutes=0.0,
    tests=("-m", "metal", METAL_TESTS, "-k", "bias"),
    tune=("--seconds", "0.5", "--only", "launches", "--rounds", "2"),
    shapes=("--short",),
)


@contextmanager
def own_home() -> Iterator[None]:
    """Let this process and those that it starts have an empty home."""
    before = os.environ.get("SA3_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SA3_HOME"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["SA3_HOME"]
            else:
                os.environ["SA3_HOME"] = before


def metal_tests(extent: Extent) -> dict[str, Any]:
    """Run the tests for Apple GPUs: how many passed, and the names of those that did not."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-n", "0", *extent.tests, f"--junitxml={report}"]
        done = _run(command, check=False)
        if not report.is_file():
            raise ValueError(f"pytest made no report: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
        return read_report(report.read_text(encoding="utf-8"))


def read_report(text: str) -> dict[str, Any]:
    """Read the report of pytest; messages stay behind, which may name folders."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    names = {kind: [case.get("name") for case in cases if case.find(kind) is not None] for kind in _KINDS}
    failed = [*names["failure"], *names["error"]]
    return {"passed": len(cases) - len(failed) - len(names["skipped"]), "skipped": len(names["skipped"])} | {
        "failed": failed
    }


_KINDS = ("failure", "error", "skipped")


def latency(
    model: MeasuredModel, config: ModelConfig, machine: Machine, extent: Extent, *, tuned: bool
) -> list[dict[str, Any]]:
    """Time generations, cold and warm, in the usual ways or in the tuned ones."""
    repeats = Repeats(cold=extent.cold, warmups=1, repeats=extent.repeats, sustained_minutes=0)
    lengths = [seconds for seconds in extent.lengths if seconds <= config.max_seconds]
    return [measure(model, _work(model, config, extent, seconds, tuned=tuned), repeats, machine) for seconds in lengths]


def tune(model: MeasuredModel, extent: Extent) -> dict[str, Any]:
    """Run ``sa3 tune``: its lines, and what it keeps."""
    command = [sys.executable, "-m", "sa3_mlx", "tune", str(model.folder), "--backend", extent.backend, *extent.tune]
    lines = _run(command).stdout.replace(str(model.folder), model.name).splitlines()
    (tuning,) = read_table()
    return {"lines": [line for line in lines if not line.startswith("file ")], "kept": tuning.to_dict()}


def memory(model: MeasuredModel, config: ModelConfig, extent: Extent) -> list[dict[str, Any]]:
    """Measure the peak of every phase beside what was planned."""
    lengths = ",".join(f"{seconds:g}" for seconds in extent.lengths if seconds <= config.max_seconds)
    command = [sys.executable, "-m", "benchmarks", "memory", "--model", str(model.folder), "--seconds", lengths]
    entries: list[dict[str, Any]] = json.loads(_run(command).stdout.splitlines()[-1])["entries"]
    return entries


def operations(extent: Extent) -> list[dict[str, Any]]:
    """Time single operations at the models' shapes."""
    command = [sys.executable, "-m", "benchmarks.mac.shapes", *extent.shapes]
    found: list[dict[str, Any]] = json.loads(_run(command).stdout.splitlines()[-1])
    return found


def sustained_run(model: MeasuredModel, config: ModelConfig, extent: Extent) -> dict[str, Any]:
    """Generate for a minute and more: whether the machine slows down, and its energy where the system tells it."""
    seconds = max(length for length in extent.lengths if length <= config.max_seconds)
    work = _work(model, config, extent, seconds, tuned=True, minutes=extent.minutes)
    return {"seconds": seconds} | sustained(start(work))


def _work(
    model: MeasuredModel, config: ModelConfig, extent: Extent, seconds: float, *, tuned: bool, minutes: float = 0
) -> Work:
    usual = config.usual_sampling
    return Work(
        backend=extent.backend,
        device="auto",
        folder=str(model.folder),
        dtype="auto",
        text_dtype="auto",
        compiled=False,
        tuned=tuned,
        prompt=PROMPT,
        seconds=seconds,
        sampling=type(usual)(sampler=usual.sampler, steps=extent.steps or usual.steps, guidance=usual.guidance),
        warmups=0,
        repeats=2,
        minutes=minutes,
        write=False,
        spawned=0,
    )


def _run(command: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout. Raises ValueError with its last line where it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise ValueError(f"{command[2]} failed: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    return done
