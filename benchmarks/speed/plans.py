"""Plan all trainings at full scale, as ``--dry-run`` does, without their data and models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.speed.without_values import FULL_SCALE, FullScale, built
from sa3_torch.train.run.planning.device import Device
from sa3_torch.train.run.planning.plan import TrainingPlan, make_plan
from sa3_torch.train.run.stage import StageConfig


def plan_of(case: FullScale, *changes: str) -> TrainingPlan:
    """Plan a preset for the GPUs that it names; ``changes`` are as of ``--set``."""
    with TemporaryDirectory() as folder, built(case, Path(folder), *changes) as stage:
        config: StageConfig = stage.config  # type: ignore[attr-defined]
        assert config.machine is not None, f"{case.name} names no machine"
        device = Device.find(config.machine.device)
        return make_plan(stage, config.train, processes=config.machine.processes, device=device, timed=False)


def rows(wanted: tuple[str, ...]) -> Iterator[dict[str, object]]:
    """Yield a row for each preset whose stage is among those wanted; of all for none."""
    for case in FULL_SCALE:
        if wanted and case.stage not in wanted:
            continue
        plan = plan_of(case)
        yield {
            "preset": case.name,
            "gigabytes": {name: round(value / 1e9, 1) for name, value in vars(plan.memory).items()},
            "step": round(plan.memory.peak / 1e9, 1),
            "validation": round(plan.validation / 1e9, 1),
            "tflop": round(plan.flops / 1e12, 1),
            "steps_per_second": round(1 / plan.seconds, 3),
            "loads": {name: round(value, 3) for name, value in plan.loads.items()},
        }


@click.command()
@click.argument("stage", nargs=-1)
def plans(stage: tuple[str, ...]) -> None:
    """Plan the presets for GPUs of these stages, or of all: memory, speed, and what breaks first.

    Up to some minutes for each.
    """
    found = []
    for row in rows(stage):
        click.echo(json.dumps(row))
        found.append(row)
    click.echo(json.dumps({"plans": found}))
