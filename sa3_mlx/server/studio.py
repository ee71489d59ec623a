"""Offer what the server can do, in one place, to all interfaces: jobs, sounds, models."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.cli.audio.long import ending
from sa3_mlx.cli.audio.source import SourceFile
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.models.listing import parameters
from sa3_mlx.cli.notes import unheard
from sa3_mlx.cli.options.choice import nearby
from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.installed import DAMAGE, Model, installed, open_model
from sa3_mlx.common.schema import quoted, require
from sa3_mlx.common.text.tokenizer import Tokenizer

from .engine.engine import Engine
from .engine.rates import JobSize
from .engine.runs import LATENTS, read_source
from .feeds import JobEvent
from .orders import MAKING, Order, adapter_names, complete, find_kind
from .presets import known_prompts
from .settings import Settings
from .store.records import SECONDS_MAX, JobRecord, SoundRecord
from .store.store import Store

_PATIENCE = 1.0  # seconds between looks at the place of a job in the queue
_DOCTOR_SECONDS = 120.0


class Missing(LookupError):
    """Report an id that nothing has; the message is one line."""


class Studio:
    """Hold the store and the engine of a server. Use it in a ``with`` statement."""

    def __init__(self, settings: Settings) -> None:
        """Open the folder. Raises OSError where another server has it, FileNotFoundError without a model."""
        self.settings = settings
        self.default = find_model(settings.model.name, generates=True)
        self.store = Store(settings.folder, disk_free=settings.disk_free, upload_max=settings.upload_max)
        self.engine = Engine(settings, self.store, self.model)

    def __enter__(self) -> Studio:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()
        self.store.close()

    def model(self, name: str | None) -> Model:
        """Return an installed model, or the server's own. Raises Missing: a name is never taken for a path."""
        if name is None or name == self.default.tag:
            return self.default
        if name not in installed():
            raise Missing(f"model {quoted(name)} is not installed; there are: {', '.join(self.model_names())}")
        return find_model(name, generates=True)

    def model_names(self) -> list[str]:
        """Return the names of the models that jobs can name, the server's own first."""
        return list(dict.fromkeys((self.default.tag, *installed())))

    def models(self) -> list[dict[str, Any]]:
        """Describe the models that make sounds."""
        found = []
        for name in self.model_names():
            try:
                model = self.model(name)
                open_model(model.folder)
            except DAMAGE:
                continue
            found.append({**self.model_facts(model), "default": model == self.default})
        return found

    @staticmethod
    def model_facts(model: Model) -> dict[str, Any]:
        """Describe a model: what it makes, how it is usually sampled, which words and prompts it knows."""
        return _facts(model.folder, model.tag)

    def submit(self, body: dict[str, Any]) -> JobRecord:
        """Check what a client asks for, store it and queue it.

        Raises ValueError for what cannot be done, Missing for a model that is not there, QueueFull, Full.
        """
        self.store.pool.check_room()
        model, data = self.model(body.get("model")), body.get("request") or {}
        require(isinstance(data, dict), "request: expected an object")
        source_id, kind = body.get("source"), find_kind(body.get("kind"), data, body.get("source"))
        order = Order.from_dict(
            {
                "kind": kind,
                "model": model.tag,
                "source": source_id,
                "adapters": body.get("adapters") or [],
                "priority": body.get("priority") or 0,
                "exact": bool(body.get("exact")),
            },
            where="job",
        )
        for choice in order.adapters:
            choice.file(self.settings.adapters)
        if kind not in MAKING:
            self._check_coding(order)
            return self.engine.submit(order, None)
        if kind == "generate":
            require(source_id is None, "kind is generate, which starts from nothing: leave source out, or use vary")
            source = None
        else:
            require(source_id is not None, f"kind is {kind}, which starts from a sound: give its id as source")
            source = read_source(self.store, kind, str(source_id), model, data)
        request = complete(
            kind,
            data,
            body.get("variations") or 1,
            model,
            source,
            strength=body.get("strength"),
            streamed=bool(body.get("stream")),
        )
        return self._queue(replace(order, request=request.to_dict()), request, model)

    def notes(self, record: JobRecord) -> list[str]:
        """Say what may not be expected of a job: words that its model does not know, in a line each."""
        if record.order["request"] is None:
            return []
        model = self.model(record.order["model"])
        request = Request.from_dict(record.order["request"], audio=np.zeros((0, 1), np.float32))
        return unheard(_tokenizer(model.folder), model.tag, [request], model.config.examples)

    def _queue(self, order: Order, request: Request, model: Model) -> JobRecord:
        work = JobSize.of(request, model.config)
        return self.engine.submit(order, self.engine.estimate(model.tag, work))

    def _check_coding(self, order: Order) -> None:
        sound = self.sound(order.source or "")
        wanted = "latents" if order.kind == "decode" else "a sound"
        if (sound.subtype == LATENTS) != (order.kind == "decode"):
            raise ValueError(f"kind is {order.kind}, which takes {wanted}, and {sound.id} is not that")

    def again(self, job_id: str) -> JobRecord:
        """Queue a job again, with the same order: one that was interrupted, or to make its sounds again."""
        order = Order.from_dict(self.job(job_id).order, where="job")
        model = self.model(order.model)
        if order.kind not in MAKING:
            self._check_coding(order)
            return self.engine.submit(order, None)
        return self._queue(order, self._request(order, model)[0], model)

    def near(self, sound_id: str, count: int, spread: float) -> JobRecord:
        """Queue variations near a sound: what made it, with its noise turned towards that of other seeds.

        Raises Missing, and ValueError for a sound that has no noise of one seed.
        """
        found = self.sound(sound_id)
        order = Order.from_dict(self.maker(found).order, where="job")
        require(order.kind in MAKING, f"{found.id} was made of latents and has no seed; take the sound they are of")
        model = self.model(order.model)
        request, source = self._request(order, model)
        item = request.items[found.item]
        require(item.toward is None, f"{found.id} is near another sound already; take that one, with seed {item.seed}")
        request = replace(
            request,
            items=nearby(item, count, spread),
            init=request.init[found.item] if isinstance(request.init, tuple) else request.init,
            inpaint=request.inpaint[found.item] if isinstance(request.inpaint, tuple) else request.inpaint,
        )
        validate(ending(request, source, model.config), model.config)
        return self._queue(replace(order, request=request.to_dict(), near=found.id), request, model)

    def maker(self, sound: SoundRecord) -> JobRecord:
        """Return the job that made a sound. Raises ValueError for an upload."""
        if sound.job is None:
            raise ValueError(f"{sound.id} was uploaded, not made here: there is nothing to make again")
        return self.job(sound.job)

    def _request(self, order: Order, model: Model) -> tuple[Request, SourceFile | None]:
        """Return the request of an order, with the audio that it starts from, and where that is from."""
        if order.source is None:
            return order.read_request(None), None
        found = read_source(self.store, order.kind, order.source, model, order.request or {})
        return order.read_request(found.audio), found

    def job(self, job_id: str) -> JobRecord:
        """Return a job. Raises Missing."""
        found = self.store.database.job(job_id)
        if found is None:
            raise Missing(f"there is no job {quoted(job_id)}")
        return found

    def cancel(self, job_id: str) -> JobRecord:
        """Cancel a job; one that is over stays as it is. Raises Missing."""
        self.job(job_id)
        self.engine.cancel(job_id)
        return self.job(job_id)

    def describe(self, record: JobRecord) -> dict[str, Any]:
        """Return a job as clients see it: with its sounds, and how far it is."""
        job = self.engine.job(record.id)
        sounds = [sound.to_dict() for sound_id in record.sounds if (sound := self.store.database.sound(sound_id))]
        return {**record.to_dict(), "sounds": sounds, "progress": None if job is None else self.engine.progress(job)}

    async def follow(self, job_id: str, position: int, *, previews: bool) -> AsyncIterator[tuple[int, JobEvent | None]]:
        """Yield the events of a job, with their numbers, from ``position`` on; the last one says how it ended.

        Now and then None comes while nothing happens.

        Raises Missing at the first event.
        """
        job = self.engine.job(job_id)
        if job is None:
            record = self.job(job_id)
            data = {"sounds": self.describe(record)["sounds"]} if record.state == "done" else {"error": record.error}
            yield position, JobEvent(name=record.state, data=data)
            return
        job.feed.watched += previews
        last: dict[str, Any] | None = None
        try:
            if job.started is None:
                last = self.engine.progress(job)
                yield position, JobEvent(name="queued", data=last)
            async for number, event in job.feed.follow(position, _PATIENCE):
                if event is None and job.started is None and (now := self.engine.progress(job)) != last:
                    last, event = now, JobEvent(name="queued", data=now)
                yield number, event
        finally:
            job.feed.watched -= previews

    async def wait(self, job_id: str) -> JobRecord:
        """Wait until a job is over. Raises Missing."""
        async for _ in self.follow(job_id, 0, previews=False):
            pass
        return await asyncio.to_thread(self.job, job_id)

    def sound(self, sound_id: str) -> SoundRecord:
        """Return a sound. Raises Missing."""
        found = self.store.database.sound(sound_id)
        if found is None:
            raise Missing(f"there is no sound {quoted(sound_id)}")
        return found

    def adapters(self) -> list[str]:
        """Return the names of the adapters that jobs can use."""
        return adapter_names(self.settings.adapters)

    def doctor(self) -> dict[str, Any]:
        """Check the machine, as ``sa3 doctor`` does, in a process of its own."""
        command = [sys.executable, "-m", "sa3_mlx", "doctor"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DOCTOR_SECONDS, check=False)
        return {"ok": done.returncode == 0, "lines": done.stdout.splitlines()}


@lru_cache(maxsize=64)
def _tokenizer(folder: Path) -> Tokenizer:
    """Open the tokenizer of a model, once."""
    return open_tokenizer(folder, open_model(folder))


@lru_cache(maxsize=64)
def _facts(folder: Path, name: str) -> dict[str, Any]:
    """Describe a model, which is opened once."""
    config = open_model(folder)
    diffusion, usual, tokenizer = config.require_diffusion(), config.usual_sampling, _tokenizer(folder)
    return {
        "name": name,
        "parameters": parameters(config),
        "sample_rate": config.sample_rate,
        "channels": config.audio_channels,
        "max_seconds": config.max_seconds,
        "longest_piece": SECONDS_MAX,  # in windows
        "shortest_region": config.same.samples_per_latent / config.sample_rate,
        "sampling": usual.to_dict(),
        "dial": config.dial is not None,  # whether it takes a strength
        "head_room_seconds": diffusion.head_room_seconds,
        "words": list(tokenizer.closed_vocabulary()),
        "prompts": list(config.examples) or known_prompts(tokenizer),
    }
