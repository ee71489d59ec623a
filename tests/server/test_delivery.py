"""Sounds as they leave the server: finished as the commands finish them, to the same bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sa3_mlx.common.delivery.loudness import loudness_lufs, true_peak_db
from sa3_mlx.common.delivery.settings import Delivery
from sa3_mlx.server.store import store as store_module
from sa3_mlx.server.studio import Studio
from tests.support.command import Run, ok, tone
from tests.support.server import Live, body, done


@pytest.fixture(scope="module")
def made(server: Live) -> dict[str, Any]:
    """A sound."""
    return server.make(body(1.0, seed=8))


def sound(server: Live, made: dict[str, Any], query: str) -> tuple[np.ndarray, int]:
    reply = server.get(f"/api/sounds/{made['id']}/audio?samples=float&{query}")
    assert reply.status == 200, reply
    return soundfile.read(io.BytesIO(reply.data), dtype="float32", always_2d=True)


def test_a_finished_sound_has_the_bytes_of_the_command_s_file(run: Run, studio: Studio) -> None:
    pytest.importorskip("pyloudnorm")
    job = done(studio, studio.submit(body(0.7, seed=5, exact=True)))[0]
    found = studio.sound(job.sounds[0])
    ways: dict[str, tuple[Delivery, list[str]]] = {
        "loud.wav": (
            Delivery(loudness_lufs=-14.0, true_peak_db=-1.0, limit=True),
            ["--loudness", "-14", "--true-peak", "-1", "--limit"],
        ),
        "faded.mp3": (
            Delivery(fade_in=0.1, fade_out=0.2, rate=16000),
            ["--fade-in", "0.1", "--fade-out", "0.2", "--rate", "16000"],
        ),
        "cut.flac": (Delivery(trim_silence=True, peak_db=-3.0), ["--trim-silence", "--peak", "-3"]),
    }
    words = ["generate", "soft rain", "--seconds", "0.7", "--seed", "5", "--backend", "mlx", "-q"]
    for name, (delivery, options) in ways.items():
        ok(run(*words, *options, "--out", name))
        exported = studio.store.export(found, Path(name).suffix, None, delivery)
        assert exported.read_bytes() == Path(name).read_bytes(), name


def test_a_file_that_cannot_be_written_is_called_as_the_sound_is(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = done(studio, studio.submit(body(0.3, seed=5)))[0]
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"^soft rain 5\.m4a: \.m4a is written by ffmpeg, which is not here"):
        studio.store.export(studio.sound(job.sounds[0]), ".m4a", None)


def test_levels_and_ends_are_what_was_asked_for(server: Live, made: dict[str, Any]) -> None:
    pytest.importorskip("pyloudnorm")
    loud, rate = sound(server, made, "loudness_lufs=-20&true_peak_db=-3&limit=true")
    assert abs(loudness_lufs(loud, rate) + 20) < 0.1 and true_peak_db(loud) <= -3
    plain, _ = sound(server, made, "")
    faded, _ = sound(server, made, "fade_in=0.25&fade_out=0.25")
    assert np.array_equal(faded[2000:6000], plain[2000:6000]) and np.abs(faded[[0, -1]]).max() < 1e-4
    assert sound(server, made, "rate=16000")[1] == 16000


def test_what_was_not_reached_is_said(server: Live, made: dict[str, Any]) -> None:
    pytest.importorskip("pyloudnorm")
    address = f"/api/sounds/{made['id']}/audio?loudness_lufs=0&true_peak_db=-10"
    for _ in range(2):  # as it is made, and of the copy
        reply = server.get(address, range="bytes=0-0")
        assert (reply.status, len(reply.data)) == (206, 1)
        assert "0 LUFS cannot be reached below that ceiling" in reply.headers["x-notes"]
    assert "x-notes" not in server.get(f"/api/sounds/{made['id']}/audio?peak_db=-10").headers


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("loudness_lufs=4", "loudness is 4 LUFS: allowed are -60 to 0"),
        ("true_peak_db=nan", "true peak is"),
        ("peak_db=-1&true_peak_db=-1", "give one ceiling"),
        ("fade_in=0.6&fade_out=0.6", "do not fit into 1 s"),
        ("safe=true&samples=float", "no effect in a float file"),
        ("format=mp3&rate=12345", "mp3 takes"),
        ("rate=9", "rate is 9 Hz"),
        ("trim_silence=maybe", "trim_silence"),
    ],
)
def test_what_cannot_be_done_is_refused(server: Live, made: dict[str, Any], query: str, words: str) -> None:
    reply = server.get(f"/api/sounds/{made['id']}/audio?{query}")
    assert reply.status == 422 and words in reply.error


def test_kept_samples_are_not_cut_off(server: Live, made: dict[str, Any]) -> None:
    order = {"kind": "inpaint", "source": made["id"], "request": {"inpaint": {"regions": [[0.2, 0.4]]}}}
    edited = server.make(order)
    assert "cuts kept samples off" in server.get(f"/api/sounds/{edited['id']}/audio?trim_silence=true").error


def test_what_needs_the_whole_sound_has_a_limit(
    server: Live, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_WHOLE_SECONDS", 0.9)
    refused = server.get(f"/api/sounds/{made['id']}/audio?peak_db=-7").error
    assert "--peak needs the whole sound in memory: up to 0.9 s, this one has 1 s" in refused
    assert server.get(f"/api/sounds/{made['id']}/audio?fade_in=0.3").status == 200


def test_a_missing_library_is_named(server: Live, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyloudnorm", None)
    reply = server.get(f"/api/sounds/{made['id']}/audio?loudness_lufs=-11")
    assert reply.status == 501 and "pip install 'sa3[loudness]'" in reply.error


def test_uploads_are_finished_too(server: Live) -> None:
    file = io.BytesIO()
    soundfile.write(file, np.concatenate([np.zeros((800, 2)), tone(0.5), np.zeros((800, 2))]), 8000, format="WAV")
    upload = server.post("/api/uploads?name=take.wav", file.getvalue()).json
    cut, _ = sound(server, upload, "trim_silence=true")
    assert 4000 <= len(cut) <= 4000 + 2 * 80


def test_formats_that_are_there_are_listed(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3_mlx.common.files.ffmpeg.available", lambda: False)
    status = server.get("/api/status").json
    assert status["formats"] == ["wav", "flac", "mp3", "ogg", "opus"] and isinstance(status["loudness"], bool)
