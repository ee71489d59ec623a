"""What the server refuses: other hosts and origins, no token, large bodies, paths; and what every answer carries."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sa3_mlx.server.security import is_loopback
from tests.support.command import Run, use_home, write_tone
from tests.support.server import Live, Reply, body, live, settings

TOKEN = "a token of thirty two characters!"


@pytest.fixture(scope="module")
def locked(shared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server with a token, small limits and one trusted page."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_home(shared_home, monkeypatch)
        wanted = settings(tmp_path_factory.mktemp("locked"))
        own = replace(
            wanted, token=TOKEN, origins=("https://friend.example",), names=("studio.lan",), upload_max=100_000
        )
        with live(own) as found:
            yield found


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::2]", "10.0.0.1", "0.0.0.0"]
)
def test_other_names_are_refused(server: Live, host: str) -> None:
    reply = server.get("/api/status", host=host)
    assert reply.status == 421 and "is not a name of this server" in reply.error


def test_own_names_are_not(server: Live, locked: Live) -> None:
    for host in ("localhost", f"127.0.0.1:{server.port}", "LOCALHOST:80", "[::1]:80"):
        assert server.get("/api/status", host=host).status == 200
    assert locked.get("/health", host="studio.lan").status != 421


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost.evil.example"]
)
def test_other_pages_are_refused(server: Live, origin: str) -> None:
    for method, path, data in (
        ("POST", "/api/jobs", body()),
        ("GET", "/api/sounds", None),
        ("OPTIONS", "/api/jobs", None),
    ):
        reply = server.ask(method, path, data, headers={"origin": origin})
        assert reply.status == 403 and "access-control-allow-origin" not in reply.headers
    assert server.post("/api/jobs", body(), sec_fetch_site="cross-site", sec_fetch_mode="no-cors").status == 403
    assert server.get("/", sec_fetch_site="cross-site", sec_fetch_mode="navigate").status == 200  # a link may lead here


def test_the_own_page_is_not(server: Live) -> None:
    origin = f"http://127.0.0.1:{server.port}"
    assert (
        server.ask("GET", "/api/status", headers={"origin": origin, "host": f"127.0.0.1:{server.port}"}).status == 200
    )


def test_a_page_that_was_named_may_use_the_server(locked: Live) -> None:
    friend = {"origin": "https://friend.example"}
    flight = locked.ask("OPTIONS", "/api/jobs", headers=friend)
    assert flight.status == 204 and flight.headers["access-control-allow-origin"] == "https://friend.example"
    assert "authorization" in flight.headers["access-control-allow-headers"]
    assert locked.ask("GET", "/api/status", headers=friend).status == 401
    shown = {**friend, "authorization": f"Bearer {TOKEN}", "sec-fetch-site": "cross-site"}
    reply = locked.ask("GET", "/api/status", headers=shown)
    assert reply.status == 200 and "origin" in reply.headers["vary"].lower()
    assert "access-control-allow-credentials" not in reply.headers


def test_a_token_is_needed_and_a_cookie_stands_for_it(locked: Live) -> None:
    assert locked.get("/").status == 200
    for shown in ("", TOKEN, f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xff"):
        reply = locked.get("/api/status", authorization=shown)
        assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
    for path in ("/api/sounds/x/audio", "/v1/models", "/generate", "/nothing"):
        assert locked.get(path).status == 401
    assert locked.get("/api/status", authorization=f"bearer {TOKEN}").status == 200
    assert locked.post("/api/session", {"token": "wrong"}).status == 401
    session = locked.post("/api/session", {"token": TOKEN})
    cookie = session.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert locked.get("/api/status", cookie=cookie.split(";")[0]).status == 200
    assert locked.get("/api/status", cookie="sa3_session=x").status == 401


def test_bodies_have_limits(server: Live, locked: Live) -> None:
    assert "larger than 1,048,576 bytes" in server.post("/api/jobs", b" " * ((1 << 20) + 1)).error
    shown = {"authorization": f"Bearer {TOKEN}"}
    assert locked.ask("POST", "/api/uploads", b"\0" * 1_200_000, headers=shown).status == 413
    assert "the limit of uploads" in locked.ask("POST", "/api/uploads", b"\0" * 150_000, headers=shown).error
    assert list((locked.studio.settings.folder / "incoming").iterdir()) == []


def raw(server: Live, data: bytes) -> bytes:
    """What the server answers to these bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(data)
        found = b""
        while block := connection.recv(65536):
            found += block
        return found


