"""Run jobs one batch after the other, in the one thread that owns the device; no job takes it down."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from sa3_mlx.cli.group import message
from sa3_mlx.common.installed import Model
from sa3_mlx.server.feeds import Feed
from sa3_mlx.server.orders import Order
from sa3_mlx.server.settings import Settings
from sa3_mlx.server.store.records import JobRecord
from sa3_mlx.server.store.store import Store, new_id

from .models import Models
from .queue import Job, JobQueue
from .rates import Rates
from .runs import Runs, Stopped

log = logging.getLogger("sa3.server")


class Engine:
    """Take orders, run them and tell how far they are. All methods may be called from any thread."""

    def __init__(self, settings: Settings, store: Store, find: Callable[[str], Model]) -> None:
        self._settings, self._store = settings, store
        self.loop: asyncio.AbstractEventLoop | None = None  # that listeners run in
        self._queue = JobQueue(settings.queue_max)
        self._models = Models(settings.max_memory)
        self._rates = Rates(store.database.rates(), store.database.set_rates)
        self._open: dict[str, Job] = {}
        self._running: list[Job] = []
        self._stopping, self._unload = threading.Event(), threading.Event()
        self._runs = Runs(settings, store, self._models, self._rates, self._stopping, find)
        self._thread = threading.Thread(target=self._work, name="sa3-engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def stop(self) -> None:
        """Stop within one step; jobs that are not over are marked as interrupted."""
        self._stopping.set()
        self._queue.close()
        if self._thread.is_alive():
            self._thread.join()
        for job in list(self._open.values()):
            self._finish(job, "interrupted")

    def submit(self, order: Order, cost: float | None) -> JobRecord:
        """Store a job and queue it. Raises QueueFull beyond the limit."""
        record = JobRecord(id=new_id(), created=time.time(), kind=order.kind, state="queued", order=order.to_dict())
        job = Job(id=record.id, order=order, created=record.created, feed=Feed(self.loop), cost=cost)

        def store() -> None:
            self._store.database.add_job(record)
            self._open[job.id] = job

        self._queue.put(job, store)
        return record

    def job(self, job_id: str) -> Job | None:
        """Return a job that is not over."""
        return self._open.get(job_id)

    def cancel(self, job_id: str) -> bool:
        """Cancel a job: one that waits now, one that runs at its next step. Return whether it was not over."""
        job = self._open.get(job_id)
        if job is None:
            return False
        job.cancelled.set()
        if self._queue.remove(job):
            self._finish(job, "cancelled")
        return True

    def unload(self) -> None:
        """Free all models as soon as nothing runs."""
        self._unload.set()
        self._queue.wake()

    def progress(self, job: Job) -> dict[str, Any]:
        """Tell how far a job is: its place in the queue or its step, and the seconds that remain, if they are known."""
        if job.started is not None:
            return {"step": job.step, "steps": job.steps, "remaining": self._runs.remaining}
        ahead = self._queue.ahead(job)
        costs = [one.cost for one in (*ahead, job)]
        known = sum(cost for cost in costs if cost is not None) + (self._runs.remaining or 0.0)
        place = self._queue.places().get(job.id, 0) + (1 if self._running else 0)
        return {"place": place, "remaining": None if None in costs else round(known, 2)}

    def status(self) -> dict[str, Any]:
        """Tell what the server is doing."""
        return {
            "waiting": len(self._queue),
            "running": [job.id for job in self._running],
            "loaded": self._models.names,
        }

    def estimate(self, *arguments: Any) -> float | None:
        """Return the seconds that work is going to take: see ``Rates.seconds``."""
        return self._rates.seconds(*arguments)

    def _work(self) -> None:
        patience = self._settings.keep_alive
        while not self._stopping.is_set():
            idle = self._models.next_idle(patience) if patience >= 0 else None
            jobs = self._queue.take(self._settings.batch_max, idle)
            if jobs:
                self._run(jobs)
            elif patience >= 0:
                self._models.free_idle(patience)
            if self._unload.is_set():
                self._unload.clear()
                self._models.free_all()
        self._models.free_all()

    def _run(self, jobs: Sequence[Job]) -> None:
        """Run jobs as one batch; where that fails, each by itself, so that none takes others with it."""
        self._running = list(jobs)
        now = time.time()
        try:
            self._store.database.start_jobs([job.id for job in jobs], now)
            for job in jobs:
                job.started = now
                job.feed.append("running", {})
            self._runs.run(jobs, self._finish)
        except Stopped:
            return
        except Exception as error:  # whatever it is, the server goes on
            left = [job for job in jobs if job.id in self._open]
            if len(jobs) > 1:
                log.warning("a batch of %d failed, its jobs run one by one", len(jobs))
                if not isinstance(error, ValueError):  # which says that it does not fit, or which numbers overflowed
                    self._models.free_all()
                for job in left:
                    self._run([job])
            else:
                self._fail(left, error)
        finally:
            self._running = []

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        expected = isinstance(error, ValueError | OSError | ImportError)
        log.log(logging.INFO if expected else logging.ERROR, "a job failed", exc_info=None if expected else error)
        text = self._runs.explain(error) or message(error)
        if not expected:
            self._models.free_all()  # whatever state they are in
        for job in jobs:
            self._finish(job, "failed", plain(text, self._store))

    def _finish(self, job: Job, state: Any, error: str | None = None, sounds: Sequence[Any] | None = None) -> None:
        """Close a job: store how it ended, unless ``sounds`` were stored with it, and tell its listeners."""
        if self._open.pop(job.id, None) is None:
            return
        if sounds is None:
            try:
                self._store.finish(job.id, state, error)
            except Exception as problem:
                log.error("the end of a job could not be stored", exc_info=problem)
        made = [sound.to_dict() for sound in sounds or ()]
        job.feed.append(state, {"sounds": made} if state == "done" else {"error": error} if error else {})
        job.feed.close()


def plain(text: str, store: Store) -> str:
    """Return the words of an error without the server's own paths."""
    for path in (store.folder, store.folder.resolve()):
        text = text.replace(f"{path}/", "").replace(str(path), "the server's folder")
    return text
