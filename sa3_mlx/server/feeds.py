"""Tell listeners what happens to a job: events are stored once, each listener reads on at its own pace.

The worker appends from its thread and never waits for anybody.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Literal

EventName = Literal["queued", "running", "step", "preview", "audio", "done", "failed", "cancelled", "interrupted"]
PAYLOADS: tuple[EventName, ...] = ("audio", "preview")  # large ones, which are dropped when a job is over
_HELD_MAX = 64 << 20  # letters of audio; beyond them the oldest is dropped, whoever has not read it


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """Hold one event; ``data`` is JSON."""

    name: EventName
    data: dict[str, Any]


class Feed:
    """Collect the events of one job. ``append`` and ``close`` may be called from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None) -> None:
        self.events: list[JobEvent | None] = []  # None: dropped
        self.closed = False
        self.watched = 0  # listeners that want previews
        self._held = self._first = 0  # letters of audio from event ``_first`` on
        self._loop = loop
        self._changed = asyncio.Event()

    def append(self, name: EventName, data: dict[str, Any]) -> None:
        """Add an event and wake all listeners."""
        self.events.append(JobEvent(name=name, data=data))
        self._held += len(data.get("pcm16", ""))
        while self._held > _HELD_MAX:
            oldest = self.events[self._first]
            if oldest is not None and oldest.name == "audio":
                self._held -= len(oldest.data["pcm16"])
                self.events[self._first] = None
            self._first += 1
        self._notify()

    def close(self) -> None:
        """Say that no event follows; audio and previews are dropped, as the sound itself can be had now."""
        self.events = [None if event is not None and event.name in PAYLOADS else event for event in self.events]
        self.closed = True
        self._notify()

    async def follow(
        self, position: int = 0, patience: float | None = None
    ) -> AsyncIterator[tuple[int, JobEvent | None]]:
        """Yield numbers and events from ``position`` on until the feed is closed; None after ``patience`` seconds."""
        while True:
            changed = self._changed
            while position < len(self.events):
                event = self.events[position]
                position += 1
                if event is not None:
                    yield position, event
            if self.closed:
                return
            try:
                await asyncio.wait_for(changed.wait(), patience)
            except TimeoutError:
                yield position, None

    def _notify(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
