"""Run sections of a measurement, each with a budget and a guard, and write every row as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from sa3_mlx.common.files.atomic import write_json

FORMAT = "sa3-gpu/1"
Row = dict[str, Any]
Section = Callable[["Workbench"], Iterator[Row]]


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """Say where and how much is measured."""

    device: torch.device
    short: bool  # tiny sizes: is everything in order?
    folder: Path  # for files that are needed meanwhile
    golden: Path | None  # outputs of the official code
    official: Path | None  # a checkout of the official code
    repeats: int

    def sync(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, run: Callable[[], object]) -> Row:
        """Return milliseconds of ``run``: until the device is done, and until all is launched; medians."""
        run()
        self.sync()
        whole, host = [], []
        for _ in range(self.repeats):
            begun = time.perf_counter()
            run()
            launched = time.perf_counter()
            self.sync()
            whole.append(time.perf_counter() - begun)
            host.append(launched - begun)
        return {"ms": _median(whole), "host_ms": _median(host), "spread_ms": 1e3 * (max(whole) - min(whole))}

    def busy(self, run: Callable[[], object]) -> float | None:
        """Return the milliseconds in which the kernels of ``run`` keep the device at work; None on a CPU."""
        if self.device.type != "cuda":
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            run()
            self.sync()
        return sum(event.self_device_time_total for event in seen.key_averages()) / 1e3


def _median(seconds: list[float]) -> float:
    return 1e3 * sorted(seconds)[len(seconds) // 2]


class Journal:
    """Hold what was measured, in a file that is whole after every row."""

    def __init__(self, path: Path, head: Row) -> None:
        self._path = path
        self.result: Row = {"format": FORMAT, **head, "sections": {}}
        self._write()

    def run(self, name: str, section: Section, bench: Workbench, budget: float) -> None:
        """Take rows until the section ends or its seconds are over; an error is a row and ends it."""
        found: Row = {"rows": [], "cut": False}
        self.result["sections"][name] = found
        begun = time.monotonic()
        click.echo(f"{name}: at most {budget:.0f} s", err=True)
        rows = section(bench)
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # whatever breaks on a machine that nobody has seen, the rest goes on
                row = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
                rows = iter(())
            if row is None:
                break
            found["rows"].append(row)
            self._write()
            click.echo(f"  {row}", err=True)
            if time.monotonic() - begun > budget:
                found["cut"] = True
                break
        found["seconds"] = round(time.monotonic() - begun, 1)
        self._write()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()

    def _write(self) -> None:
        write_json(self._path, self.result)
