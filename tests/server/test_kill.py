"""kill -9 at random moments, while clients upload, queue, star and delete: what is there afterwards is whole."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import soundfile

from sa3_mlx.server.listening import listen
from sa3_mlx.server.open.client import Client
from tests.support.command import write_tone
from tests.support.server import body

KILLS = 30
ROOT = Path(__file__).resolve().parents[2]


class Victim:
    """A server in a process of its own."""

    def __init__(self, model: Path, folder: Path) -> None:
        with listen("127.0.0.1", 0) as found:
            port = found.getsockname()[1]
        self.folder, self.client = folder, Client(f"http://127.0.0.1:{port}")
        words = ["serve", "--model", str(model), "--backend", "mlx", "--port", str(port), "--folder", str(folder)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SA3_HOME": str(folder.parent / "home")}
        command = [sys.executable, "-m", "sa3_mlx", *words, "--disk-free", "1MB"]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not self.client.is_there():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def trouble(victim: Victim, number: int, sounds: list[bytes], stop: threading.Event) -> None:
    """Do all that writes something, until the server is gone."""
    random_ = random.Random(number)
    while not stop.is_set():
        with contextlib.suppress(ValueError, OSError, Exception):
            choice = random_.random()
            if choice < 0.35:
                victim.client.json("POST", "/api/jobs", body(0.3, seed=random_.randrange(10**6)))
            elif choice < 0.7:
                victim.client.ask("POST", "/api/uploads", random_.choice(sounds) + bytes([random_.randrange(256)]) * 2)
            else:
                found = victim.client.json("GET", "/api/sounds", query={"limit": 20})
                if found and choice < 0.85:
                    victim.client.json("PATCH", f"/api/sounds/{random_.choice(found)['id']}", {"starred": True})
                elif found:
                    victim.client.ask("DELETE", f"/api/sounds/{random_.choice(found)['id']}")


def check(victim: Victim) -> tuple[int, int]:
    """Look at everything that a new server found -> sounds, and jobs that were interrupted."""
    sounds = victim.client.json("GET", "/api/sounds", query={"limit": 500})
    database = sqlite3.connect(victim.folder / "studio.sqlite")
    assert database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    files = {row[0] for row in database.execute("SELECT file FROM sounds")}
    on_disk = {path.name: path for path in (victim.folder / "files").glob("*/*")}
    assert files == set(on_disk), "a sound without its file, or a file that nobody has"
    for name, path in on_disk.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == name.split(".")[0]
        assert len(soundfile.read(path)[0])
    assert list((victim.folder / "incoming").iterdir()) == []
    states = dict(database.execute("SELECT id, state FROM jobs"))
    assert not set(states.values()) & {"queued", "running"}
    made = {row[0] for row in database.execute("SELECT job FROM sounds WHERE job IS NOT NULL")}
    assert all(states[job] == "done" for job in made)
    database.close()
    return len(sounds), list(states.values()).count("interrupted")


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_what_is_whole(shared_home: Path, tmp_path: Path) -> None:
    lengths = (0.2, 3.0, 20.0)
    sounds = [write_tone(tmp_path / f"{seconds}.wav", seconds, rate=44100).read_bytes() for seconds in lengths]
    random_ = random.Random(7)
    victim = Victim(shared_home / "models" / "little", tmp_path / "studio")
    counts = []
    for number in range(KILLS):
        stop = threading.Event()
        work = [threading.Thread(target=trouble, args=(victim, 10 * number + i, sounds, stop)) for i in range(4)]
        for thread in work:
            thread.start()
        time.sleep(random_.uniform(0.05, 1.5))
        victim.kill()
        stop.set()
        for thread in work:
            thread.join()
        victim = Victim(shared_home / "models" / "little", tmp_path / "studio")
        counts.append(check(victim))
    interrupted = victim.client.json("GET", "/api/jobs", query={"state": "interrupted", "limit": 5})
    print(f"{KILLS} kills, at the end {counts[-1][0]} sounds, {counts[-1][1]} jobs interrupted; all whole")
    job = victim.client.json("POST", f"/api/jobs/{interrupted[0]['id']}/again")
    while victim.client.json("GET", f"/api/jobs/{job['id']}")["state"] in ("queued", "running"):
        time.sleep(0.05)
    assert victim.client.json("GET", f"/api/jobs/{job['id']}")["state"] == "done"
    victim.kill()
