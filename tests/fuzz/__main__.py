"""Fuzz the readers: ``python -m tests.fuzz --seconds 60 --seed 0``; see docs/records/robustness.md.

Readers run in other processes, which may crash. It prints a table and saves the inputs of findings; the exit code is 1
when there are others than the open ones.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

import click

from .engine import Fuzzer, Result, State
from .known import is_open
from .registry import targets
from .target import ROOT, Case

STALLED_SECONDS = 150  # without a new input: it hangs where no signal interrupts it
_CURRENT = "current.pickle"
_workers: list[subprocess.Popen[bytes]] = []


@click.command()
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Of all targets together.")
@click.option("--each", is_flag=True, help="The seconds are those of each target.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--only", multiple=True, metavar="NAME", help="Fuzz this target; can be repeated.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True)
@click.option("--state", type=click.Path(path_type=Path), help="Folder: go on with what runs before left there.")
@click.option("--save", type=click.Path(path_type=Path), help="Folder for findings. Default: a temporary one.")
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Write the table as JSON.")
@click.option("--replay", type=click.Path(path_type=Path, exists=True), help="Read the input of a saved finding again.")
@click.option("--worker", type=click.Path(path_type=Path), hidden=True)
def main(
    seconds: float,
    each: bool,
    seed: int,
    only: tuple[str, ...],
    jobs: int,
    state: Path | None,
    save: Path | None,
    as_json: Path | None,
    replay: Path | None,
    worker: Path | None,
) -> None:
    """Damage the inputs of readers and see what they do."""
    if replay is not None:
        _replay(replay)
        return
    if worker is not None:
        assert state is not None
        _work(worker, only, seed, state)
        return
    known = targets()
    if wrong := set(only) - set(known):
        raise click.UsageError(f"no target {', '.join(sorted(wrong))}; targets: {', '.join(known)}")
    signal.signal(signal.SIGTERM, _stop)
    names = [name for name in known if not only or name in only]
    share = seconds if each else seconds * jobs / len(names)
    with _folder() as folder, ThreadPoolExecutor(jobs) as pool:
        kept = state or folder / "state"
        kept.mkdir(parents=True, exist_ok=True)
        for _ in pool.map(lambda number: _fuzz(names[number::jobs], seed, share, kept), range(jobs)):
            pass
        results = [State.load(kept / f"{name}.json", name).result for name in names]
    _print(results)
    _save(results, save or Path(tempfile.gettempdir()) / "sa3-fuzz")
    if as_json is not None:
        rows = [vars(result) | {"findings": sorted(result.findings)} for result in results]
        as_json.write_text(json.dumps(rows, indent=1) + "\n")
    new = [f for result in results for f in result.findings.values() if not is_open(result.target, f.kind)]
    sys.exit(1 if new else 0)


def _stop(_number: int, _frame: FrameType | None) -> NoReturn:
    """End the workers, so that their folders go, and this process."""
    for process in _workers:
        process.kill()
    _workers.clear()
    raise click.Abort


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield a temporary folder, in memory where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def _fuzz(names: list[str], seed: int, seconds: float, state: Path) -> None:
    """Fuzz targets one after the other in a process; where it crashes, another one goes on with other inputs."""
    ends = {name: State.load(state / f"{name}.json", name).result.seconds + seconds for name in names}
    while True:
        found = {name: State.load(state / f"{name}.json", name) for name in names}
        left = {name: end - found[name].result.seconds for name, end in ends.items()}
        arguments = [word for name in names if left[name] > 0 for word in ("--only", f"{name}={left[name]}")]
        if not arguments:
            return
        with _folder() as folder:
            started, current = time.time(), folder / _CURRENT
            with (folder / "output.txt").open("wb") as output:
                command = [sys.executable, "-m", "tests.fuzz", "--worker", folder, "--state", state.resolve()]
                process = subprocess.Popen(
                    [*command, "--seed", str(seed), *arguments], cwd=ROOT, stdout=output, stderr=output
                )
                _workers.append(process)
                stalled = _watch(process, current)
            if process not in _workers:
                return
            if process.returncode == 0:
                continue
            words = (folder / "output.txt").read_text(errors="replace").strip()
            if process.returncode > 0 or not current.is_file():
                raise click.ClickException(f"fuzzing itself failed: {words[-2000:]}")
            name, case = pickle.loads(current.read_bytes())
            path = state / f"{name}.json"
            crashed = State.load(path, name)
            saved = path.stat().st_mtime if path.is_file() else 0
            end = "hangs" if stalled else signal.Signals(-process.returncode).name
            crashed.result.note(f"{end} in the process", case, words[-300:])
            crashed.result.rounds += 1  # the next one draws other inputs
            crashed.result.seconds += time.time() - max(saved, started)
            crashed.save(path)


def _watch(process: subprocess.Popen[bytes], current: Path) -> bool:
    """Wait for a process; kill it, and return True, when it makes no progress."""
    while True:
        try:
            process.wait(timeout=5)
            return False
        except subprocess.TimeoutExpired:
            if current.is_file() and time.time() - current.stat().st_mtime > STALLED_SECONDS:
                process.kill()
                process.wait()
                return True


def _work(folder: Path, jobs: tuple[str, ...], seed: int, state: Path) -> None:
    """Be that process: fuzz targets, given as NAME=SECONDS, and keep what each of them gives in its state."""
    for job in jobs:
        name, _, seconds = job.partition("=")
        path = state / f"{name}.json"
        (folder / name).mkdir()
        fuzzer = Fuzzer(
            targets()[name],
            folder / name,
            State.load(path, name),
            watch=partial(_tell, folder / _CURRENT, name),
            keep=lambda found, path=path: found.save(path),  # type: ignore[misc]
        )
        fuzzer.run(seed=seed, seconds=float(seconds))
        shutil.rmtree(folder / name)


def _tell(current: Path, name: str, case: Case) -> None:
    current.write_bytes(pickle.dumps((name, case)))


def _print(results: list[Result]) -> None:
    click.echo(f"{'target':<18}{'examples':>10}{'seconds':>9}{'of CPU':>8}{'corpus':>8}{'lines':>12}  findings")
    for result in results:
        lines = f"{result.lines}/{result.of_lines}"
        numbers = f"{result.examples:>10}{result.seconds:>9.0f}{result.processor:>8.0f}{result.corpus:>8}{lines:>12}"
        click.echo(f"{result.target:<18}{numbers}  {len(result.findings) or ''}")
    for result in results:
        for finding in sorted(result.findings.values(), key=lambda finding: -finding.count):
            mark = "open" if is_open(result.target, finding.kind) else "NEW "
            click.echo(f"{mark} {result.target}: {finding.signature} ({finding.count}x; {ascii(finding.detail)[:200]})")


def _save(results: list[Result], folder: Path) -> None:
    count = 0
    for result in results:
        for number, finding in enumerate(result.findings.values()):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{result.target}-{number}.json"
            path.write_text(json.dumps({"target": result.target, **finding.to_dict()}) + "\n")
            count += 1
    if count:
        click.echo(f"{count} inputs: {folder}; --replay FILE reads one again")


def _replay(path: Path) -> None:
    """Read the input of a finding without limits, so that an error shows its traceback."""
    from .target import Given, place

    data = json.loads(path.read_text())
    target, case = targets()[data["target"]], Case.from_dict(data)
    folder = Path(tempfile.mkdtemp())
    try:
        target.make(folder)
        place(folder, case)
        click.echo(f"{target.name}, {case.file} ({case.form}): {data['signature']}")
        click.echo(repr(target.read(Given(folder, case.file))))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
