"""Train stages of the registry in this process, for tests that start several processes or kill one.

python run_stage.py WORKSPACE OUT FOLDER:STAGE[:SETTING...] ...   each job runs in OUT/FOLDER, heeding torchrun's
variables, and leaves its buffers in OUT/FOLDER/rankN.pt.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from sa3_torch.train.run import parallel
from sa3_torch.train.run.checkpoints import Tensors
from sa3_torch.train.run.stage import Stage
from tests.support.stages import STAGES, GameStage, game_stage, trainer_of, without_pictures

SCRIPT = Path(__file__).resolve()


def command(workspace: Path, out: Path, *jobs: str) -> list[str]:
    """Return the words that start this script."""
    return [sys.executable, str(SCRIPT), str(workspace), str(out), *jobs]


def environment() -> dict[str, str]:
    """Return variables for processes that run this script."""
    return {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_until(name: str, workspace: Path, folder: Path, stop_at: int, *changes: str) -> None:
    """Run a stage in this process, and ask it to stop in a step."""
    stage = STAGES[name](workspace, *changes)
    trainer = trainer_of(stage, folder)
    inner = stage.losses

    def losses(step: int) -> dict[str, Tensor]:
        trainer.asked = step == stop_at
        return inner(step)

    stage.losses = losses  # type: ignore[method-assign]
    assert not trainer.run()


def flat(tensors: Tensors, table: str) -> Tensor:
    """Return all of a table as one vector."""
    return torch.cat([tensor.double().flatten() for tensor in tensors[table].values()])


def crash_stage(workspace: Path, *changes: str) -> GameStage:
    """Make a stage whose second process fails in step 2."""
    stage = game_stage(workspace, *changes)
    inner = stage.losses

    def losses(step: int) -> dict[str, Tensor]:
        if step == 2 and parallel.own_slice().rank == 1:
            raise OSError("disk on fire")
        return inner(step)

    stage.losses = losses  # type: ignore[method-assign]
    return stage


def slow_stage(workspace: Path, *changes: str) -> GameStage:
    """Make a stage that leaves time to be stopped."""
    stage = game_stage(workspace, *changes)
    inner = stage.losses

    def losses(step: int) -> dict[str, Tensor]:
        time.sleep(0.02)
        return inner(step)

    stage.losses = losses  # type: ignore[method-assign]
    return stage


def buffers(stage: Stage) -> dict[str, Tensor]:
    """Copy the buffers of all groups."""
    return {
        f"{name}.{path}": buffer.clone()
        for name, group in stage.groups.items()
        for path, buffer in group.network.named_buffers()
    }


def main() -> None:
    torch.set_num_threads(1)
    workspace, out = Path(sys.argv[1]), Path(sys.argv[2])
    parallel.start()
    with without_pictures():
        for job in sys.argv[3:]:
            folder, name, *changes = job.split(":")
            stage = {**STAGES, "crash": crash_stage, "slow": slow_stage}[name](workspace, *changes)
            trainer_of(stage, out / folder).run()
            torch.save(buffers(stage), out / folder / f"rank{parallel.own_slice().rank}.pt")
    parallel.finish()


if __name__ == "__main__":
    main()
