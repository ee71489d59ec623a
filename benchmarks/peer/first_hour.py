"""Measure what a new user waits for: download, verification, conversion, first and second sound.

``python -m benchmarks first-hour`` serves files of the official MLX port from this machine, as the hub does, and runs
the commands of a new user in processes of their own, in a home of their own. What the network takes is not in it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click

from benchmarks.options import RESULTS_FOLDER
from benchmarks.speed.machine import describe
from benchmarks.speed.models import PROMPT
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.safetensors import file_hash

from .conversion import NAMES
from .sides import MODELS

_REPOSITORY, _REVISION = "stabilityai/stable-audio-3-optimized", "0" * 40  # of files that are not the released ones
_BLOCK = 1 << 20
_COMMAND = """
import json, resource, sys, time
from pathlib import Path
import sa3_convert
from sa3_convert import hub
from sa3_mlx.cli.app import run

spent = {}

def timed(name, function):
    def call(*args, **options):
        start = time.perf_counter()
        found = function(*args, **options)
        spent[name] = time.perf_counter() - start
        return found
    return call

hub.fetch, sa3_convert.convert = timed("fetch", hub.fetch), timed("convert", sa3_convert.convert)
start = time.perf_counter()
code = run(sys.argv[1:])
status = Path("/proc/self/status")
if status.exists():
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    peak = int(line.split()[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time(), "peak_bytes": peak}
print("\\n" + json.dumps({**found, "phases": spent}))
sys.exit(code)
"""


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Hold what one command took; ``phases`` are seconds of its parts, fetching with verification."""

    command: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    phases: dict[str, float]


@contextmanager
def serving(files: Path) -> Iterator[str]:
    """Serve the files of a folder under the name of the anonymous repository; yield the address."""
    names = {f"MLX/{path.name}": path for path in sorted(files.iterdir()) if path.suffix in (".npz", ".json")}
    hashes = {name: file_hash(path).removeprefix("sha256:") for name, path in names.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0].lstrip("/")
            if path.startswith(f"api/models/{_REPOSITORY}"):
                listing = [
                    {
                        "rfilename": name,
                        "size": file.stat().st_size,
                        "blobId": hashes[name][:40],
                        "lfs": {"sha256": hashes[name], "size": file.stat().st_size, "pointerSize": 134},
                    }
                    for name, file in names.items()
                ]
                body = json.dumps({"id": _REPOSITORY, "sha": _REVISION, "siblings": listing}).encode()
                self._head(200, len(body), {"Content-Type": "application/json"})
                self.wfile.write(body)
                return
            name = path.removeprefix(f"{_REPOSITORY}/resolve/{_REVISION}/")
            if name not in names:
                self._head(404, 0, {"X-Error-Code": "EntryNotFound"})
                return
            self._head(200, names[name].stat().st_size, {"ETag": f'"{hashes[name]}"', "X-Repo-Commit": _REVISION})
            if self.command == "GET":
                with names[name].open("rb") as file:
                    while block := file.read(_BLOCK):
                        self.wfile.write(block)

        def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(length), **headers}.items():
                self.send_header(key, value)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def run_command(home: Path, endpoint: str, *arguments: str) -> Wait:
    """Run a command of sa3 in a process of its own. Raises RuntimeError with its last line where it fails."""
    environment = {
        **os.environ,
        "HOME": str(home),
        "SA3_HOME": str(home / "sa3"),
        "HF_HOME": str(home / "hf"),
        "HF_TOKEN": "",
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout).splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Wait(command=f"sa3 {arguments[0]}", **found)


@click.command()
@click.option(
    "--files",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    required=True,
    help="Folder with the port's files of the model, such as MODEL-port of `conversion`.",
)
@click.option("--model", type=click.Choice(list(MODELS)), default="small", show_default=True)
@click.option("--seconds", type=click.FloatRange(0.5), default=5.0, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True)
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("first-hour"),
    show_default=True,
    help="Home of the new user: twice the size of the files.",
)
@RESULTS_FOLDER
def first_hour(files: Path, model: str, seconds: float, steps: int, work: Path, results: Path) -> None:
    """Measure what a new user waits for, the network aside: sa3 get, first and second sound. The last line is JSON."""
    name = MODELS[model]
    if not (files / f"dit_{NAMES[model]}_f16.npz").is_file():
        raise click.UsageError(f"{files}: no dit_{NAMES[model]}_f16.npz there; 'conversion' makes such files")
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    waits = []
    with serving(files) as endpoint:
        sound = ("generate", PROMPT, "--model", name, "--seconds", str(seconds), "--steps", str(steps), "--quiet")
        commands = [
            ("get", name, "--accept-licence", "--force", "--quiet"),
            *((*sound, "--seed", str(seed), "--force", "--out", str(work / f"{seed}.wav")) for seed in (1, 2)),
        ]
        for command in commands:
            waits.append(run_command(work, endpoint, *command))
            wait = waits[-1]
            phases = ", ".join(f"{part} {spent:.1f} s" for part, spent in wait.phases.items())
            click.echo(
                f"{wait.command:14} {wait.seconds:7.1f} s  {wait.cpu_seconds:7.1f} s of CPU  "
                f"peak {wait.peak_bytes / 1e6:6.0f} MB  {phases}"
            )
    machine = describe("mlx")
    result = {
        "machine": machine.to_dict(),
        "model": model,
        "weights": "random",
        "seconds": seconds,
        "steps": steps,
        "bytes": sum(path.stat().st_size for path in files.glob("*.npz")),
        "waits": [asdict(wait) for wait in waits],
    }
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / f"first-hour-{model}-{machine.slug()}-{date.today().isoformat()}.json", result)
    click.echo(json.dumps(result))
