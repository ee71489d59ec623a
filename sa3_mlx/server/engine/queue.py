"""Hold the jobs that wait, and hand out those that can run together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from itertools import chain

from sa3_mlx.common.generation.request import InitAudio, Inpaint, Request, per_item
from sa3_mlx.server.feeds import Feed
from sa3_mlx.server.orders import MAKING, Order


@dataclass(eq=False)
class Job:
    """Hold a job that is not over."""

    id: str
    order: Order
    created: float
    feed: Feed
    cost: float | None = None  # seconds that it is expected to take
    step: int = 0
    steps: int = 0
    started: float | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def clips(self) -> int:
        """Return how many clips it makes."""
        return max(1, len(self.order.items))


def batch_key(job: Job) -> Hashable:
    """Return what jobs must have in common to run as one batch; jobs that run by themselves have their id.

    All but prompts, seeds, noise levels and regions: an item's noise depends on its own seed only, so that its sound is
    the same in any batch, but for rounding. ``exact`` jobs run by themselves.
    """
    order = job.order
    if order.request is None or order.kind not in MAKING or order.exact or order.request.get("long"):
        return job.id
    seconds = {item["seconds"] for item in order.items}
    if len(seconds) > 1:
        return job.id
    shared = {name: value for name, value in order.request.items() if name not in ("items", "init", "inpaint")}
    given = tuple(order.request.get(name) is not None for name in ("init", "inpaint"))
    return (
        order.kind,
        order.model,
        order.source,
        repr(order.adapters),
        repr(sorted(shared.items())),
        given,
        seconds.pop(),
    )


class QueueFull(ValueError):
    """Report that too many jobs wait; the message is one line."""


class JobQueue:
    """Order jobs by priority, then by time. All methods may be called from any thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._places: dict[str, int] | None = None
        self._closed = self._nudged = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, job: Job, store: Callable[[], None]) -> None:
        """Add a job once ``store`` has stored it. Raises QueueFull beyond the limit."""
        with self._changed:
            if len(self._waiting) >= self._limit:
                raise QueueFull(f"{len(self._waiting)} jobs wait already, which is the limit; try again later")
            store()
            at = len(self._waiting)
            while at and self._waiting[at - 1].order.priority < job.order.priority:
                at -= 1
            self._waiting.insert(at, job)
            self._places = None
            self._changed.notify()

    def take(self, clips_max: int, timeout: float | None) -> list[Job]:
        """Wait for jobs; return the first with those after it that fit into its batch, none after ``timeout``."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed or self._nudged, timeout)
            self._nudged = False
            if not self._waiting or self._closed:
                return []
            first = self._waiting[0]
            key, clips, taken = batch_key(first), first.clips, [first]
            for job in self._waiting[1:]:
                if clips >= clips_max:
                    break
                if clips + job.clips <= clips_max and batch_key(job) == key:
                    taken.append(job)
                    clips += job.clips
            for job in taken:
                self._waiting.remove(job)
            self._places = None
            return taken

    def remove(self, job: Job) -> bool:
        """Take a waiting job out; return whether it still waited."""
        with self._changed:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            self._places = None
            return True

    def places(self) -> dict[str, int]:
        """Return how many jobs are before each of those that wait."""
        with self._changed:
            if self._places is None:
                self._places = {job.id: place for place, job in enumerate(self._waiting)}
            return self._places

    def ahead(self, job: Job) -> list[Job]:
        """Return the jobs before one that waits."""
        with self._changed:
            return self._waiting[: self._waiting.index(job)] if job in self._waiting else []

    def wake(self) -> None:
        """Let who waits in ``take`` return at once."""
        with self._changed:
            self._nudged = True
            self._changed.notify_all()

    def close(self) -> None:
        """Hand out nothing any more, and wake who waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def together(requests: list[Request]) -> Request:
    """Return requests with the same ``batch_key`` as one, their items in this order."""
    first = requests[0]
    if len(requests) == 1:
        return first
    items = tuple(item for request in requests for item in request.items)
    inits = [per_item(request.init, InitAudio, "init", request) or () for request in requests]
    inpaints = [per_item(request.inpaint, Inpaint, "inpaint", request) or () for request in requests]
    init, inpaint = tuple(chain(*inits)), tuple(chain(*inpaints))
    return replace(first, items=items, init=init or None, inpaint=inpaint or None)
