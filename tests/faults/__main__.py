"""Run a fault campaign: ``python -m tests.faults --faults 500 --seed 0``; see docs/records/robustness.md.

Commands that write are killed, interrupted, short of disk, without a reader, raced and refused, one fault after the
other. It prints a table; the exit code is 1 when there are problems that are not among the open ones.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

for _library in ("OMP", "OPENBLAS"):  # before any of them is loaded: threads would not survive the split of a process
    os.environ[f"{_library}_NUM_THREADS"] = "1"

import click

from .campaign import KINDS, Fault, Kind, Plan, as_row, can_mount, disturb, make_plan
from .commands import COMMANDS, Command
from .known import is_open
from .preload import has_torch, preload
from .process import call
from .world import World, make_inference_world, make_training_world

COLUMNS = ("kept", "done", "unfinished", "lost", "half-written", "left-overs", "blocked", "traceback")


@click.command()
@click.option("--faults", type=click.IntRange(1), default=500, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--only", multiple=True, metavar="COMMAND", help="Such as 'lora merge'; can be repeated.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="Can be repeated.")
@click.option("--every-call", is_flag=True, help="Instead of drawn faults: kill before every call that writes.")
@click.option("--jobs", type=click.IntRange(1), default=2, show_default=True)
@click.option("--json", "as_json", type=click.Path(path_type=Path), help="Write every fault and the table.")
def main(
    faults: int,
    seed: int,
    only: tuple[str, ...],
    kinds: tuple[Kind, ...],
    every_call: bool,
    jobs: int,
    as_json: Path | None,
) -> None:
    """Disturb commands and see what is lost."""
    if wrong := set(only) - set(COMMANDS):
        raise click.UsageError(f"no command {', '.join(sorted(wrong))}; commands: {', '.join(COMMANDS)}")
    commands = [command for command in COMMANDS.values() if not only or command.name in only]
    if not has_torch():
        commands = [command for command in commands if not command.needs_torch]
    training = any(command.needs_torch for command in commands)
    preload(training=training)
    with _folder() as folder:
        world = World(folder / "world")
        _make(world, training=training)
        plans = {command.name: make_plan(command, world, folder / "plans" / command.name) for command in commands}
        chosen = every(plans) if every_call else draw(commands, faults, seed, kinds or tuple(KINDS))
        rows = _run(chosen, plans, world, folder, jobs)
    table = summarise(rows)
    _print(rows, table)
    if as_json is not None:
        as_json.write_text(
            json.dumps({"faults": len(rows), "seed": seed, "table": table, "rows": rows}, indent=1) + "\n"
        )
    sys.exit(1 if any(not is_open(row["command"], kind) for row in rows for kind, _ in row["problems"]) else 0)


def draw(commands: Sequence[Command], count: int, seed: int, kinds: Sequence[Kind]) -> list[Fault]:
    """Draw faults: every command in turn, kinds as often as ``KINDS`` says."""
    choose = random.Random(seed)
    mounts = can_mount()
    allowed = [kind for kind in kinds if (kind != "full" or mounts) and (kind != "read-only" or mounts or os.geteuid())]
    deck: list[Kind] = []
    faults = []
    for number in range(count):
        if not deck:
            deck = [kind for kind in allowed for _ in range(KINDS[kind])]
            choose.shuffle(deck)
        command = commands[number % len(commands)]
        faults.append(Fault(command=command.name, kind=deck.pop(), seed=choose.getrandbits(32)))
    return faults


def every(plans: dict[str, Plan]) -> list[Fault]:
    """List a kill before every writing call of every command."""
    return [
        Fault(command=name, kind="kill-call", seed=0, call=call)
        for name, plan in plans.items()
        for call in range(1, plan.events + 1)
    ]


@contextmanager
def _folder() -> Iterator[Path]:
    """Yield a temporary folder, in memory where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as name:
        yield Path(name)


def _make(world: World, *, training: bool) -> None:
    world.folder.mkdir()
    makers = (make_inference_world, make_training_world) if training else (make_inference_world,)
    for make in makers:
        if not call(lambda: make(world) is None):  # noqa: B023 (it is called now)
            raise click.ClickException("what the commands read could not be made")


def _run(faults: list[Fault], plans: dict[str, Plan], world: World, folder: Path, jobs: int) -> list[dict[str, Any]]:
    """Bring on the faults in several processes, each in a world of its own."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the temporary folder goes
    children = {}
    for number in range(jobs):
        pid = os.fork()
        if pid == 0:
            _work(faults[number::jobs], plans, world.twin(folder / f"world-{number}"), folder / f"{number}.jsonl")
        children[pid] = number
    codes = [os.waitpid(pid, 0)[1] for pid in children]
    if any(codes):
        raise click.ClickException("the campaign itself failed; its traceback is above")
    lines = [line for number in range(jobs) for line in (folder / f"{number}.jsonl").read_text().splitlines()]
    return [json.loads(line) for line in lines]


def _work(faults: list[Fault], plans: dict[str, Plan], world: World, path: Path) -> None:
    code = 1
    try:
        with path.open("w") as file:
            for number, fault in enumerate(faults):
                outcome = disturb(fault, plans[fault.command], world, world.folder / "work")
                file.write(json.dumps(as_row(outcome)) + "\n")
                file.flush()
                where = f"{fault.command}, {fault.kind}, seed {fault.seed}, call {fault.call}"
                for kind, words in outcome.problems:
                    print(f"[{number}] {where}: {kind}: {words}", flush=True)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def summarise(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Count per command: faults, states of units, and faults with a problem, by its kind."""
    table: dict[str, dict[str, int]] = {}
    for row in rows:
        counts = Counter(table.get(row["command"], {}))
        counts["faults"] += 1
        counts.update(state for state in set(row["states"]) if state in ("kept", "done", "unfinished"))
        counts.update({kind for kind, _ in row["problems"]})
        table[row["command"]] = dict(counts)
    return table


def _print(rows: list[dict[str, Any]], table: dict[str, dict[str, int]]) -> None:
    click.echo(f"{'command':<22}{'faults':>8}" + "".join(f"{name:>13}" for name in COLUMNS) + "  others")
    names = [name for name in COMMANDS if name in table]
    total: Counter[str] = Counter()
    for name in names:
        total.update(table[name])
        click.echo(_line(name, table[name]))
    click.echo(_line("all", total))
    click.echo(f"{sum(row['seconds'] for row in rows):.0f} s of disturbed commands")


def _line(name: str, counts: dict[str, int]) -> str:
    others = [f"{kind} {count}" for kind, count in counts.items() if kind not in ("faults", *COLUMNS)]
    return (
        f"{name:<22}{counts['faults']:>8}"
        + "".join(f"{counts.get(column, 0) or '-':>13}" for column in COLUMNS)
        + (f"  {', '.join(others)}" if others else "")
    )


if __name__ == "__main__":
    main()
