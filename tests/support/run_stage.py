"""Train stages of the registry in this process, for tests that start several processes or kill one.

python run_stage.py WORKSPACE OUT FOLDER:STAGE[:SETTING...] ...   each job runs in OUT/FOLDER, heeding torchrun's
variables, and leaves its buffers in OUT/FOLDER/rankN.pt.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from sa3_torch.train.run import parallel
from sa3_torch.train.run.stage import Stage
from tests.support.stages import STAGES, GameStage, game_stage, trainer_of, without_pictures


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
