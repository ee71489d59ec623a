"""Time requests to a resident server beside the command in a process of its own: ``python -m benchmarks serving``."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import click

from sa3_mlx.cli.options.model import PrecisionOptions
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.server.running import running
from sa3_mlx.server.settings import Settings

from .models import PROMPT, find

_QUEUED = 16  # sounds that wait, in the last measurement


@click.command(cls=TypedCommand)
@click.option("--model", default="demo", show_default=True, help="Installed model, folder, or known name (random).")
@click.option("--backend", type=click.Choice(["auto", "mlx", "torch"]), default="auto", show_default=True)
@click.option("--seconds", type=float, default=2.0, show_default=True)
@click.option("--repeats", type=click.IntRange(1, 100), default=5, show_default=True, help="Of what is measured warm.")
def serving(model: str, backend: str, seconds: float, repeats: int) -> None:
    """Time the first and later requests, the first sound of a stream and a full queue, in seconds."""
    measured, _ = find(model)
    prompt = "piano note A4" if model == "demo" else PROMPT
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, Any] = {"model": measured.name, "weights": measured.weights, "seconds": seconds}
        result["process"] = round(_process(measured.folder, backend, prompt, seconds, folder), 3)
        options = PrecisionOptions(
            name=str(measured.folder), backend=backend, device="auto", dtype="auto", text_dtype="auto", compiled=False
        )
        settings = Settings(folder=folder / "studio", adapters=folder, model=options, port=0, disk_free=0)
        with running(settings) as studio:
            asking = _Asking(studio.settings.port, prompt, seconds)
            result["first"] = round(asking.whole(1), 3)
            result["second"] = round(asking.whole(2), 3)
            result["warm"] = round(median(asking.whole(3 + number) for number in range(repeats)), 3)
            result["first_sound"] = round(median(asking.first_sound(20 + number) for number in range(repeats)), 3)
            result["queue_full_each"] = round(asking.queued(_QUEUED) / _QUEUED, 3)
    click.echo(f"one process a sound          {result['process']:.2f} s")
    click.echo(f"first request, model loaded  {result['first']:.2f} s")
    click.echo(f"second                       {result['second']:.2f} s")
    click.echo(f"warm, median of {repeats}            {result['warm']:.2f} s")
    click.echo(f"first sound of a stream      {result['first_sound']:.2f} s")
    click.echo(f"{_QUEUED} at once, each             {result['queue_full_each']:.2f} s")
    click.echo(json.dumps(result))


def _process(model: Path, backend: str, prompt: str, seconds: float, folder: Path) -> float:
    """Return the seconds of the command, from its start to its end."""
    words = ["generate", prompt, "--seconds", str(seconds), "--seed", "1", "--model", str(model), "--backend", backend]
    began = time.monotonic()
    command = [sys.executable, "-m", "sa3_mlx", *words, "--out", str(folder / "x.wav"), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - began


class _Asking:
    """Ask a server for sounds over HTTP."""

    def __init__(self, port: int, prompt: str, seconds: float) -> None:
        self._address, self._prompt, self._seconds = f"http://127.0.0.1:{port}", prompt, seconds

    def _open(self, path: str, data: dict[str, Any] | None = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        call = urllib.request.Request(self._address + path, body, {"content-type": "application/json"})
        return urllib.request.urlopen(call)

    def _submit(self, seed: int, *, stream: bool = False) -> str:
        items = [{"prompt": self._prompt, "seconds": self._seconds, "seed": seed}]
        return str(json.load(self._open("/api/jobs", {"request": {"items": items}, "stream": stream}))["id"])

    def _events(self, job: str) -> Iterator[str]:
        for line in self._open(f"/api/jobs/{job}/events"):
            if line.startswith(b"event: "):
                yield line.decode().split(": ")[1].strip()

    def whole(self, seed: int) -> float:
        """Return the seconds until a sound is there as a file."""
        began = time.monotonic()
        job = self._submit(seed)
        last = list(self._events(job))[-1]
        if last != "done":
            raise ValueError(f"the job {job} ended as {last}")
        sound = json.load(self._open(f"/api/jobs/{job}"))["sounds"][0]["id"]
        self._open(f"/api/sounds/{sound}/audio").read()
        return time.monotonic() - began

    def first_sound(self, seed: int) -> float:
        """Return the seconds until the first samples are there."""
        began = time.monotonic()
        events = self._events(self._submit(seed, stream=True))
        next(name for name in events if name in ("audio", "done"))  # done: it was faster than the question
        took = time.monotonic() - began
        list(events)
        return took

    def queued(self, count: int) -> float:
        """Return the seconds until so many sounds are there that were asked for at once."""
        began = time.monotonic()
        jobs = [self._submit(100 + number) for number in range(count)]
        for job in jobs:
            list(self._events(job))
        return time.monotonic() - began
