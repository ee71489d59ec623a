"""Servers for tests: a studio in this process, the whole server in a thread, a client of the standard library."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sa3_mlx.cli.options.model import PrecisionOptions
from sa3_mlx.server.running import running
from sa3_mlx.server.settings import Settings
from sa3_mlx.server.store.records import OPEN, JobRecord
from sa3_mlx.server.studio import Studio

PATIENCE = 60.0


def settings(folder: Path, name: str | None = None, backend: str = "mlx") -> Settings:
    """Settings of a server with the default model of the home, which leaves the disk alone."""
    model = PrecisionOptions(name=name, backend=backend, device="auto", dtype="auto", text_dtype="auto", compiled=False)
    return Settings(folder=folder / "studio", adapters=folder / "adapters", model=model, disk_free=1, port=0)


def body(seconds: float = 0.5, seed: int = 1, prompt: str = "soft rain", **more: Any) -> dict[str, Any]:
    """What asks for one clip."""
    return {"request": {"items": [{"prompt": prompt, "seconds": seconds, "seed": seed}]}, **more}


def wait(studio: Studio, *jobs: JobRecord) -> list[JobRecord]:
    """The jobs once all of them are over."""
    deadline = time.monotonic() + PATIENCE
    while (records := [studio.job(job.id) for job in jobs]) and any(record.state in OPEN for record in records):
        assert time.monotonic() < deadline, records
        time.sleep(0.002)
    return records


def done(studio: Studio, *jobs: JobRecord) -> list[JobRecord]:
    """The jobs, all of which must be done."""
    records = wait(studio, *jobs)
    assert all(record.state == "done" for record in records), [record.error for record in records]
    return records


class Gate:
    """Hold the engine up at its next event, so that jobs can be queued meanwhile."""

    def __init__(self, studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._go = threading.Event(), threading.Event()
        original = studio.engine._runs._tell

        def tell(*arguments: Any) -> None:
            self.reached.set()
            self._go.wait()
            original(*arguments)

        monkeypatch.setattr(studio.engine._runs, "_tell", tell)
        self.job = studio.submit(body(exact=True, seed=99))
        assert self.reached.wait(30)

    def open(self) -> None:
        self._go.set()


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    data: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.data)

    @property
    def error(self) -> str:
        """The line of a refusal; checks that it is one, and that it tells nothing of the server's insides."""
        assert self.status >= 400, self
        found = self.json["error"]
        text = found["message"] if isinstance(found, dict) else found
        assert isinstance(text, str) and text and "\n" not in text, self
        assert "Traceback" not in text and "/studio" not in text and "site-packages" not in text, text
        return text


@dataclass
class Live:
    """A server that listens."""

    port: int
    studio: Studio

    def ask(
        self, method: str, path: str, data: Any = None, headers: dict[str, str] | None = None, **more: str
    ) -> Reply:
        """One request; what is no bytes goes as JSON. ``more``: headers, with _ for -."""
        wanted = {**(headers or {}), **{name.replace("_", "-"): value for name, value in more.items()}}
        if data is not None and not isinstance(data, bytes):
            data, wanted = json.dumps(data).encode(), {"content-type": "application/json", **wanted}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, data, wanted)
            answer = connection.getresponse()
            return Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, **headers)

    def post(self, path: str, data: Any = None, **headers: str) -> Reply:
        return self.ask("POST", path, data, **headers)

    def events(self, job_id: str, **more: str) -> list[tuple[str, dict[str, Any]]]:
        """All events of a job, until it is over."""
        reply = self.get(f"/api/jobs/{job_id}/events?previews=true", **more)
        assert reply.status == 200, reply
        return parse_events(reply.data.decode())

    def make(self, data: dict[str, Any]) -> dict[str, Any]:
        """The first sound of a job that must be done."""
        job = self.post("/api/jobs", data)
        assert job.status == 202, job
        name, last = self.events(job.json["id"])[-1]
        assert name == "done", last
        return last["sounds"][0]


def parse_events(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and data of server-sent events."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "event" in lines:
            found.append((lines["event"], json.loads(lines["data"])))
    return found


@contextmanager
def live(wanted: Settings, port: int = 0) -> Iterator[Live]:
    """The whole server in a thread, on a free port or a given one."""
    with running(replace(wanted, port=port)) as studio:
        yield Live(studio.settings.port, studio)
