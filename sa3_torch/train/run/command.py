"""The command of a training stage: the options that all have, and a run, or the plan of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from sa3_mlx.common.files.atomic import locked
from sa3_mlx.common.terminal import command, report, say, show

from . import parallel
from .checkpoints import Checkpoints
from .loop import Trainer
from .options import FOLDER
from .planning.device import Device
from .planning.plan import make_plan
from .settings import Belongings, Settings, load_settings, read_settings
from .stage import Stage, StageConfig

UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: asked to stop, and the same command goes on


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Say what a plan is asked for; None: what the preset is for, else this machine and one process."""

    processes: int | None
    device: str | None
    timed: bool


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Say where a run goes, with which settings. ``dry_run``: only its plan is wanted, ``out`` is gone afterwards."""

    out: Path
    preset: str
    changes: tuple[str, ...]
    dry_run: DryRun | None
    trusted: bool  # checkpoints of earlier versions, which hold pickles, are read
    export: int | None  # only the model of this step is wanted, of its checkpoint

    def settings(self, kind: type[Settings], stage: str, *changes: str) -> Settings:
        """Read the settings, with the user's changes and these. Raises ConfigError, naming what is wrong."""
        return load_settings(kind, stage, self.preset, (*self.changes, *changes))

    def train(self, stage: Stage, config: StageConfig, belongings: Belongings) -> bool:
        """Run the stage; return True in the first process. A dry run prints its plan instead, ``export`` writes a
        checkpoint's model; both return False.

        ``belongings`` are what the run must go on with beside its settings; see ``keep_settings``.
        Raises Exit with ``UNFINISHED`` for a run that was asked to stop, and ValueError where the plan does not fit the
        memory.
        """
        if parallel.is_first():
            for remark in stage.remarks():
                say(remark)
        if self.dry_run is not None:
            asked, meant = self.dry_run, config.machine
            device = Device.find(asked.device or (meant.device if meant else None))
            processes = asked.processes or (meant.processes if meant else 1)
            plan = make_plan(stage, config.train, processes=processes, device=device, timed=asked.timed)
            show(str(plan))
            plan.check()
            return False
        trainer = Trainer(stage, config, self.out, belongings, trusted=self.trusted, at=self.export)
        first = parallel.is_first()
        if self.export is not None:
            made = self.out / f"model-{self.export}"
            trainer.export(made)
            parallel.finish()
            if first:
                report_made("model", made)
            return False
        finished = trainer.run()
        parallel.finish()
        if not finished:
            raise click.exceptions.Exit(UNFINISHED)
        return first


def report_made(what: str, made: Path, *then: Path | str) -> None:
    """Print what a finished run made, and the words of the command of ``sa3`` that comes next."""
    report(f"{what}: {made}" + (f"\nnext: {command(*then)}" if then else ""))


class StageCommand(click.Command):
    """Give the function of a command the options of the run as one parameter ``run``, once torchrun's other processes,
    if any, have been joined."""

    def invoke(self, ctx: click.Context) -> Any:
        processes, device, timed = (ctx.params.pop(name) for name in ("processes", "device", "timed"))
        asked = DryRun(processes=processes, device=device, timed=timed)
        before = ctx.parent is not None and ctx.parent.params.get("dry_run", False)  # it may stand before the name too
        wanted = ctx.params.pop("dry_run") or before
        out, threads, export = (ctx.params.pop(name) for name in ("out", "threads", "export"))
        if wanted and export is not None:
            raise click.UsageError("--dry-run plans and --export writes: give one of them", ctx)
        if wanted:
            if "WORLD_SIZE" in os.environ:
                raise click.UsageError("--dry-run plans for several processes by --processes N, without torchrun", ctx)
            out = Path(ctx.with_resource(TemporaryDirectory()))
        elif asked != DryRun(processes=None, device=None, timed=False):
            raise click.UsageError("--processes, --device and --time are only for --dry-run", ctx)
        elif out is None:
            raise click.UsageError("give the folder of the run, --out RUN, or --dry-run", ctx)
        ctx.params["run"] = RunOptions(
            out=out,
            preset=ctx.params.pop("settings"),
            changes=ctx.params.pop("changes"),
            dry_run=asked if wanted else None,
            trusted=ctx.params.pop("trust_run"),
            export=export,
        )
        if threads is not None:
            torch.set_num_threads(threads)
        parallel.start()
        if export is not None:
            Checkpoints(out, 0).check(export)
        elif not wanted and parallel.is_first():
            ctx.with_resource(_own(out))
        return super().invoke(ctx)


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """Keep a run folder from other processes before anything is written to it; an empty one goes again.

    Raises OSError where another process has it, ConfigError for the folder of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        try:
            read_settings(folder)
            yield
        finally:
            with suppress(OSError):  # it holds the run, or what it held before
                folder.rmdir()


def stage_command(name: str, *, preset: str = "first") -> Callable[[Callable[..., None]], StageCommand]:
    """Make a function the command of a stage, with the options of a run; ``preset`` is its default of --settings."""

    def make(function: Callable[..., None]) -> StageCommand:
        made = click.command(name, cls=StageCommand)(function)
        made.params += _run_options(preset)
        return made

    return make


def _run_options(preset: str) -> list[click.Parameter]:
    number = click.IntRange(1)
    return [
        click.Option(["--out"], type=FOLDER, help="Run folder; an unfinished run in it goes on."),
        click.Option(["--settings"], default=preset, show_default=True, help="Preset name or .toml file."),
        click.Option(
            ["--set", "changes"],
            multiple=True,
            metavar="KEY=VALUE",
            help="Change one setting, e.g. train.steps=100.",
        ),
        click.Option(
            ["--trust-run"],
            is_flag=True,
            help="Go on with a run of an earlier version, whose checkpoints can run code: only if it is your own.",
        ),
        click.Option(
            ["--export"],
            type=click.IntRange(0),
            metavar="STEP",
            help="Write the model of the checkpoint of this step to RUN/model-STEP, and train nothing.",
        ),
        click.Option(["--threads"], type=number, help="CPU threads."),
        click.Option(
            ["--dry-run"], is_flag=True, help="Print parameters, memory, data and speed, and start and write nothing."
        ),
        click.Option(["--processes"], type=number, help="Of the dry run. Default: the settings', else 1."),
        click.Option(
            ["--device"], metavar="CHIP", help="Of the dry run, such as H200. Default: the settings', else this one's."
        ),
        click.Option(["--time", "timed"], is_flag=True, help="In the dry run, time a few steps on this machine."),
    ]
