"""Disturb a command once, and look: what stood before is whole or the new is whole, and the next run leaves nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import soundfile

from .commands import Command
from .process import Disturbance, Ended, Running, call, run
from .world import World, copy_tree

Kind = Literal["kill-call", "kill", "term", "interrupt", "full", "file-limit", "pipe", "race", "read-only"]
KINDS: dict[Kind, int] = {  # how often of 16 faults
    "kill-call": 4,
    "kill": 2,
    "term": 2,
    "interrupt": 2,
    "full": 2,
    "file-limit": 1,
    "pipe": 1,
    "race": 1,
    "read-only": 1,
}
UNFINISHED = 75  # of a training that was asked to stop; importing it from there would import torch
ALLOWED: dict[Kind, tuple[int, ...]] = {  # exit codes; 0 only where everything is there
    "kill-call": (0, -signal.SIGKILL),
    "kill": (0, -signal.SIGKILL),
    "term": (0, UNFINISHED, -signal.SIGTERM, 143),
    "interrupt": (0, UNFINISHED, 130),
    "full": (0, 2),
    "file-limit": (0, 2),
    "pipe": (0, 2),
    "race": (0, 2),
    "read-only": (2,),
}
_SIGNALS: dict[Kind, signal.Signals] = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
# Seconds until a command hangs: more where more than four others want each core.
LIMIT = 120.0 * max(1.0, os.getloadavg()[0] / (4 * (os.cpu_count() or 1)))
_CHANGING = ("tensorboard",)  # folders whose names and content differ from run to run
Tree = dict[str, str]  # path -> hash, "folder" or the target of a link


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One disturbance of one command, drawn from a seed."""

    command: str
    kind: Kind
    seed: int
    call: int | None = None  # of a killed process: before which writing call; None: drawn


