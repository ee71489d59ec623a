"""Addresses of shards: patterns are counted before they are expanded, and what cannot be fetched is one line."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest

from sa3_torch.train.data import urls
from sa3_torch.train.data.urls import FetchError, check_url, expand, open_url


@pytest.mark.parametrize(
    "pattern",
    [
        "name.tar",
        "",
        "a-{000..012}.tar",
        "{a,b}-{0..8..2}.tar",
        "{3..0}x{-2..2}",
        "{c..a}{X..Z}",
        "{a,b{1..3},{c,d}e}.tar",
        "{x{1,2}}",
        "{one}{}",
        "{,a}b{c,}",
        "{-05..5..5}",
        "{0..3..0}",
    ],
)
def test_names_are_those_of_bash(pattern: str) -> None:
    names = expand(pattern)
    words = ["bash", "-c", f"printf '%s\\n' {pattern}"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert list(names) == found.stdout.split("\n")[:-1] and len(names) == names.count() == len(list(names))


def test_a_million_names_are_made_one_by_one() -> None:
    names = expand("{0..999999}.tar")
    assert names.count() == 1_000_000 and list(islice(names, 2)) == ["0.tar", "1.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{0..1000000}.tar", r"stands for 1,000,001 names; up to 1,000,000 are allowed"),
        ("{0..999}{999..0}{-5..5}", r"stands for 11,000,000 names"),
        ("{" + ",".join(["{0..99999}"] * 7) + ",{1..400000}}", "up to 1,000,000|pairs of braces"),
        ("{000000000000..999999999999}" * 8, "names; up to"),
        ("{0..9}" * 9, "9 pairs of braces; up to 8"),
        ("{" * 300 + "}" * 300, "300 pairs of braces"),
        ("x{0..9.tar", "a brace has no other"),
        ("}{", "a brace has no other"),
        ("{a,b}}", "a brace has no other"),
        ("x" * 801, "a name of 801 characters"),
        ("a\nb", "line ends or control characters"),
    ],
)
def test_patterns_that_cannot_be_are_one_short_line(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        expand(pattern)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["pipe:ls", "PIPE:ls", "Pipe:x://y", "-o", "ftp://a/b.tar", "file:///etc/passwd", "HTTP://a"]
)
def test_other_addresses_are_not_opened(url: str) -> None:
    with pytest.raises(
        ValueError, match=r"commands are not run|is not fetched; allowed: a path, https, http, s3, gs, hf"
    ):
        check_url(url)
    with pytest.raises(ValueError, match=r"commands are not run|is not fetched"):
        open_url(url)


def test_a_path_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    for name in ("none.tar", "x" * 300, "loop/a.tar"):
        (tmp_path / "loop").unlink(missing_ok=True)
        (tmp_path / "loop").symlink_to("loop")
        with pytest.raises(
            FileNotFoundError, match=r"/(none\.tar: no such|x+: File name too long|loop/a\.tar: )"
        ) as caught:
            open_url(f"{tmp_path}/{name}")
        assert "Errno" not in str(caught.value)


def _program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script in place of a program."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'curl: (6) Could not resolve host: a.invalid' >&2; exit 6",
            "curl: (6) Could not resolve host: a.invalid",
        ),
        ("echo one >&2; echo 'fatal error: 403' >&2; exit 1", "fatal error: 403"),
        ("exit 7", "exit code 7"),
        ('case "$*" in *" -C 400 "*) exit 18; esac; head -c 400 /dev/zero; exit 18', "exit code 18"),
    ],
)
def test_an_address_that_cannot_be_fetched_is_one_line(
    script: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing of the program reaches the terminal, wherever it fails: at the index, at a shard, while it is counted."""
    pytest.importorskip("webdataset", reason="the training extra is not installed")
    from sa3_torch.train.data.shards import index_shards, open_index, read_shard

    monkeypatch.setattr(urls, "_PAUSE_SECONDS", 0.0)
    _program(tmp_path / "bin", "curl", script, monkeypatch)
    url = "https://a.invalid/x-{0..1}.tar"
    for fails in (
        lambda: open_index("https://a.invalid"),
        lambda: index_shards(url, tmp_path / "index.json"),
        lambda: list(read_shard("https://a.invalid/x-0.tar")),
    ):
        with pytest.raises(FetchError) as caught:
            fails()
        said = str(caught.value)
        assert said.startswith("https://a.invalid/") and f"could not be fetched ({reason})" in said
        assert said.endswith("look at the address and the connection, then run the command again")
    assert capfd.readouterr() == ("", "") and not (tmp_path / "index.json").exists()


def test_a_program_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        FetchError, match=r"s3://a/b\.tar: could not be fetched \(it needs the program aws: No such file"
    ):
        open_url("s3://a/b.tar")


def test_a_stream_that_is_left_early_ends_its_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _program(tmp_path / "bin", "curl", "exec cat /dev/zero", monkeypatch)
    with open_url("https://a.invalid/x.tar") as stream:
        assert stream.read(10) == bytes(10)
    assert stream._process.returncode is not None  # type: ignore[attr-defined]


# --- connections that stall or break off

_BODY = bytes(range(256)) * 20_000  # 5 MB


