"""Plan all trainings at full scale, as ``--dry-run`` does, without their data and models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.speed.full_scale import FULL_SCALE, FullScale, built, settings_of
from sa3_mlx.common.model.config import ModelConfig
from sa3_torch.train.run.planning.device import Device
from sa3_torch.train.run.planning.plan import TrainingPlan, make_plan
from sa3_torch.train.run.stage import MachineConfig


def plan_of(
    case: FullScale, *changes: str, processes: int | None = None, model: ModelConfig | None = None
) -> TrainingPlan:
    """Plan a preset for the GPUs that it names, or so many; ``changes`` are as of ``--set``."""
    with TemporaryDirectory() as folder, built(case, Path(folder), *changes, model=model) as stage:
        config = settings_of(case, *changes)
        machine = config.machine or MachineConfig(device="H200", processes=1)
        device = Device.find(machine.device)
        return make_plan(stage, config.train, processes=processes or machine.processes, device=device, timed=False)


def rows(wanted: tuple[str, ...]) -> Iterator[dict[str, object]]:
    """Yield a row for each preset that is wanted, as STAGE or STAGE/PRESET, or whose stage is; of all for none."""
    for case in FULL_SCALE:
        if wanted and not {case.stage, f"{case.stage}/{case.preset}"} & {*wanted}:
            continue
        plan = plan_of(case)
        yield {
            "preset": case.name,
            "gigabytes": {name: round(value / 1e9, 1) for name, value in vars(plan.memory).items()},
            "step": round(plan.memory.peak / 1e9, 1),
            "validation": round(plan.validation / 1e9, 1),
            "tflop": round(plan.flops / 1e12, 1),
            "steps_per_second": round(1 / plan.seconds, 3),
            "reading_cpu_seconds": None if plan.reading is None else round(plan.reading, 3),
            "loads": {name: round(value, 3) for name, value in plan.loads.items()},
        }


@click.command()
@click.argument("wanted", nargs=-1, metavar="[STAGE|STAGE/PRESET]...")
def plans(wanted: tuple[str, ...]) -> None:
    """Plan the presets for GPUs, or those of some stages: memory, speed, and what breaks first.

    Up to some minutes for each.
    """
    known = {name for case in FULL_SCALE for name in (case.stage, f"{case.stage}/{case.preset}")}
    for name in wanted:
        if name not in known:
            raise click.UsageError(f"{name!r} is no preset for GPUs: there are {', '.join(sorted(known))}")
    found = []
    for row in rows(wanted):
        click.echo(json.dumps(row))
        found.append(row)
    click.echo(json.dumps({"plans": found}))