def test_clients_that_lie_about_their_length_leave_nothing(server: Live, tmp_path: Path) -> None:
    wave = write_tone(tmp_path / "x.wav").read_bytes()
    head = b"POST /api/uploads HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    for start in (b"content-length: 99999\r\n\r\n", b"transfer-encoding: chunked\r\n\r\n1000\r\n"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(head + start + wave[:500])
    short = raw(server, head + b"content-length: 600\r\n\r\n" + wave)
    assert b" 422 " in short.split(b"\r\n")[0]
    assert b" 400 " in raw(server, head + b"content-length: -5\r\n\r\n" + wave).split(b"\r\n")[0]
    huge = b"POST /api/jobs HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = raw(server, huge + b"20000\r\n" + b" " * 0x20000 + b"\r\n" + (b"20000\r\n" + b" " * 0x20000 + b"\r\n") * 9)
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert server.get("/api/status").status == 200
    deadline = time.monotonic() + 20
    while list((server.studio.settings.folder / "incoming").iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)  # until the server has seen that they are gone
    assert list((server.studio.settings.folder / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    "path",
    [
        "/web/../settings.py",
        "/web/%2e%2e/settings.py",
        "/web/..%2fsettings.py",
        "/web//etc/passwd",
        "/web/index.html%00",
        "/api/sounds/..%2f..%2fstudio.sqlite/audio",
        "/api/sounds/%2e%2e/audio",
        "/api/sounds/%00/audio",
        "/api/jobs/../../etc/passwd",
    ],
)
def test_paths_lead_nowhere(server: Live, path: str) -> None:
    assert server.get(path).status in (404, 422)


MALFORMED: list[Any] = [
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"request": {"items": [{"seed": ' + b"9" * 5000 + b"}]}}",
    b'{"request": {"items": [{"seconds": NaN}]}}',
    {"request": []},
    {"request": {"items": {}}},
    {"request": {"items": [{"seconds": "1"}]}},
    {"request": {"items": [{"seconds": 1e308}]}},
    {"request": {"items": [{"seconds": -1}]}},
    {"request": {"items": [{"seed": 1.5}]}},
    {"request": {"items": [{"seed": True}]}},
    {"request": {"items": [{"prompt": ["x"]}]}},
    {"request": {"items": [{"prompt": "\ud800"}]}},
    {"request": {"items": [{"audio": "/etc/passwd"}]}},
    {"request": {"items": [{}] * 257}},
    {"request": {"items": [{}], "init": {"noise_level": 0.5}}},
    {"request": {"items": [{}], "inpaint": {"regions": [[0, 1, 2]]}}, "source": "x"},
    {"request": {"items": [{}], "chunk_frames": 10**12}},
    {"request": {"items": [{}], "sampling": {"steps": 10**9}}},
    {"request": {"items": [{}], "sampling": {"guidance": {"scale": 1e9}}}},
    {"source": "../../etc/passwd"},
    {"source": {"id": 1}},
    {"adapters": [{"name": "/etc/passwd"}]},
    {"adapters": [{"name": "x", "strength": 1e300}]},
    {"priority": 10**30},
    {"variations": 0},
    {"model": "../demo"},
    {"kind": "encode"},
    {"kind": "decode", "source": "x"},
    {"unknown": 1},
]


@pytest.mark.parametrize("number", range(len(MALFORMED)))
def test_malformed_jobs_are_refused_in_one_line(server: Live, number: int) -> None:
    before = len(server.studio.store.database.jobs(limit=500))
    reply = server.post("/api/jobs", MALFORMED[number], content_type="application/json")
    assert reply.status in (400, 404, 422) and reply.error
    assert len(server.studio.store.database.jobs(limit=500)) == before


def test_every_answer_has_the_headers(server: Live) -> None:
    replies: list[Reply] = [server.get(path) for path in ("/", "/docs", "/api/status", "/nothing")]
    replies.append(server.get("/", host="evil.example"))
    for reply in replies:
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in reply.headers and "server" not in reply.headers


def test_a_defect_tells_nothing(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("/elsewhere/secret")

    monkeypatch.setattr(server.studio, "models", broken)
    reply = server.get("/api/models")
    assert reply.status == 500 and "secret" not in reply.error


def test_the_command_refuses_what_is_not_safe(run: Run) -> None:
    assert "at least 16" in run("serve", "--token", "short").err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = run("serve", "--port", port)
        assert found.code == 2 and "choose another --port" in found.err
    assert all(is_loopback(host) for host in ("localhost", "127.0.0.5", "::1"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "example.org"))
