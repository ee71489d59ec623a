"""Time the ways that a model can go on this machine and keep the fastest: ``sa3 tune``."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime
from functools import partial

import click

from sa3_mlx.cli import backend
from sa3_mlx.cli.backend import DEVICES
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.typed import Parsed, TypedCommand
from sa3_mlx.common.installed import Model
from sa3_mlx.common.memory.activations import same_activations
from sa3_mlx.common.memory.metal import Metal
from sa3_mlx.common.memory.prediction import size_text
from sa3_mlx.common.model.chunks import chunk_plan
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import samples_to_frames, seconds_to_samples
from sa3_mlx.common.schema import quoted
from sa3_mlx.common.terminal import report, say, show
from sa3_mlx.common.tuning import machine
from sa3_mlx.common.tuning.choice import Choice, Kind
from sa3_mlx.common.tuning.chunk import CHUNKS, FACTORS, chunk_frames
from sa3_mlx.common.tuning.search import Search, Trial
from sa3_mlx.common.tuning.table import Key, Tuning, forget, key_of, save, table_file
from sa3_mlx.common.version import version

from .bench import PipelineBench, Subject

_BUDGET = 75.0  # seconds
_FEWEST, _MOST = 5, 21  # times that a way is timed
_SECONDS = 30.0  # of the clip
_CHUNK_SHARE = 8  # a chunk may take this part of the machine's memory


def parse_way(text: str) -> tuple[str, str]:
    """Read "PLACE=WAY". Raises ValueError."""
    place, equals, way = text.partition("=")
    if not equals:
        raise ValueError(f"{quoted(text)}: expected PLACE=WAY, such as those that --dry-run lists")
    return place, way


@click.command(cls=TypedCommand)
@click.argument("model", required=False, metavar="[NAME|PATH]")
@click.option("--backend", "wanted", type=click.Choice(["auto", "mlx", "torch"]), default="auto", show_default=True)
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True, help="Of PyTorch.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="Of the clip. Default: at most 30.")
@click.option(
    "--allow",
    multiple=True,
    metavar="PLACE=WAY",
    type=Parsed(parse_way),
    help="Try a way that is less exact, or slow at first; can be repeated.",
)
@click.option("--only", multiple=True, metavar="PLACE", help="Leave all other places as they are; can be repeated.")
@click.option("--rounds", type=click.IntRange(1), help=f"Time every way so often. Default: {_FEWEST} to {_MOST} times.")
@click.option("--cpu-time", is_flag=True, help="On a CPU that others use too: time the CPU seconds of this process.")
@click.option("--dry-run", is_flag=True, help="List what would be timed.")
@click.option("--forget", "forgets", is_flag=True, help="Remove what was tuned: of the model, or everything.")
def tune(
    model: str | None,
    wanted: str,
    device: str,
    seconds: float | None,
    allow: tuple[tuple[str, str], ...],
    only: tuple[str, ...],
    rounds: int | None,
    cpu_time: bool,
    dry_run: bool,
    forgets: bool,
) -> None:
    """Time every way that the model can go on this machine, in one to two minutes, and keep the fastest.

    A way is compared with the plain form first, and kept where it is right and faster by more than the spread of the
    measurement. What is kept is used from then on for models of this size, until the chip, the system or the version of
    the framework is another; 'sa3 doctor' shows it.
    """
    if forgets and dry_run:
        raise click.UsageError("--forget and --dry-run: give one of them")
    if forgets:
        found = None if model is None else find_model(model, generates=False).config
        show(f"{forget(found)} tuning(s) removed from {table_file()}")
        return
    chosen = find_model(model, generates=False)
    length, twin = _clip_seconds(chosen, seconds), backend.choose(wanted, device)
    subject = Subject(twin=twin, device=device, folder=str(chosen.folder), seconds=length)
    bench = PipelineBench(subject, time.process_time if cpu_time else time.perf_counter)
    search = Search(
        bench.pipeline.choices,
        bench,
        allowed=dict(allow),
        only=only,
        impossible=partial(_impossible, config=chosen.config, seconds=length, metal=backend.metal(twin)),
        report=_line,
    )
    _check_clock(search.choices.kind, cpu_time=cpu_time)
    count = len(search.places())
    where = bench.pipeline.device_name
    show(f"{chosen.label} on {twin}, {where}, a clip of {length:.4g} s: {count} places with several ways")
    if dry_run:
        _list(search)
    else:
        _search(search, key_of(twin, where, chosen.config), chosen.config.name, rounds)


def _check_clock(kind: Kind, *, cpu_time: bool) -> None:
    """Refuse CPU seconds of a GPU, and say where others use the machine. Raises ValueError."""
    if cpu_time and kind == "gpu":
        raise ValueError("--cpu-time says nothing about a GPU; leave it out")
    load = os.getloadavg()[0]
    if not cpu_time and load > machine.cores() / 2:
        hint = "" if kind == "gpu" else "; --cpu-time minds them less"
        say(f"note: other programs are running here (load {load:.1f}), so the times mean little{hint}")


def _clip_seconds(model: Model, asked: float | None) -> float:
    """Return the length of the clip. Raises ValueError for one that the model cannot make."""
    longest = model.config.max_seconds or _SECONDS
    if asked is not None and asked > longest and model.config.diffusion is not None:
        raise ValueError(f"--seconds is {asked:g}: {model.name} makes at most {longest:.2f}")
    return min(longest, _SECONDS) if asked is None else asked


def _list(search: Search) -> None:
    """Show what would be timed, and what would have to be asked for."""
    for place, ways, works in search.places():
        show(f"{place.name:<20} {' '.join(works):<18} {', '.join(ways)}  ({place.about})")
    for name, way in search.not_asked():
        show(f"only with --allow {name}={way}  ({search.choices.place(name).about})")


def _search(search: Search, key: Key, model: str, rounds: int | None) -> None:
    """Time everything, save what is fastest, and show how it did."""
    begin, places = time.monotonic(), len(search.places())
    found = search.run(rounds=lambda round_seconds: rounds or _rounds(round_seconds, places + 1))
    tuning = Tuning(
        key=key,
        model=model,
        date=datetime.now(UTC).date().isoformat(),
        sa3=version(),
        ways=dict(found.ways),
        environment=dict(found.environment),
        before=found.before.median,
        after=found.after.median,
    )
    path = save(tuning)
    show(f"clip   {found.before.text()} in the usual ways")
    if found.ways or found.environment:
        sure = "" if found.after.beats(found.before) else ", which is within the spread"
        show(f"clip   {found.after.text()} tuned: {found.before.median / found.after.median:.2f} times as fast{sure}")
    report(f"kept   {tuning.text()}")
    report(f"file   {path}  ({time.monotonic() - begin:.0f} s; 'sa3 tune --forget' removes it)")


def _rounds(round_seconds: float, places: int) -> int:
    """Return how often all ways of one of the places can be run in its share of the time."""
    return min(_MOST, max(_FEWEST, int(_BUDGET / places / max(round_seconds, 1e-6))))


def _line(trial: Trial) -> None:
    """Show how one way did, as soon as it is known."""
    time_text = "" if trial.times is None else trial.times.text()
    error = "" if trial.error is None else f"error {trial.error:.0e}" if trial.error else "same bits"
    show(f"{trial.place:<20} {trial.way:<12} {time_text:<30} {error:<12} {trial.verdict}".rstrip())


def _impossible(place: Choice, way: str, *, config: ModelConfig, seconds: float, metal: Metal | None) -> str | None:
    """Say why a way cannot be tried with this model, this clip and this memory; None where it can."""
    if place.name != CHUNKS or way not in FACTORS:
        return None
    same, samples = config.same, seconds_to_samples(seconds, config.sample_rate)
    frames, size = samples_to_frames(samples, same), chunk_frames(way, same, "decode")
    plans = [chunk_plan(frames, chunk_frames(each, same, "decode"), same, "decode") for each in (way, "usual")]
    if plans[0] == plans[1]:
        return f"the clip has {frames} frames, and the chunks are the usual ones"
    needed, most = same_activations(size, config, "decode", metal), machine.memory() // _CHUNK_SHARE
    return f"it may take {size_text(needed)}, more than {size_text(most)}" if needed > most else None
