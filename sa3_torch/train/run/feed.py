"""Read the batches of a run ahead of its steps, by a thread, so that a GPU does not wait for them.

What is read is a function of the step and of the slice of its batch, whoever reads it and when: nothing of this is part
of a checkpoint, and a run that was stopped reads again what it needs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor

from .parallel import BatchSlice

Read = TypeVar("Read")
Key = tuple[int, BatchSlice]


class BatchFeed(Generic[Read]):
    """Give what ``read(step, part)`` returns for a slice of the batch of a step; it is held until another step.

    From ``start`` to ``stop`` a thread reads the slices of this process that come next, in order, into memory that a
    GPU copies from while the CPU goes on. ``every``: the batches of every so many steps are read.
    """

    def __init__(self, read: Callable[[int, BatchSlice], Read], *, every: int = 1) -> None:
        self._read, self._every = read, every
        self._slices: tuple[BatchSlice, ...] = ()
        self._thread: ThreadPoolExecutor | None = None
        self._known: dict[Key, Future[Read]] = {}

    def start(self, slices: Sequence[BatchSlice]) -> None:
        """Read ahead from now on; ``slices`` are the micro-batches of this process."""
        self._slices, self._thread = tuple(slices), ThreadPoolExecutor(1, "feed")

    def stop(self) -> None:
        """Read no further; what the thread is reading, it ends."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._thread, self._known = None, {}

    def get(self, step: int, part: BatchSlice) -> Read:
        """Return what is read for ``part`` of a step. Raises what ``read`` raises."""
        ahead = self._following(step, part) if self._thread is not None else []
        wanted = {(step, part), *ahead}
        self._known = {key: found for key, found in self._known.items() if key[0] == step or key in wanted}
        for key in ((step, part), *ahead):
            if key not in self._known:
                self._known[key] = self._begin(key)
        return self._known[step, part].result()

    def _following(self, step: int, part: BatchSlice) -> list[Key]:
        """Return the micro-batches after this one, to the end of the next step that is read."""
        if part not in self._slices:
            return []
        rest = self._slices[self._slices.index(part) + 1 :]
        return [*((step, each) for each in rest), *((step + self._every, each) for each in self._slices)]

    def _begin(self, key: Key) -> Future[Read]:
        if self._thread is not None:
            return self._thread.submit(lambda: pinned(self._read(*key)))
        found: Future[Read] = Future()
        found.set_result(self._read(*key))
        return found


def pinned(value: Read) -> Read:
    """Return a dataclass with its tensors in pinned memory, where there is a GPU, which copies from it meanwhile."""
    return cast(Read, _pinned(value)) if torch.cuda.is_available() else value


def _pinned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.pin_memory()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _pinned(each) for name, each in held.items()})
    return value
