"""What a training takes, known before it begins: parameters, memory of a process, data, speed (``--dry-run``).

Memory is arithmetic: weights, gradients, the optimiser's state and the average are counted in bytes of the stage's own
tensors, activations from its own step (count.py), and what several processes add by the rules of DDP and FSDP2; so is a
forward pass without gradients, beside averages that are swapped in, which is what validation takes. Python, libraries,
data in memory, the decoding of demos and the copy of a checkpoint that is being written (of weights, average and
optimiser, on the host) are not in it. Measured on a CPU, demo stages: peak resident memory of steps
within 0.5 % where the allocator returns what is freed (MALLOC_MMAP_THRESHOLD_=65536); the heap of glibc as it comes
keeps 7 to 14 % more, with checkpointed blocks up to 2.5 times. Speed is modelled from the step's arithmetic and a
chip's nominal rate, or timed on this machine.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import nn

from sa3_mlx.common.memory.prediction import MARGIN, size_text
from sa3_torch.train.run import parallel
from sa3_torch.train.run.blocks import work_by_blocks
from sa3_torch.train.run.optimizers import Ema, Trained, make_optimizer, take_turn
from sa3_torch.train.run.parallel import UNITS, BatchSlice
from sa3_torch.train.run.stage import Split, Stage, TrainConfig

from .count import StepCount, count_forward, count_step, make_fake, networks_of, run_slice, trained_of
from .device import Device
from .timing import time_precisions, watched

UTILISATION = 0.4  # of the nominal rate; what good training programs reach on large networks
WINDOW = 64  # steps that are looked at for how often each group takes its turn
LATE = 0.75  # of the run: by then every term is switched on
TIMED_STEPS = 3
READ = 10**6  # a step that is not counted, whose data are read to time that


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Hold the bytes of one process at the worst moment of a step."""

    weights: int  # of networks that are trained
    gradients: int
    optimizer: int
    average: int
    frozen: int  # other networks
    exchange: int  # buffers of DDP, gathered units of FSDP2
    activations: int

    @property
    def peak(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Hold what a training takes. ``parameters``: name of the network -> trained and frozen ones."""

    stage: str
    train: TrainConfig
    processes: int
    parameters: dict[str, tuple[int, int]]
    memory: Memory
    device: Device
    data: tuple[Split, ...]
    flops: float  # of a step of one process
    precision: str
    timed: float | None  # seconds of a step
    validation: int  # bytes of one process while it measures
    reading: float | None  # CPU-seconds of one process to read the data of a step, timed on this machine

    @property
    def peak(self) -> int:
        """Return the bytes of one process at the worst moment of the run."""
        return max(self.memory.peak, self.validation)

    @property
    def loads(self) -> dict[str, float]:
        """Return how near each of what may break a run is to its limit, which is 1."""
        found = {"memory of a step": self.memory.peak / self.room, "memory of validation": self.validation / self.room}
        if self.reading is not None:  # by one thread beside the step
            found["reading of data"] = self.reading / self.seconds
        return found

    @property
    def seconds(self) -> float:
        """Return those of a step."""
        if self.timed is not None:
            return self.timed
        return self.flops / self.device.rates[self.precision] / (UTILISATION if self.device.nominal else 1)

    @property
    def room(self) -> int:
        """Return the bytes for a process: every one has a GPU of its own, or its share of the machine."""
        return int(self.device.memory / (1 if self.device.gpu else self.processes))

    def check(self) -> None:
        """Raises ValueError where memory does not suffice."""
        if self.peak * MARGIN > self.room:
            raise ValueError(
                f"memory: a process of {self.stage} needs {size_text(self.peak)}, with {MARGIN - 1:.0%} to "
                f"spare more than the {size_text(self.room)} that {self.device.name} has for it; try "
                "train.checkpoint_blocks=true, a larger train.accumulate, more processes or train.parallel=fsdp"
            )

    def __str__(self) -> str:
        train, memory = self.train, self.memory
        trained, frozen = (sum(counts[i] for counts in self.parameters.values()) for i in (0, 1))
        lines = [f"{self.stage}: {_count(trained)} parameters trained, {_count(frozen)} frozen"]
        for name, (own, others) in self.parameters.items():
            lines.append(f"  {name:24} {_count(own):>9} trained {_count(others):>9} frozen")
        micro = train.batch // self.processes // train.accumulate
        how = f", {train.parallel}" if self.processes > 1 else ""
        lines.append(
            f"batch {train.batch}: {self.processes} process(es) x {train.accumulate} micro-batch(es) of {micro}, "
            f"{self.precision}{how}"
        )
        lines.append("memory of a process, without Python, libraries and data")
        lines += [f"  {name:24} {size_text(value):>9}" for name, value in vars(memory).items() if value]
        lines.append(f"  {'in all':24} {size_text(memory.peak):>9} of {size_text(self.room)}")
        lines.append(f"  {'while it validates':24} {size_text(self.validation):>9}")
        lines.append("data" if self.data else "data: this stage does not say")
        lines += [
            f"  {split.name:24} {split.items:9,} items, {'' if split.seconds is None else _time(split.seconds)}".rstrip(
                ", "
            )
            for split in self.data
        ]
        if self.reading is None:
            lines.append("  all in memory, nothing is read in a step")
        else:
            lines.append(f"  {self.reading:.3g} CPU-seconds a step and process, timed on this machine")
        return "\n".join([*lines, *self._speed(), "nothing was started or written"])

    def _speed(self) -> list[str]:
        total = _time(self.seconds * self.train.steps)
        if self.timed is not None:
            how = f"timed with {self.device.name}, one process"
        elif self.device.nominal:
            rate = self.device.rates[self.precision] / 1e12
            how = (
                f"modelled: {UTILISATION:.0%} of the nominal {rate:.0f} TFLOPS of {self.device.name}, without exchange"
            )
        else:
            rate = self.device.rates[self.precision] / 1e9
            how = f"modelled: at most, at the {rate:.0f} GFLOPS of a plain product measured on {self.device.name}"
        return [
            f"speed: {self.flops / 1e12:.3g} TFLOP a step, {1 / self.seconds:.3g} steps/s, {total} for "
            f"{self.train.steps:,} steps",
            f"  ({how})",
            f"first to break: {max(self.loads, key=self.loads.__getitem__)}, at {max(self.loads.values()):.0%} of what "
            "there is",
        ]


def make_plan(stage: Stage, train: TrainConfig, *, processes: int, device: Device, timed: bool) -> TrainingPlan:
    """Plan the run of a new stage, which is of no use afterwards: its weights lose their values.

    Raises ConfigError where the batch cannot be cut into equal parts, or blocks cannot be compiled.
    """
    slices = BatchSlice(world=processes).micro_batches(train.accumulate)
    slices[0].rows(train.batch)
    sharded = processes > 1 and train.parallel == "fsdp"
    for group in stage.groups.values():
        work_by_blocks(group.network, compiled=train.compile, checkpointed=train.checkpoint_blocks, sharded=sharded)
    stage.precision = "fp32" if train.precision == "auto" else train.precision
    turns = _turns(stage, train.steps)
    seconds = _time_steps(stage, train, turns, slices) if timed else None
    reading = _time_reading(stage, train, slices[0])
    networks = networks_of(stage)
    make_fake(networks)
    trained = trained_of(stage)
    average = list(Ema(stage.model, trained, decay=0, after=0, every=1).state.values())
    memory = _constant_memory(stage, trained, networks, sum(tensor.nbytes for tensor in average))
    with parallel.planned(processes):
        first = count_step(stage, trained, 0, slices)
        new = stage.period()  # nothing is kept of the next one
        counts = {turn: count_step(stage, trained, step + new, slices) for turn, step in turns}
        take_turn(trained, None)
        forward = max(count_forward(stage, step, slices) for _, step in turns)
    shares = Counter(stage.turn(step) for step in _window(train.steps))
    memory = _with_step(memory, [first, *counts.values()], train)
    whole = memory.weights  # on every process, while it validates
    if processes > 1:
        memory = _spread(memory, stage, train, processes)
    swapped = max(tensor.nbytes for tensor in average)
    always = replace(memory, gradients=0, activations=0, weights=whole)
    changed = {id(parameter) for parameters in trained.values() for parameter in parameters}
    counted: set[int] = set()  # adapters are parts of two networks
    return TrainingPlan(
        stage=stage.name,
        train=train,
        processes=processes,
        memory=memory,
        device=device,
        data=stage.data(),
        parameters={name: _parameters(network, changed, counted) for name, network in networks.items()},
        flops=train.accumulate * sum(counts[turn].flops * n for turn, n in shares.items()) / shares.total(),
        precision=stage.precision,
        timed=seconds,
        validation=always.peak + forward + swapped,
        reading=reading,
    )


def _window(steps: int) -> range:
    late = int(LATE * steps)
    return range(late, min(steps, late + WINDOW))


def _turns(stage: Stage, steps: int) -> list[tuple[str, int]]:
    """Find a turn of every group late in the run."""
    found: dict[str, int] = {}
    for step in _window(steps):
        found.setdefault(stage.turn(step), step)
    return list(found.items())


def _parameters(network: nn.Module, changed: set[int], counted: set[int]) -> tuple[int, int]:
    counts = [0, 0]
    for parameter in network.parameters():
        if id(parameter) not in counted:
            counts[id(parameter) not in changed] += parameter.numel()
            counted.add(id(parameter))
    return counts[0], counts[1]


def _bytes(network: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _constant_memory(stage: Stage, trained: Trained, networks: Mapping[str, nn.Module], average: int) -> Memory:
    """Count what is there whatever the batch."""
    states = [make_optimizer(group).state for group in stage.groups.values()]
    return Memory(
        weights=sum(_bytes(networks[name]) for name in trained),
        gradients=0,
        activations=0,
        exchange=0,
        optimizer=sum(value.nbytes for state in states for values in state.values() for value in values.values()),
        average=average,
        frozen=sum(_bytes(network) for name, network in networks.items() if name not in trained),
    )


def _with_step(memory: Memory, counts: list[StepCount], train: TrainConfig) -> Memory:
    """Add the worst of the backward passes; the optimiser's update takes less, as it makes no copies.

    In a later micro-batch the gradients of the earlier ones are there already.
    """
    again = train.accumulate > 1
    worst = max(counts, key=lambda count: count.peak_bytes + again * count.gradient_bytes)
    activations = worst.peak_bytes - (0 if again else worst.gradient_bytes)
    return replace(memory, gradients=worst.gradient_bytes, activations=activations)


def _spread(memory: Memory, stage: Stage, train: TrainConfig, processes: int) -> Memory:
    """Add what several processes take: DDP a copy of all gradients, and the average is dealt out; FSDP2 cuts all that
    is trained, and gathers a unit and the next."""
    networks = [group.network for group in stage.groups.values()]
    parameters = sum(p.nbytes for network in networks for p in network.parameters() if p.requires_grad)
    if train.parallel == "ddp":
        return replace(memory, exchange=parameters, average=memory.average // processes)
    units = [_own_bytes(module) for network in networks for module in network.modules() if type(module) in UNITS]
    largest, rest = max(units, default=0), memory.weights - sum(units)  # the rest stays gathered to the end of the step
    return replace(
        memory,
        weights=memory.weights // processes,
        gradients=memory.gradients // processes,
        optimizer=memory.optimizer // processes,
        average=memory.average // processes,
        exchange=3 * largest + 2 * rest,
    )


def _own_bytes(unit: nn.Module) -> int:
    """Count the bytes of parameters that no unit inside of this one gathers."""
    own = sum(parameter.nbytes for parameter in unit.parameters(recurse=False))
    return own + sum(_own_bytes(child) for child in unit.children() if type(child) not in UNITS)


def _time_steps(stage: Stage, train: TrainConfig, turns: list[tuple[str, int]], slices: list[BatchSlice]) -> float:
    """Mean seconds of a step of this process, with the optimiser's update, as often as each group has its turn."""
    stage.batch_slice = slices[0]
    if train.precision == "auto":
        found = time_precisions(stage)
        stage.precision = min(found, key=found.__getitem__)
    trained, optimizers = trained_of(stage), {name: make_optimizer(group) for name, group in stage.groups.items()}
    shares, seconds = Counter(stage.turn(step) for step in _window(train.steps)), 0.0
    for turn, step in turns:
        take_turn(trained, turn)
        steps = watched(range(TIMED_STEPS + 1), f"time {turn}")
        _, *each = [_time_step(stage, optimizers[turn], step, slices) for _ in steps]  # the first one warms up
        mean = sum(each) / TIMED_STEPS
        if stage.period():
            mean += (_time_step(stage, optimizers[turn], step + stage.period(), slices) - mean) / stage.period()
        seconds += mean * shares[turn] / shares.total()
    take_turn(trained, None)
    return seconds


def _time_reading(stage: Stage, train: TrainConfig, part: BatchSlice) -> float | None:
    """Return CPU-seconds to read what a process needs of a step, by those of one micro-batch; the first is for files
    and tables to be there."""
    if stage.feed is None:
        return None
    period = max(1, stage.period())
    stage.feed.get(READ * period, part)
    begun = time.process_time()
    stage.feed.get((READ + 1) * period, part)
    return (time.process_time() - begun) * train.accumulate / period


def _time_step(stage: Stage, optimizer: torch.optim.Optimizer, step: int, slices: list[BatchSlice]) -> float:
    begun = time.perf_counter()
    for _ in slices:
        loss = run_slice(stage, step, slices)
    optimizer.step()
    float(loss)  # waits for a GPU
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - begun


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters:,}"


def _time(seconds: float) -> str:
    """Write hours, minutes and seconds."""
    return str(timedelta(seconds=round(seconds)))
