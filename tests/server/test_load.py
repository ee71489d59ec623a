"""Many clients at once: no job is lost, none runs twice, memory stays, and slow listeners hold nobody up."""

from __future__ import annotations

import http.client
import os
import random
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sa3_mlx.server import feeds
from sa3_mlx.server.settings import Settings
from sa3_mlx.server.store.records import OPEN
from sa3_mlx.server.studio import Studio
from tests.support.server import Live, body, live, parse_events

pytestmark = pytest.mark.slow

CLIENTS, JOBS_EACH = 50, 20
LISTENERS = 200
GROWTH_MB = 100  # measured 20
LONGER_MB = 10  # of a piece of 300 s beyond one of 60 s, whose samples have 15 less; measured 1


def memory_mb() -> float:
    """Resident memory of this process, the server in it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def client(server: Live, number: int) -> tuple[list[str], set[str]]:
    """Queue jobs, follow some, leave in the middle of others, cancel some -> all ids, and the cancelled ones."""
    random_ = random.Random(number)
    jobs, cancelled = [], set()
    for count in range(JOBS_EACH):
        job = server.post("/api/jobs", body(0.3, seed=1000 * number + count, stream=random_.random() < 0.3)).json["id"]
        jobs.append(job)
        choice = random_.random()
        if choice < 0.15:
            time.sleep(random_.random() * 0.2)
            state = server.post(f"/api/jobs/{job}/cancel").json["state"]
            if state == "cancelled":
                cancelled.add(job)
        elif choice < 0.3:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            connection.request("GET", f"/api/jobs/{job}/events?previews=true")
            connection.getresponse().read(20)
            connection.close()
        elif choice < 0.4:
            assert server.events(job)[-1][0] == "done"
    return jobs, cancelled


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_thousand_jobs_of_fifty_clients(wanted: Settings) -> None:
    with live(wanted) as server:
        server.make(body(0.3))
        began, before = time.monotonic(), memory_mb()
        with ThreadPoolExecutor(CLIENTS) as pool:
            results = list(pool.map(lambda number: client(server, number), range(1, CLIENTS + 1)))
        queued = time.monotonic() - began
        jobs = [job for ids, _ in results for job in ids]
        database = server.studio.store.database
        while server.get("/api/status").json["waiting"] or server.get("/api/status").json["running"]:
            time.sleep(0.1)
        records = {job: database.job(job) for job in jobs}
        assert len(records) == CLIENTS * JOBS_EACH and all(records.values())
        states = [record.state for record in records.values() if record is not None]
        assert set(states) <= {"done", "cancelled"}
        assert all(records[job].state == "cancelled" for _, ids in results for job in ids if records[job] is not None)  # type: ignore[union-attr]
        sounds = [sound for record in records.values() if record is not None for sound in record.sounds]
        assert len(sounds) == len(set(sounds)) == states.count("done")
        growth = memory_mb() - before
        print(
            f"{len(jobs)} jobs, {states.count('done')} done, {states.count('cancelled')} cancelled; "
            f"queued in {queued:.1f} s, all over after {time.monotonic() - began:.1f} s; "
            f"memory {before:.0f} MB, then {growth:+.0f} MB"
        )
        assert growth < GROWTH_MB


def test_two_hundred_listeners_and_a_slow_one(wanted: Settings) -> None:
    with live(wanted) as server:
        long = body(1.0, seed=1, stream=True)
        long["request"]["sampling"] = {"steps": 300}
        alone = server.post("/api/jobs", long).json
        assert server.events(alone["id"])[-1][0] == "done"
        took = server.get(f"/api/jobs/{alone['id']}").json
        job = server.post("/api/jobs", long).json["id"]
        slow = socket.create_connection(("127.0.0.1", server.port))  # asks and never reads
        slow.sendall(f"GET /api/jobs/{job}/events?previews=true HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        seen: list[list[str]] = []
        lock = threading.Lock()

        def listen(_: int) -> None:
            reply = server.get(f"/api/jobs/{job}/events")
            with lock:
                seen.append([name for name, _ in parse_events(reply.data.decode())])

        with ThreadPoolExecutor(LISTENERS) as pool:
            list(pool.map(listen, range(LISTENERS)))
        slow.close()
        assert len(seen) == LISTENERS
        assert all(names[-1] == "done" and names.count("step") == 300 for names in seen)
        heard = server.get(f"/api/jobs/{job}").json
        spans = [found["finished"] - found["started"] for found in (took, heard)]
        print(f"alone {spans[0]:.2f} s, with {LISTENERS} listeners {spans[1]:.2f} s")


def test_malformed_requests_of_all_kinds(wanted: Settings) -> None:
    """Whatever schemathesis makes of our own OpenAPI, no answer is a defect and the server goes on."""
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    rules = hypothesis.settings(
        max_examples=12,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    statuses: Counter[int] = Counter()
    with live(wanted) as server:
        schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
        for mode in (schemathesis.GenerationMode.NEGATIVE, schemathesis.GenerationMode.POSITIVE):
            for result in schema.get_all_operations():
                operation = result.ok()
                if operation.path in ("/api/doctor", "/unload") or not _takes_something(operation):
                    continue

                def ask(case: Any) -> None:
                    reply = case.call(timeout=60)
                    statuses[reply.status_code] += 1
                    assert reply.status_code < 500, (case.as_curl_command(), reply.text[:300])

                with suppress(hypothesis.errors.Unsatisfiable):  # any text is an id: nothing is malformed there
                    rules(hypothesis.given(case=operation.as_strategy(generation_mode=mode))(ask))()
        print(f"{sum(statuses.values())} requests: {dict(sorted(statuses.items()))}")
        assert sum(statuses.values()) >= 200
        server.make(body())


def _takes_something(operation: Any) -> bool:
    """Tell whether an address has parameters or a body, which can be malformed."""
    return bool(list(operation.iter_parameters())) or bool(operation.body)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_what_is_held_does_not_grow_with_a_piece(wanted: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_HELD_MAX", 1 << 20)  # sound for listeners who are late; 64 MB of it otherwise
    highest = []
    with Studio(wanted) as studio:
        for seconds in (60.0, 300.0):
            asked = body(seconds)
            asked["request"] |= {"long": {}, "sampling": {"steps": 1}}
            job, most = studio.submit(asked), 0.0
            while (record := studio.job(job.id)).state in OPEN:
                most = max(most, memory_mb())
                time.sleep(0.02)
            assert record.state == "done" and studio.sound(record.sounds[0]).samples == seconds * 8000
            highest.append(most)
    print(f"\nmemory of a piece of 60 s {highest[0]:.0f} MB, of one of 300 s {highest[1]:.0f} MB")
    assert highest[1] - highest[0] < LONGER_MB