@dataclass
class _Place:
    """A server of one file that sends so many bytes an answer, then nothing more, until the client goes."""

    sends: int
    hangs: int  # so many answers, the first ones
    breaks: bool = False  # the connection ends where it would hang
    ranges: bool = True  # whether it can begin anywhere
    asked: list[str] = field(default_factory=list)  # ranges
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def _serving(place: _Place) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            asked = self.headers.get("Range") or ""
            place.asked.append(asked)
            first = int(asked.removeprefix("bytes=").rstrip("-") or 0) if place.ranges else 0
            self.send_response(206 if asked and place.ranges else 200)
            self.send_header("Content-Length", str(len(_BODY) - first))
            if asked and place.ranges:
                self.send_header("Content-Range", f"bytes {first}-{len(_BODY) - 1}/{len(_BODY)}")
            self.end_headers()
            if len(place.asked) > place.hangs:
                self.wfile.write(_BODY[first:])
                return
            self.wfile.write(_BODY[first : first + place.sends])
            self.wfile.flush()
            if not place.breaks:
                place.over.wait(60)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/a.tar"
    finally:
        place.over.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "_STALLED_SECONDS", 0.7)
    monkeypatch.setattr(urls, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("breaks", [False, True])
def test_a_connection_that_stalls_or_breaks_off_is_gone_on_with(breaks: bool) -> None:
    place = _Place(sends=1_000_000, hangs=3, breaks=breaks)
    with _serving(place) as url, open_url(url) as stream:
        assert stream.read(100) == _BODY[:100]
        assert stream.read() == _BODY[100:] and stream.read() == b""
    begins = [int(asked.removeprefix("bytes=").rstrip("-") or 0) for asked in place.asked]
    assert len(begins) == 4 and all(0 <= 1_000_000 * n - at < 1 << 17 for n, at in enumerate(begins))  # curl's buffer


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_a_server_that_begins_at_the_start_only_is_read_again() -> None:
    place = _Place(sends=1_000_000, hangs=1, ranges=False)
    with _serving(place) as url, open_url(url) as stream:
        assert stream.read() == _BODY
    assert len(place.asked) == 3 and place.asked[2] == ""


@pytest.mark.usefixtures("impatient")
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("sends", [0, 1000])
def test_a_connection_that_stalls_for_ever_is_one_line(sends: int) -> None:
    place = _Place(sends=sends, hangs=99)
    with _serving(place) as url, open_url(url) as stream:
        with pytest.raises(FetchError, match=r"a\.tar: could not be fetched \(nothing came for 0\.7 s\); look at"):
            stream.read()
        assert len(place.asked) == 4
        assert stream._process.returncode is not None  # type: ignore[attr-defined]


@pytest.mark.usefixtures("impatient")
def test_a_program_that_begins_at_the_start_only_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """aws prints all of it again: what had come is left out; a shorter file is no end of the longer one."""
    (tmp_path / "file").write_bytes(_BODY)
    (tmp_path / "tries").write_text("")
    script = f'echo x >> {tmp_path}/tries; [ $(wc -l < {tmp_path}/tries) -gt 1 ] && exec cat "{tmp_path}/file"'
    _program(tmp_path / "bin", "aws", f'{script}; head -c 700000 "{tmp_path}/file"; exec sleep 60', monkeypatch)
    with open_url("s3://bucket/a.tar") as stream:
        assert stream.read() == _BODY
    (tmp_path / "tries").write_text("")
    with open_url("s3://bucket/a.tar") as stream:
        assert stream.read(700_000) == _BODY[:700_000]
        (tmp_path / "file").write_bytes(_BODY[:600_000])
        with pytest.raises(FetchError, match="it ends at byte 600000, 700000 had come before it broke off"):
            stream.read(1)


def test_a_connection_that_fails_leaves_no_recording_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A shard that cannot be fetched for a moment stops the encoding; the same command goes on, with all of it."""
    pytest.importorskip("torch", reason="the training twin needs torch")
    pytest.importorskip("webdataset", reason="the training extra is not installed")
    import numpy as np
    import soundfile

    from sa3_mlx.cli.app import run
    from tests.support.command import AUTOENCODER, RATE
    from tests.support.tiny_checkpoint import write_checkpoint

    folder, model = tmp_path / "in", write_checkpoint(tmp_path / "autoencoder", AUTOENCODER)
    folder.mkdir()
    for number in range(120):
        audio = np.random.default_rng(number).integers(-9000, 9000, (400, 2)).astype(np.int16)
        soundfile.write(folder / f"{number:03d}.wav", audio, RATE)
        (folder / f"{number:03d}.txt").write_text("noise\n")
    assert run(["data", "shards", str(folder), str(tmp_path / "shards")]) == 0
    fails = f'[ -e "{tmp_path}/down" ] && exit 7'
    reads = f'for url; do :; done; exec cat "{tmp_path}/shards/${{url##*/}}"'
    _program(tmp_path / "bin", "curl", f"{fails}\n{reads}", monkeypatch)
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    index["shards"][0]["name"] = f"https://a.invalid/{index['shards'][0]['name']}"
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "index.json").write_text(json.dumps(index))
    out = tmp_path / "out"
    words = ["pre-encode", "--data", tmp_path / "there", "--autoencoder", model, "--copies", "1", "--out", out]
    (tmp_path / "down").touch()
    assert run([str(word) for word in [*words, "--skip-unreadable", "100%"]]) == 2
    assert "could not be fetched (exit code 7)" in capfd.readouterr().err and not (out / "index.json").exists()
    (tmp_path / "down").unlink()
    assert run([str(word) for word in words]) == 0
    assert len(json.loads((out / "shard-00000.json").read_text())["items"]) == 120
    shutil.rmtree(out)
