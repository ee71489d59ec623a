"""A small stand-in for the hub on this machine: it lists, serves, cuts, refuses and lies as a test asks."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = "import sys; from sa3_mlx.cli import main; sys.argv[0] = 'sa3'; main()"
_LARGE = (".npz", ".safetensors")  # kept outside of git


@dataclass
class Hub:
    """What it serves and what it was asked."""

    repositories: dict[str, Path]  # folders by id
    status: int = 200  # of every answer
    cut: dict[str, int] = field(default_factory=dict)  # file -> bytes after which its next download breaks off
    stalls: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes after which its next downloads hang
    over: threading.Event = field(default_factory=threading.Event)  # what hangs is let go
    lies: set[str] = field(default_factory=set)  # files that it announces with another hash
    licence: str | None = None  # in the model card
    asked: list[tuple[str, str]] = field(default_factory=list)  # method or range, path
    received: dict[str, bytes] = field(default_factory=dict)  # what was uploaded, by path in the repository
    commit: str = COMMIT
    port: int = 0

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """For a process that must know this hub and nothing else."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "SA3_HOME": str(home / "sa3"),
            "HF_HOME": str(home / "hf"),
            "HF_TOKEN": "",
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **more,
        }

    def sa3(self, home: Path, *args: str, limit: int | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """Run the command in a process without a terminal; ``limit`` is the largest file that it can write."""
        code = CODE
        if limit is not None:
            code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); {CODE}"
        return subprocess.run(
            [sys.executable, "-c", code, *args],
            env=self.environment(home, **more),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=home,
            stdin=subprocess.DEVNULL,
        )


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(length or len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0].lstrip("/")
            hub.asked.append((self.headers.get("Range") or self.command, path))
            if hub.status != 200:
                codes = {401: "RepoNotFound", 403: "GatedRepo"}
                self.answer(hub.status, b"{}", {"X-Error-Code": codes.get(hub.status, ""), "Retry-After": "0"})
                return
            for repository, folder in hub.repositories.items():
                if path == f"api/models/{repository}" or path.startswith(f"api/models/{repository}/revision/"):
                    card = {} if hub.licence is None else {"cardData": {"license": hub.licence}}
                    body = {"id": repository, "sha": hub.commit, "siblings": _listing(hub, folder), **card}
                    self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
                    return
                if path.startswith(f"{repository}/resolve/"):
                    self.send_file(folder, path.removeprefix(f"{repository}/resolve/").split("/", 1)[1])
                    return
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def do_POST(self) -> None:
            path, body = self.path.split("?")[0].lstrip("/"), self._body()
            hub.asked.append(("POST", path))
            if hub.status != 200:
                self.answer(hub.status, b"{}", {"X-Error-Code": "GatedRepo", "Retry-After": "0"})
            elif path.endswith("/api/repos/create") or path == "api/repos/create":
                entry = json.loads(body)
                place = f"{entry.get('organization') or 'somebody'}/{entry['name']}"
                self._json({"url": f"http://127.0.0.1:{hub.port}/{place}"})
            elif "/preupload/" in path:
                names = [file["path"] for file in json.loads(body)["files"]]
                modes = {name: "lfs" if name.endswith(_LARGE) else "regular" for name in names}
                self._json({"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})
            elif path.endswith("info/lfs/objects/batch"):
                place = f"http://127.0.0.1:{hub.port}/store"
                objects = [
                    {**entry, "actions": {"upload": {"href": f"{place}/{entry['oid']}"}}}
                    for entry in json.loads(body)["objects"]
                ]
                self._json({"transfer": "basic", "objects": objects})
            elif "/commit/" in path:
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.received[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    if entry["key"] == "lfsFile":
                        hub.received[entry["value"]["path"]] = hub.received.pop(entry["value"]["oid"])
                self._json(
                    {"commitUrl": f"http://127.0.0.1:{hub.port}/me/x/commit/{hub.commit}", "commitOid": hub.commit}
                )
            else:
                self._json({"warnings": [], "errors": []})  # of the front matter

        def do_PUT(self) -> None:
            hub.received[self.path.rsplit("/", 1)[1]] = self._body()
            self.answer(200, b"", {})

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _json(self, data: object) -> None:
            self.answer(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

        def send_file(self, folder: Path, name: str) -> None:
            path = folder / name
            if not path.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            body = path.read_bytes()
            headers = {"ETag": f'"{_hash(path)}"', "X-Repo-Commit": hub.commit, "Accept-Ranges": "bytes"}
            start = 0
            if (asked := self.headers.get("Range")) and self.command == "GET":
                start = int(asked.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            status = 206 if start else 200
            if self.command == "GET" and name in hub.cut:
                self.close_connection = True
                return self.answer(status, body[start : hub.cut.pop(name)], headers, length=len(body) - start)
            if self.command == "GET" and hub.stalls.get(name):
                self.close_connection = True
                self.answer(status, body[start : hub.stalls[name].pop(0)], headers, length=len(body) - start)
                hub.over.wait(60)
                return None
            return self.answer(status, body[start:], headers)

    return Handler


def _listing(hub: Hub, folder: Path) -> list[dict[str, object]]:
    files = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = str(path.relative_to(folder)), path.stat().st_size
        digest = _hash(path) if name not in hub.lies else "f" * len(_hash(path))
        entry: dict[str, object] = {"rfilename": name, "size": size, "blobId": digest[:40]}
        if path.suffix in _LARGE:
            entry["lfs"] = {"sha256": digest, "size": size, "pointerSize": 134}
        files.append(entry)
    return files


def _hash(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in _LARGE:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(repositories: dict[str, Path]) -> Iterator[Hub]:
    """Serve these folders until the block ends."""
    hub = Hub(repositories=repositories)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.port = server.server_address[1]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.over.set()
        server.shutdown()
        server.server_close()
