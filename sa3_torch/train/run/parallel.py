"""Several processes, started by torchrun: devices, slices of the global batch, DDP and FSDP2 [T10].

Every process reads and draws its slice of the global batch of (seed, step), so that P processes equal one up to the
order of sums. Statistics that no gradient synchronises are all-reduced here, explicitly.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.nn.functional import all_gather
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sa3_mlx.common.schema import ConfigError
from sa3_torch.attention import CrossAttention
from sa3_torch.clap.network import ModulatedBlock
from sa3_torch.dit import DiTBlock
from sa3_torch.layers import MLP
from sa3_torch.same import SAMEBlock
from sa3_torch.t5gemma import TextLayer

Value = TypeVar("Value")
Key = TypeVar("Key", bound=Hashable)
PATIENCE = timedelta(hours=1)  # processes wait for the first one while it validates and exports
# What FSDP2 gathers at a time, and the methods beside ``forward`` that read its weights.
# A listed method must not be called by another one of the module, nor by its forward: the inner call would end it.
UNITS: dict[type[nn.Module], tuple[str, ...]] = {
    SAMEBlock: ("heads", "at"),
    DiTBlock: (),
    CrossAttention: ("prepare",),
    MLP: (),
    TextLayer: (),
    ModulatedBlock: (),
}


@dataclass(frozen=True, kw_only=True)
class BatchSlice:
    """Say which of ``world`` equal slices of the global batch: that of a process, or one of its micro-batches."""

    rank: int = 0
    world: int = 1

    def rows(self, batch: int) -> slice:
        """Return the rows of a global batch in this slice. Raises ConfigError when they cannot be equally many."""
        if batch % self.world:
            raise ConfigError(
                f"batch is {batch}: {self.world} parts (processes times train.accumulate) need a multiple of it"
            )
        size = batch // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def micro_batches(self, count: int) -> list[BatchSlice]:
        """Cut this slice into ``count``; one process with two micro-batches reads what two processes read."""
        return [BatchSlice(rank=self.rank * count + i, world=self.world * count) for i in range(count)]


def start() -> None:
    """Join the other processes when torchrun started this one; nccl with a GPU, else gloo."""
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if gpu else "gloo", timeout=PATIENCE)


def finish() -> None:
    """Leave the other processes, after a run without an error."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


_planned = 1  # processes that this one stands for


@contextmanager
def planned(processes: int) -> Iterator[None]:
    """Stand for the first of so many processes, of which the others have copies of its rows: for a plan, which asks for
    shapes only."""
    global _planned
    _planned = processes
    try:
        yield
    finally:
        _planned = 1


def own_slice() -> BatchSlice:
    if dist.is_initialized():
        return BatchSlice(rank=dist.get_rank(), world=dist.get_world_size())
    return BatchSlice(world=_planned)


def is_first() -> bool:
    """Return whether this process writes logs and files."""
    return own_slice().rank == 0


