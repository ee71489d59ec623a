"""Keep what a GPU is asked for again and again as graphs of kernels, one for every shape, each launched as one.

This has not run on CUDA yet; what is kept, copied and renewed is tested on a CPU, with a stand-in for ``capture``.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Replay = Callable[[], object]
_KEPT = 4  # graphs of one network: each holds the memory of its activations


def capturable(device: torch.device) -> bool:
    """Tell whether a device has graphs of kernels."""
    return device.type == "cuda"


def capture(run: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
    """Record what ``run`` launches; return its result, which every replay writes again, and the replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return output, graph.replay


@dataclass(kw_only=True)
class _Entry:
    inputs: list[Tensor]  # that the graph reads
    output: Tensor
    replay: Replay
    given: list[tuple[weakref.ref[Tensor], int]]  # whose values the inputs hold, and the version of them


class Graphs:
    """Run functions of one network as graphs: of a new shape first as they are, then recorded, then replayed.

    A call may overwrite the result of the last one. Inputs are tensors and values, and dataclasses and tuples of them;
    what a function reads besides must stay in its place. A function is not kept, so that its network can die.
    """

    def __init__(self) -> None:
        self._entries: dict[Any, _Entry | None] = {}  # None: met once; the last one used is the last
        self._refused: set[Any] = set()

    def __call__(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Return what ``function(*inputs)`` does."""
        leaves: list[Tensor] = []
        key = (function.__name__, _shape_of(inputs, leaves))
        if key in self._refused or not capturable(leaves[0].device):
            return function(*inputs)
        if key not in self._entries:  # once as it is: kernels are chosen and tables made
            self._keep(key, None)
            return function(*inputs)
        entry = self._entries.pop(key) or self._record(function, inputs, leaves)
        if entry is None:
            self._refused.add(key)
            return function(*inputs)
        self._keep(key, entry)
        _renew(entry, leaves)
        entry.replay()
        return entry.output

    def _keep(self, key: Any, entry: _Entry | None) -> None:
        self._entries[key] = entry
        while len(self._entries) > _KEPT:
            del self._entries[next(iter(self._entries))]

    def _record(self, function: Callable[..., Tensor], inputs: Any, leaves: list[Tensor]) -> _Entry | None:
        own = [leaf.clone() for leaf in leaves]
        rebuilt = _with(inputs, iter(own))
        try:
            output, replay = capture(lambda: function(*rebuilt))
        except RuntimeError as error:
            warnings.warn(
                f"no graph of kernels for this shape, so it is launched piece by piece: {error}", stacklevel=2
            )
            return None
        return _Entry(inputs=own, output=output, replay=replay, given=[_seen(leaf) for leaf in leaves])


_OF: weakref.WeakKeyDictionary[nn.Module, Graphs] = weakref.WeakKeyDictionary()


def graphs_of(network: nn.Module) -> Graphs:
    """Return the graphs of a network, which die with it."""
    return _OF.setdefault(network, Graphs())


def _seen(leaf: Tensor) -> tuple[weakref.ref[Tensor], int]:
    return weakref.ref(leaf), leaf._version


def _renew(entry: _Entry, leaves: list[Tensor]) -> None:
    """Copy the inputs that are others than last time, in one go: what was prepared for a prompt stays."""
    changed = [
        k for k, (known, version) in enumerate(entry.given) if known() is not leaves[k] or version != leaves[k]._version
    ]
    if changed:
        torch._foreach_copy_([entry.inputs[k] for k in changed], [leaves[k] for k in changed])
    for k in changed:
        entry.given[k] = _seen(leaves[k])


def _shape_of(value: Any, leaves: list[Tensor]) -> Any:
    """Return what a graph depends on, but for the values of tensors, which are added to ``leaves``."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return value.shape, value.dtype, value.device
    if isinstance(value, tuple):
        return tuple(_shape_of(each, leaves) for each in value)
    if is_dataclass(value):
        return type(value), tuple(_shape_of(getattr(value, field.name), leaves) for field in fields(value))
    return value


def _with(value: Any, leaves: Iterator[Tensor]) -> Any:
    """Return the same value with these tensors in it."""
    if isinstance(value, Tensor):
        return next(leaves)
    if isinstance(value, tuple):
        return tuple(_with(each, leaves) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: _with(getattr(value, field.name), leaves) for field in fields(value)})
    return value