@dataclass(kw_only=True)
class Outcome:
    """What a fault led to: the state of every unit, and what must not be."""

    fault: Fault
    states: list[str] = field(default_factory=list)  # kept, done, unfinished
    problems: list[tuple[str, str]] = field(default_factory=list)  # kind, words
    code: int | None = 0
    seconds: float = 0.0

    def add(self, kind: str, words: str) -> None:
        self.problems.append((kind, " ".join(words.split())[:400]))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a command does when nothing disturbs it."""

    command: Command
    words: tuple[str, ...]
    start: Path  # a copy of the folder before it
    before: Tree
    after: Tree
    changing: frozenset[str]  # files whose content is another one in every run
    seconds: float
    events: int
    bytes: int  # of all files afterwards
    largest: int  # bytes of the largest file


def snapshot(folder: Path) -> Tree:
    """Hash everything below a folder."""
    tree = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part in _CHANGING for part in Path(name).parts):
            continue
        if path.is_symlink():
            tree[name] = f"link to {path.readlink()}"
        else:
            tree[name] = hashlib.sha256(_content(path)).hexdigest() if path.is_file() else "folder"
    return tree


def _content(path: Path) -> bytes:
    """Return the bytes of a file, of an Ogg file its samples: every stream has a number of its own."""
    if path.suffix == ".ogg":
        with suppress(soundfile.LibsndfileError):
            return bytes(soundfile.read(path)[0].tobytes())
    return path.read_bytes()


def make_plan(command: Command, world: World, folder: Path) -> Plan:
    """Run a command twice without a fault. Raises RuntimeError where it does not work."""
    start, work = folder / "start", world.folder / "work"
    start.mkdir(parents=True)
    work.mkdir()
    for words in command.before:
        _succeed(words, work, world)
    copy_tree(work, start)
    trees = []
    for _ in range(2):
        shutil.rmtree(work)
        work.mkdir()
        copy_tree(start, work)
        world.forget()
        ended = _succeed(command.forced, work, world)
        trees.append(snapshot(work))
    sizes = [path.stat().st_size for path in work.rglob("*") if path.is_file()]
    shutil.rmtree(work)
    after, second = trees
    if set(second) != set(after):
        raise RuntimeError(f"{command.name}: other files in every run: {sorted(set(second) ^ set(after))}")
    return Plan(
        command=command,
        words=command.forced,
        start=start,
        before=snapshot(start),
        after=after,
        changing=frozenset(name for name in after if after[name] != second[name] or name in command.timed),
        seconds=ended.seconds,
        events=ended.events,
        bytes=sum(sizes),
        largest=max(sizes, default=0),
    )


def _succeed(words: Sequence[str], work: Path, world: World) -> Ended:
    ended = run(words, work, world.home, limit=LIMIT)
    if ended.code != 0:
        raise RuntimeError(f"{' '.join(words)}: exit {ended.code}: {ended.err[-1000:]}")
    return ended


def disturb(fault: Fault, plan: Plan, world: World, work: Path) -> Outcome:
    """Bring a fault on a command in a fresh folder, look, run the command again, and look again."""
    choose, outcome, inputs = random.Random(fault.seed), Outcome(fault=fault), snapshot(world.inputs)
    world.forget()
    work.mkdir()
    with _place(fault.kind, work) as place:
        copy_tree(plan.start, work)
        place.restrict(choose.uniform(0.0, 1.2) * plan.bytes)
        endings = _run_disturbed(fault, plan, world, work, choose)
        place.free()
        _look(outcome, plan, work, endings)
        _again(outcome, plan, world, work)
    if snapshot(world.inputs) != inputs:
        outcome.add("input changed", "a file that is only read is another one")
    outcome.code, outcome.seconds = endings[0].code, sum(ended.seconds for ended in endings)
    shutil.rmtree(work)
    return outcome


def _run_disturbed(fault: Fault, plan: Plan, world: World, work: Path, choose: random.Random) -> list[Ended]:
    kind, moment = fault.kind, choose.uniform(0.0, 1.1 * plan.seconds)
    if kind == "race":
        first = Running(plan.words, work, world.home, Disturbance())
        time.sleep(choose.choice((0.0, moment)))
        second = Running(plan.words, work, world.home, Disturbance())
        return [first.wait(LIMIT), second.wait(LIMIT)]
    made = Disturbance()
    if kind == "kill-call":
        made = Disturbance(kill_event=fault.call or choose.randint(1, max(1, plan.events)))
    elif kind in _SIGNALS:
        made = Disturbance(signal=_SIGNALS[kind], after=moment)
    elif kind == "file-limit":
        made = Disturbance(file_bytes=choose.randint(0, plan.largest))
    elif kind == "pipe":
        made = Disturbance(read_bytes=choose.choice((0, 1, 40)), stderr_closes=choose.random() < 0.5)
    return [run(plan.words, work, world.home, made, limit=LIMIT)]


class _Place:
    """Hold the folder of a command; this one has always room."""

    def restrict(self, size: float) -> None:
        """Leave so many bytes, or none."""

    def free(self) -> None:
        """Make room, and allow writing."""


class _Disk(_Place):
    """Hold a small disk in memory, which can be full or read-only; only root can mount one."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder, self._kind = folder, kind
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g", "tmpfs", str(folder)], check=True)

    def restrict(self, size: float) -> None:
        used = shutil.disk_usage(self.folder).used
        self._remount("ro" if self._kind == "read-only" else f"size={used + int(size) // 4096 * 4096 + 4096}")

    def free(self) -> None:
        self._remount("rw,size=1g")

    def _remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.folder)], check=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class _Closed(_Place):
    """Hold a folder that its owner may not write to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def restrict(self, size: float) -> None:  # noqa: ARG002 (none at all)
        self.folder.chmod(0o555)

    def free(self) -> None:
        self.folder.chmod(0o755)


@contextmanager
def _place(kind: Kind, work: Path) -> Iterator[_Place]:
    root = os.geteuid() == 0
    if kind == "full" or (kind == "read-only" and root):
        disk = _Disk(work, kind)
        try:
            yield disk
        finally:
            disk.close()
    else:
        yield _Closed(work) if kind == "read-only" else _Place()


def can_mount() -> bool:
    """Tell whether a small disk can be made."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _Disk(Path(folder), "full").close()
        except (OSError, subprocess.CalledProcessError):
            return False
    return True


def _part(tree: Tree, unit: str) -> Tree:
    return {name: value for name, value in tree.items() if name == unit or name.startswith(f"{unit}/")}


def _is_left_over(name: str) -> bool:
    return any(part.startswith(".") and part.endswith((".partial", ".replaced", ".tmp")) for part in Path(name).parts)


def _visible(tree: Tree) -> Tree:
    return {name: value for name, value in tree.items() if not _is_left_over(name)}


def _equal(found: Tree, wanted: Tree, changing: frozenset[str]) -> bool:
    return set(found) == set(wanted) and all(
        found[name] == wanted[name] or (name in changing and found[name] != "folder") for name in wanted
    )


def _can_be_read(path: Path) -> bool:
    """Look at a file whose content is another one in every run."""
    data = path.read_bytes()
    if path.suffix == ".png":
        return data.startswith(b"\x89PNG") and data.endswith(b"IEND\xaeB`\x82")
    if path.suffix == ".json":
        try:
            json.loads(data)
        except ValueError:
            return False
    return bool(data)


