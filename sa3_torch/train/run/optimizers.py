"""Optimisers of trained groups, their schedules, and the average of the weights [T0.4]."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sa3_mlx.common.schema import Config, ConfigError

from . import parallel
from .parallel import own_share, sharded_like, total, whole
from .settings import check

SAMPLED = 1 << 16
HELD = 0.75  # of the run, that the schedule "held" keeps its rate
MOMENTUM = 0.95  # of Muon, as its authors have it
ITERATION = (3.4445, -4.7750, 2.0315)  # of Newton and Schulz, of odd powers 1, 3, 5: singular values near 1 after five
ITERATIONS = 5
MATRIX_RMS = 0.2  # of Muon's change at rate 1: as large as AdamW's, so both have one rate (arXiv 2502.16982, 2.2)
_MANY = ("to_q.weight", "to_kv.weight", "to_qkv.weight")  # square matrices, one above the other


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """Describe AdamW of one group of parameters, or ``Muon``. Warm-up counts the group's own updates, the cosine the
    steps of the run. beta1 and beta2 are AdamW's."""

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float
    schedule: Literal["cosine", "inverse", "held"]
    final_learning_rate: float  # the cosine's and the held schedule's end, the inverse schedule's floor
    inverse_gamma: float  # of "inverse": updates until the rate has fallen by sqrt(2); 0 for "cosine"
    warmup_steps: int  # linear for "cosine" and "held"; for "inverse" the time constant n of 1 - (1 - 1/n)^(k+1)
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self) -> None:
        check(self, 0, math.inf, "warmup_steps", "weight_decay", "inverse_gamma")
        check(self, 1e-12, math.inf, "learning_rate", "final_learning_rate", "clip_norm")
        check(self, 0, 1 - 1e-12, "beta1", "beta2")
        if (self.schedule == "inverse") != (self.inverse_gamma > 0):
            raise ConfigError(
                f"inverse_gamma is {self.inverse_gamma:g} with schedule {self.schedule!r}: "
                "'inverse' needs one above 0, the others need 0"
            )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Hold parameters that are trained together: those of ``network`` that require a gradient.

    ``rates``: first part of a parameter's name -> factor of the learning rate; 1 where it is not named.
    """

    network: nn.Module
    optimizer: OptimizerConfig
    rates: Mapping[str, float] = field(default_factory=dict)


Trained = Mapping[str, Sequence[Tensor]]  # group -> the parameters that its optimiser changes


def take_turn(trained: Trained, turn: str | None) -> None:
    """Freeze the parameters of all groups but this one; of none for None."""
    for name, parameters in trained.items():
        for parameter in parameters:
            parameter.requires_grad_(turn in (name, None))


def learning_rate_at(config: OptimizerConfig, *, step: int, steps: int, update: int) -> float:
    """Return the rate of a group in ``step`` of ``steps``, which is its own ``update``-th, counted from 0.

    cosine: linear warm-up, then from learning_rate to final_learning_rate. held: the same, but the cosine takes the
    last quarter of the run. inverse:
    (1 - w^(k+1)) max(floor, base (1 + k / gamma)^-0.5) with w = 1 - 1 / warmup_steps [T0.4].
    """
    if config.schedule == "inverse":
        warm = 1 - (1 - 1 / max(1, config.warmup_steps)) ** (update + 1)
        falling = config.learning_rate * (1 + update / config.inverse_gamma) ** -0.5
        return warm * max(config.final_learning_rate, falling)
    warm = min(1.0, (update + 1) / max(1, config.warmup_steps))
    held = HELD if config.schedule == "held" else 0.0
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, (step / steps - held) / (1 - held))))
    return warm * (config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * cosine)


def fits_fused(parameters: Sequence[Tensor]) -> bool:
    """Return whether one kernel may update all of these: on a GPU, where it needs no copies of what it changes."""
    return bool(parameters) and all(parameter.device.type == "cuda" for parameter in parameters)


class Muon(torch.optim.AdamW):
    """Step the matrices of transformer blocks along their orthogonalised momentum, all else as AdamW [T4.7].

    The momentum (Nesterov's) of a matrix (n, m) keeps its singular vectors and gets singular values near 1, in bf16;
    its change is that, times MATRIX_RMS sqrt(max(n, m)) and the rate. So directions that few items ask for are learned
    as fast as those of many. Projections to queries, keys and values are matrices of their own. Each process finds the
    directions of some matrices, and gives them to all; sharded ones are gathered for it. ``counts`` of a table of
    parameters says how many matrices each of them holds; tables without it are AdamW's.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step; ``closure`` goes to AdamW, after the matrices."""
        moved = {
            parameter: (count, table)
            for table in self.param_groups
            for parameter, count in zip(table["params"], table.get("counts", ()), strict=False)
            if parameter.grad is not None
        }
        owners = parallel.deal({matrix: matrix.numel() * min(matrix.shape) for matrix in moved})
        found = {matrix: self._direction(matrix, count, owners[matrix]) for matrix, (count, _) in moved.items()}
        for matrix, (count, table) in moved.items():
            direction = found.pop(matrix)
            if direction is None:
                direction = torch.empty(matrix.shape, dtype=torch.bfloat16, device=matrix.device)
            parallel.give(direction, owners[matrix])
            matrix.mul_(1 - table["lr"] * table["weight_decay"])
            size = MATRIX_RMS * math.sqrt(max(matrix.shape[0] // count, matrix.shape[1]))
            matrix.sub_(sharded_like(direction.to(matrix.dtype), matrix), alpha=table["lr"] * size)
            matrix.grad = None  # AdamW passes over it
        return super().step(closure)

    def _direction(self, matrix: Tensor, count: int, owner: int | None) -> Tensor | None:
        """Return the orthogonalised momentum of ``count`` matrices, one above the other, in bf16; None where another
        process finds it."""
        momentum = self.state[matrix]["momentum"]
        momentum.lerp_(matrix.grad, 1 - MOMENTUM)
        ahead = whole(matrix.grad.lerp(momentum, MOMENTUM))  # type: ignore[union-attr]
        if not parallel.is_own(owner):
            return None
        return orthogonalised(ahead.unflatten(0, (count, matrix.shape[0] // count))).flatten(0, 1).contiguous()


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return matrices (N, n, m) with their singular vectors and singular values of about 0.7 to 1.2, in bf16."""
    x = matrices.bfloat16()
    high = x.shape[1] > x.shape[2]
    x = x.mT if high else x
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    first, third, fifth = ITERATION
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = first * x + (third * square + fifth * square @ square) @ x
    return x.mT if high else x


def _matrix_counts(network: nn.Module) -> dict[str, int]:
    """Return the names of the matrices inside of transformer blocks, and how many each of them is."""
    found = {}
    for name, parameter in network.named_parameters():
        if parameter.dim() == 2 and "layers" in name.split("."):
            rows, columns = parameter.shape
            found[name] = rows // columns if name.endswith(_MANY) and rows % columns == 0 else 1
    return found


def make_optimizer(group: Group) -> torch.optim.Optimizer:
    """Make the optimiser of a group. Its state exists from the start, at zero, so that a checkpoint can be read into it
    in place."""
    config, betas = group.optimizer, (group.optimizer.beta1, group.optimizer.beta2)
    counts = _matrix_counts(group.network) if config.kind == "muon" else {}
    by_factor: dict[float, list[nn.Parameter]] = {}
    matrices: dict[float, dict[nn.Parameter, int]] = {}
    for name, parameter in group.network.named_parameters():
        if parameter.requires_grad:
            factor = group.rates.get(name.partition(".")[0], 1.0)
            if name in counts:
                matrices.setdefault(factor, {})[parameter] = counts[name]
            else:
                by_factor.setdefault(factor, []).append(parameter)
    tables: list[dict[str, Any]] = [{"params": found, "factor": factor} for factor, found in by_factor.items()]
    tables += [
        {"params": list(found), "factor": factor, "counts": tuple(found.values())} for factor, found in matrices.items()
    ]
    every = list(itertools.chain(*by_factor.values()))
    fused = fits_fused(every)
    optimizer = {"adamw": torch.optim.AdamW, "muon": Muon}[config.kind](
        tables, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay, fused=fused or None
    )
    for parameter in every:
        zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        count = torch.zeros((), device=parameter.device if fused else None)  # of updates, which the kernel reads
        optimizer.state[parameter] = {"step": count, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    for parameter in itertools.chain(*matrices.values()):
        optimizer.state[parameter] = {"momentum": torch.zeros_like(parameter, memory_format=torch.preserve_format)}
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step, times the factor of each part (``Group.rates``)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state itself, not a copy, by parameter name: "encoder.mapping.weight/exp_avg"."""
    return {
        f"{name}/{key}": value
        for name, parameter in network.named_parameters()
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


class Ema:
    """Average weights: the k-th update has beta_k = min(decay, 1 - (1 + k)^-3/4); buffers are copied [T0.4].

    It is updated in every ``every``-th step; for the first ``after`` steps it is a copy of the weights (1.3, step 5).
    What is frozen is its own average. ``state`` is what this process holds: its parts of sharded weights, and of those
    that all processes have about as many bytes as the others.
    """

    def __init__(self, model: nn.Module, trained: Trained, *, decay: float, after: int, every: int) -> None:
        self.decay, self.after, self.every = decay, after, every
        changed = {id(parameter) for parameters in trained.values() for parameter in parameters}
        parameters = {name: id(parameter) in changed for name, parameter in model.named_parameters()}
        moving = {name: tensor for name, tensor in model.state_dict().items() if parameters.get(name, True)}
        self.owners = parallel.owners(moving)
        own = (name for name, owner in self.owners.items() if parallel.is_own(owner))
        self.state = {name: moving[name].detach().clone() for name in own}
        self.averaged = [name for name in self.state if name in parameters]

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        if step % self.every:
            return
        beta = 0.0 if step < self.after else min(self.decay, 1 - (1 + (step - self.after) // self.every) ** -0.75)
        state = model.state_dict()
        if self.averaged:  # a process may have none of a few
            averages = [self.state[name] for name in self.averaged]
            torch._foreach_lerp_(averages, [state[name] for name in self.averaged], 1 - beta)
        for name in self.state.keys() - set(self.averaged):
            self.state[name].copy_(state[name])

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the averaged weights and those of the model, both in place; all processes do it together.

        Weights that all have come from those that hold their averages, there and back.
        """
        state = model.state_dict()
        for name, owner in self.owners.items():
            live = state[name]
            if name in self.state:
                kept = live.detach().clone()
                live.copy_(self.state[name])
                self.state[name].copy_(kept)
            parallel.give(live, owner)


class UpdateRatio:
    """Measure |change| / |weights| of an optimiser's update, over the first SAMPLED values of every parameter."""

    @torch.no_grad()
    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.before = [self._sample(parameter).clone() for parameter in parameters]

    @staticmethod
    def _sample(parameter: Tensor) -> Tensor:
        return own_share(parameter).flatten()[:SAMPLED].float()

    @torch.no_grad()
    def after(self) -> float:
        """Return the ratio, the same on all processes."""
        pairs = [(self._sample(p) - b, b) for p, b in zip(self.parameters, self.before, strict=True)]
        squares = [torch.stack([change.square().sum(), before.square().sum()]) for change, before in pairs]
        change, weights = total(torch.stack(squares).sum(0)).tolist()
        return math.sqrt(change / max(weights, 1e-30))
