"""Trains stages of the registry in this process, for tests that start several or kill one.

python run_stage.py WORKSPACE OUT NAME[:SETTING...] ...   each stage runs in OUT/NAME; torchrun's variables are heeded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from stages import STAGES, trainer_of

from sa3_torch.train import parallel


def main() -> None:
    torch.set_num_threads(1)
    workspace, out = Path(sys.argv[1]), Path(sys.argv[2])
    parallel.start()
    for job in sys.argv[3:]:
        folder, name, *changes = job.split(":")
        trainer_of(STAGES[name](workspace, *changes), out / folder).run()
    parallel.finish()


if __name__ == "__main__":
    main()