def _look(outcome: Outcome, plan: Plan, work: Path, endings: list[Ended]) -> None:
    """Judge the units, exit codes and words of the disturbed command."""
    tree = _visible(snapshot(work))
    outcome.states = [_state(outcome, plan, work, unit, tree) for unit in plan.command.units]
    done = all(state == "done" for state in outcome.states)
    for ended in endings:
        _judge(outcome, ended, plan, done=done)
    if outcome.fault.kind == "race" and not any(ended.code == 0 for ended in endings):
        outcome.add("race", f"neither of two made it: {endings[0].err[-200:]} | {endings[1].err[-200:]}")


def _state(outcome: Outcome, plan: Plan, work: Path, unit: str, tree: Tree) -> str:
    command, before, after = plan.command, _part(plan.before, unit), _part(plan.after, unit)
    found = _part(tree, unit)
    if _equal(found, after, plan.changing):
        if broken := [name for name in found if name in plan.changing and not _can_be_read(work / name)]:
            outcome.add("half-written", f"{', '.join(broken)}: cannot be read")
            return "half-written"
        return "done"
    if found == before:
        return "kept"
    if before and not found:
        outcome.add("lost", f"{unit}: what stood there is gone")
        return "lost"
    finished = command.finished
    if finished is None or call(lambda: finished(work / unit)):
        differing = sorted(n for n in {*found, *after} if found.get(n) != after.get(n) and n not in plan.changing)
        outcome.add("half-written", f"{unit} counts as finished and is not: {', '.join(differing[:6])}")
        return "half-written"
    if before and not command.resumes:
        outcome.add("lost", f"{unit}: what stood there is not whole any more")
        return "lost"
    return "unfinished"


def _judge(outcome: Outcome, ended: Ended, plan: Plan, *, done: bool) -> None:
    kind, err = outcome.fault.kind, ended.err
    if ended.code is None:
        outcome.add("hang", f"more than {LIMIT:g} s")
        return
    for words in ("Traceback (most recent call last)", "Exception ignored", "a defect of sa3", "terminate called"):
        if words in err:
            outcome.add("traceback", err[err.index(words) :][-400:])
            break
    else:
        if ended.code not in ALLOWED[kind] and (ended.code != 0 or plan.command.units):
            outcome.add("exit code", f"{ended.code}: {err[-300:]}")
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("sa3: ")]
    if len(lines) > 1:
        outcome.add("several lines", " | ".join(lines))
    if ended.code == 2 and not lines and kind != "pipe":
        outcome.add("no words", err[-300:])
    named = any(unit.partition("/")[0] in err for unit in (*plan.command.units, "work")) or "sa3: .: " in err
    if (
        ended.code == 2
        and plan.command.units
        and kind in ("full", "file-limit", "read-only")
        and ("Errno" in err or not named)
    ):
        outcome.add("raw words", err[-300:])
    if ended.code == UNFINISHED and "goes on from there" not in ended.out + err:
        outcome.add("no words", err[-300:])
    if ended.code == 0 and not done:
        outcome.add("false success", f"exit 0, but {', '.join(outcome.states)}: {err[-200:]}")


def _again(outcome: Outcome, plan: Plan, world: World, work: Path) -> None:
    """Run the command once more, undisturbed: it succeeds, and nothing is left of the disturbed one."""
    command = plan.command
    done = all(state == "done" for state in outcome.states)
    if not done or command.repeats:
        ended = run(plan.words, work, world.home, limit=LIMIT)
        if ended.code != 0:
            outcome.add("blocked", f"the next run: exit {ended.code}: {ended.err[-300:]}")
            return
    tree = snapshot(work)
    left = [name for name in tree if _is_left_over(name)]
    if left and (not done or command.repeats):
        outcome.add("left-overs", ", ".join(left))
    wrong = [unit for unit in command.units if not _equal(_part(tree, unit), _part(plan.after, unit), plan.changing)]
    if wrong:
        found, wanted = _visible(tree), plan.after
        names = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n) and n not in plan.changing)
        outcome.add("not repaired", f"after the next run {', '.join(wrong)} is another one: {', '.join(names[:6])}")
    left = [name for name in snapshot(world.home) if _is_left_over(name)]
    if left:
        outcome.add("left-overs", f"in the home: {', '.join(left)}")


def as_row(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome for JSON."""
    return {
        **vars(outcome.fault),
        "states": outcome.states,
        "code": outcome.code,
        "seconds": round(outcome.seconds, 3),
        "problems": outcome.problems,
    }