def wait() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def own_rows(count: int) -> slice:
    """Return the share of this process of ``count`` rows: as many as the others have, or one more or less."""
    own = own_slice()
    return slice(-(-count * own.rank // own.world), -(-count * (own.rank + 1) // own.world))


def gather_lists(values: list[Value]) -> list[Value]:
    """Return the values of all processes, in the order of their ranks, on the first; the others get their own."""
    if not dist.is_initialized():
        return values
    found: list[list[Value]] | None = [[]] * own_slice().world if is_first() else None
    dist.gather_object(values, found)
    return values if found is None else [value for each in found for value in each]


def all_values(value: Value, group: dist.ProcessGroup | None = None) -> list[Value]:
    """Return the values of all processes, in the order of their ranks, on each."""
    if not dist.is_initialized():
        return [value]
    found = [value] * own_slice().world
    dist.all_gather_object(found, value, group)
    return found


def second_group() -> dist.ProcessGroup | None:
    """Make a group of all processes on their CPUs, for a thread beside the steps; None where there is one process."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if dist.is_initialized() else None


def own_device() -> torch.device:
    """Return the GPU of this process when there is one, else the CPU."""
    if not torch.cuda.is_available() or (dist.is_initialized() and dist.get_backend() == "gloo"):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def total(values: Tensor) -> Tensor:
    """Sum over processes, without a gradient."""
    values = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def mean(values: Tensor) -> Tensor:
    """Mean over processes, without a gradient."""
    return total(values) / own_slice().world


def moments(x: Tensor) -> Tensor:
    """Count, sum and sum of squares of all elements: (3,) float64. Those of the parts of a batch add up."""
    x = x.detach().double()
    return torch.stack([torch.tensor(x.numel(), dtype=x.dtype, device=x.device), x.sum(), x.square().sum()])


def std_of(moments: Tensor) -> Tensor:
    """Return the standard deviation over all processes from the ``moments`` of each: float32, the same everywhere."""
    count, first, second = total(moments)
    return ((second - first.square() / count) / (count - 1)).clamp_min(0).sqrt().float()


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes in the order of their ranks: (B, ...) -> (world B, ...).

    The gradient is that of the sum of the losses of all processes.
    """
    if not dist.is_initialized():
        return rows if _planned == 1 else torch.cat([rows] * _planned)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a new name since torch 2.13
        return torch.cat(all_gather(rows))


def gather_shares(rows: Tensor, count: int) -> Tensor:
    """Return ``count`` rows of which each process has its ``own_rows``: (n, ...) -> (count, ...), no gradient."""
    if not dist.is_initialized():
        return rows
    world = own_slice().world
    found = rows.new_zeros(world, -(-count // world), *rows.shape[1:])
    found[own_slice().rank, : len(rows)] = rows
    dist.all_reduce(found)
    ends = [-(-count * rank // world) for rank in range(world + 1)]
    return torch.cat([found[rank, : ends[rank + 1] - ends[rank]] for rank in range(world)])


def follow(average: Tensor, value: Tensor, decay: float) -> None:
    """Set average <- decay average + (1 - decay) value, in place, unless the value is not finite.

    ``value`` must be the same on all processes (``std_of``, ``mean``).
    """
    moved = decay * average + (1 - decay) * value.detach()
    average.copy_(torch.where(torch.isfinite(moved), moved, average))


class Turn(nn.Module):
    """Own the networks of a turn and run ``work`` inside its forward, where the hooks of DDP and FSDP2 are in place.

    So ``work`` may call the raw networks, and parts of them, as it likes.
    """

    def __init__(self, networks: dict[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(networks)

    def forward(self, work: Callable[[], Any]) -> Any:
        return work()


def wrap_ddp(networks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Make a wrapper per group: in the turn of one, the others are raw, frozen modules."""
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # a new name since torch 2.13
        return {
            name: DistributedDataParallel(Turn({name: network}), broadcast_buffers=False)
            for name, network in networks.items()
        }


def wrap_fsdp(networks: dict[str, nn.Module], device: torch.device) -> dict[str, nn.Module]:
    """Shard the networks in place, by ``UNITS``, then the rest; return one wrapper for all turns.

    Units travel in fp32, and autocast makes of them what it makes under DDP: in bf16 they would take half the traffic,
    but norms, gates and what blocks pass on would be bf16, too, which is another computation.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ConfigError(f"parallel is 'fsdp' with torch {torch.__version__}: it needs 2.13; choose 'ddp' or update")
    # What autocast makes of a weight must not outlive its unit: where one runs twice, its gradient would come too late.
    torch.set_autocast_cache_enabled(False)
    # Nothing changes the views in place that blocks return.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    turn, mesh = Turn(networks), init_device_mesh(device.type, (own_slice().world,))
    for module in reversed(list(turn.modules())):  # inner ones first
        methods = UNITS.get(type(module))
        if methods is not None:
            fully_shard(module, mesh=mesh)
            for method in methods:
                register_fsdp_forward_method(module, method)
    fully_shard(turn, mesh=mesh)
    turn(lambda: None)  # the whole is known as such before any of its parts runs
    cast(FSDPModule, turn).reshard()
    return dict.fromkeys(networks, turn)


@contextmanager
def last_micro_batch(turn: nn.Module, last: bool) -> Iterator[None]:
    """Exchange gradients only in the last micro-batch."""
    if isinstance(turn, FSDPModule):
        turn.set_requires_gradient_sync(last)
        yield
    elif isinstance(turn, DistributedDataParallel) and not last:
        with turn.no_sync():
            yield
    else:
        yield


@contextmanager
def whole_weights(turn: nn.Module) -> Iterator[None]:
    """Keep every sharded parameter in full on each process, so that a single one can run forward passes."""
    units = [module for module in turn.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    yield
    for unit in units:
        unit.set_reshard_after_forward(unit is not turn, recurse=False)
        unit.reshard()
    if isinstance(turn, FSDPModule):
        turn.reset_iter_state()  # else the order of gathering would differ where only one process ran them


def owners(tensors: Mapping[Key, Tensor]) -> dict[Key, int | None]:
    """Deal out what all processes have, about as many bytes to each: the rank whose it is.

    None for what is sharded, of which each has its part, and where there is one process.
    """
    dealt = deal({key: tensor.nbytes for key, tensor in tensors.items() if not isinstance(tensor, DTensor)})
    return {key: dealt.get(key) for key in tensors}


def deal(costs: Mapping[Key, int]) -> dict[Key, int | None]:
    """Deal out work, about as much to each process: the rank that does it; None where there is one process."""
    loads, found = [0] * own_slice().world, dict[Key, int | None]()
    for key, cost in costs.items():
        found[key] = rank = loads.index(min(loads)) if len(loads) > 1 else None
        loads[rank or 0] += max(cost, 1)
    return found


def is_own(owner: int | None) -> bool:
    """Tell whether this process has a part in what ``owners`` says this of."""
    return owner in (None, own_slice().rank)


def give(tensor: Tensor, owner: int | None) -> None:
    """Set a tensor to the values that its owner has, in place, on all processes; nothing for one without an owner."""
    if owner is not None:
        dist.broadcast(tensor, owner)


def gather(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy sharded tensors in full to the CPU of the first process; the others get an empty dictionary."""
    kept: dict[str, Tensor] = {}
    for name, tensor in state.items():
        full = whole(tensor)
        if is_first():
            kept[name] = full.detach().to("cpu", copy=True)
    return kept


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor in full, on every process; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(full: Tensor, like: Tensor) -> Tensor:
    """Return what all processes hold in full, sharded as ``like`` is; as it is where that is not sharded."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def own_share(tensor: Tensor) -> Tensor:
    """Return what this process holds of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip(parameters: list[Tensor], limit: float) -> Tensor:
    """Scale gradients down to a norm of at most ``limit``; return the norm before, the same on all processes."""
    return whole(nn.utils.clip_grad_norm_(parameters, limit))
