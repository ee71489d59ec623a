"""Memory and arithmetic of a step, counted from the step itself.

The stage's own losses run forward and backward on tensors that have shapes but no values (fake tensors): nothing is
allocated or computed, so a network for a large GPU is counted on a laptop. The graph is that of a CPU, where attention
is fused, as it is on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from sa3_torch.train.run.optimizers import Trained, take_turn
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.stage import Stage

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """Hold what one micro-batch of one process takes, forward and backward."""

    flops: int  # of matrix products, convolutions and attention
    peak_bytes: int  # of what the step makes, gradients included
    gradient_bytes: int  # what is left of it


class StepCounter(TorchDispatchMode):
    """Count arithmetic, and the bytes of all tensors that are made from now on and still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        known = {_storage(tensor)._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor)._cdata not in known:
                self._add(_storage(tensor))
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage._cdata)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, number: int, size: int) -> None:
        self._seen.discard(number)
        self.live -= size


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def networks_of(stage: Stage) -> dict[str, nn.Module]:
    """Find all networks that a stage holds, by names of attributes; trained ones by those of their groups, first."""
    found = {name: group.network for name, group in stage.groups.items()}
    inside = {number for network in found.values() for number in _tensors(network)}

    def add(networks: Iterator[tuple[str, nn.Module]]) -> None:
        for name, network in networks:
            own = _tensors(network)
            if not own <= inside:  # so neither a part of another one nor its compiled form
                found[name] = network
                inside.update(own)

    add(_networks(stage, inside))
    add(_beside([*found.values()]))
    return found


def _networks(stage: Stage, inside: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """Yield what a stage holds, and the parts of what is put together of trained networks and others."""
    for name, network in _modules(stage, 2):
        parts = list(network.named_children())
        whole = any(numbers and numbers <= inside for numbers in (_tensors(part) for _, part in parts))
        yield from parts if whole else [(name, network)]


def _tensors(network: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*network.parameters(), *network.buffers())}


def _beside(networks: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield what parts of networks keep in lists: it is used, but neither trained nor saved with them."""
    for network in networks:
        for part in network.modules():
            for name, value in vars(part).items():
                held = value if isinstance(value, list) else ()
                yield from ((name, one) for one in held if isinstance(one, nn.Module))


def _modules(holder: object, depth: int) -> Iterator[tuple[str, nn.Module]]:
    """Yield modules among the attributes of an object, in its dictionaries, and in objects of ours that it holds."""
    for name, value in vars(holder).items():
        for key, one in value.items() if isinstance(value, dict) else [(name, value)]:
            if isinstance(one, nn.Module):
                yield str(key), one
            elif depth > 1 and type(one).__module__.startswith("sa3_torch") and hasattr(one, "__dict__"):
                yield from _modules(one, depth - 1)


def make_fake(networks: dict[str, nn.Module]) -> None:
    """Take the values out of all parameters and buffers, for good. Some may have none already, all of one mode."""
    tensors = [x for network in networks.values() for x in (*network.parameters(), *network.buffers())]
    modes = (tensor.fake_mode for tensor in tensors if isinstance(tensor, FakeTensor))
    mode = next(modes, None) or FakeTensorMode(allow_non_fake_inputs=True)
    made = dict[int, tuple[Tensor, Tensor]]()

    def fake(tensor: Tensor) -> Tensor:
        """Make one for each tensor, which is kept, so that no other gets its number."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if id(tensor) not in made:
            value: Tensor = mode.from_tensor(tensor.detach(), static_shapes=True)
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            made[id(tensor)] = tensor, value
        return made[id(tensor)][1]

    for network in networks.values():
        for module in network.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = fake(tensor)  # type: ignore[assignment]


def trained_of(stage: Stage) -> Trained:
    """Return the trained parameters, before the first turn, which freezes the other groups."""
    return {
        name: [parameter for parameter in group.network.parameters() if parameter.requires_grad]
        for name, group in stage.groups.items()
    }


def count_step(stage: Stage, trained: Trained, step: int, slices: list[BatchSlice]) -> StepCount:
    """Count the first of the micro-batches ``slices`` of a process in ``step``; with fake networks nothing is computed.

    FLOPs are the mean over a period of the stage, of which nothing may be kept yet.
    """
    turn = stage.turn(step)
    take_turn(trained, turn)
    if stage.feed is not None:  # what is read is memory of the host
        stage.feed.get(step - step % max(stage.period(), 1), slices[0])
    with torch.compiler.set_stance("force_eager"):
        with StepCounter() as counter:
            run_slice(stage, step, slices)
        flops = counter.flops
        gradients = sum(parameter.grad.nbytes for parameter in trained[turn] if parameter.grad is not None)
        if stage.period():  # what serves all of it is kept now
            with StepCounter() as later:
                run_slice(stage, step, slices)
            flops = later.flops + (flops - later.flops) // stage.period()
    for parameter in trained[turn]:
        parameter.grad = None
    return StepCount(flops=flops, peak_bytes=counter.peak, gradient_bytes=gradients)


@torch.no_grad()
def count_forward(stage: Stage, step: int, slices: list[BatchSlice]) -> int:
    """Return the most bytes that the losses of a micro-batch make without gradients, as in validation."""
    with torch.compiler.set_stance("force_eager"), StepCounter() as counter:
        if len(slices) > 1:
            stage.prepare(step, slices)
        stage.batch_slice, stage.notes = slices[0], {}
        terms = stage.losses(step)
    stage.notes = {}
    assert terms
    return counter.peak


def run_slice(stage: Stage, step: int, slices: list[BatchSlice]) -> Tensor:
    """Return the loss of the first of these micro-batches; its gradients are added."""
    if len(slices) > 1:
        with torch.no_grad():
            stage.prepare(step, slices)
    stage.batch_slice, stage.notes = slices[0], {}
    loss = torch.stack(list(stage.losses(step).values())).sum()
    loss.backward()
    stage.notes = {}
    return loss.detach()


def _attention(
    query: Shape,
    key: Shape,
    value: Shape,
    _dropout: float = 0.0,
    _causal: bool = False,
    *,
    attn_mask: Shape | None = None,  # noqa: ARG001
    scale: float | None = None,  # noqa: ARG001
    out_shape: object = None,  # noqa: ARG001
) -> int:
    """Count scores and weighted sums."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def _backward(
    _gradient: Shape,
    query: Shape,
    key: Shape,
    value: Shape,
    _out: Shape,
    _sums: Shape,
    _dropout: float,
    _causal: bool,
    *,
    attn_mask: Shape | None = None,  # noqa: ARG001
    scale: float | None = None,  # noqa: ARG001
    out_shape: object = None,  # noqa: ARG001
) -> int:
    """Count scores again, and four products for the gradients."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (3 * width + 2 * value[3])


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_backward),
}
