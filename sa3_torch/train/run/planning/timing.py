"""How long a step takes in each precision; small networks are faster in fp32 on many CPUs [T0.3]."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from tqdm import tqdm

from sa3_torch.train.run import parallel
from sa3_torch.train.run.stage import Stage

TIMED_STEPS = 5


def time_precisions(stage: Stage) -> dict[str, float]:
    """Return seconds of forward and backward of the first step, the mean over five and over processes, by precision.

    Leaves weights and buffers as they were, and no gradients.
    """
    networks = [group.network for group in stage.groups.values()]
    buffers = [(buffer, buffer.clone()) for network in networks for buffer in network.buffers()]
    seconds = {}
    for stage.precision in ("fp32", "bf16"):
        _step(stage)  # compiles and warms up
        begun = time.perf_counter()
        for _ in watched(range(TIMED_STEPS), f"time {stage.precision}"):
            _step(stage)
        own = torch.tensor((time.perf_counter() - begun) / TIMED_STEPS, device=stage.device)
        seconds[stage.precision] = float(parallel.mean(own))
        for buffer, kept in buffers:
            buffer.copy_(kept)
    return seconds


def watched(steps: range, name: str) -> Iterable[int]:
    """Go through steps that are timed, with a bar, which appears after a second, on the terminal of the first process.

    What it costs lies far below what a step takes.
    """
    hidden = None if parallel.is_first() else True  # None: where there is no terminal
    return tqdm(steps, desc=name, unit="step", disable=hidden, delay=1, leave=False)


def _step(stage: Stage) -> None:
    terms = stage.losses(0)
    torch.stack(list(terms.values())).sum().backward()
    for group in stage.groups.values():
        group.network.zero_grad(set_to_none=True)
    float(sum(value.detach() for value in terms.values()))  # waits for a GPU
