"""--play hands sound to the sounddevice library while it is made."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.cli.output.speaker import Speaker
from tests.support.command import RATE, Run, ok, read, tone
from tests.support.speaker import FakeSoundDevice

Install = Callable[[FakeSoundDevice], FakeSoundDevice]
MAKE = ("generate", "rain", "--seconds", "0.5", "--steps", "1", "--format", "float")


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make a stand-in the sounddevice library."""

    def put(library: FakeSoundDevice) -> FakeSoundDevice:
        monkeypatch.setitem(sys.modules, "sounddevice", library)
        return library

    return put


def test_a_long_piece_waits_for_what_is_played(run: Run, install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the allowed seconds and a piece are in memory; and a device that fails holds nothing up."""
    monkeypatch.setattr("sa3_mlx.cli.audio.long._AHEAD_SECONDS", 1.0)
    library, held, usual = install(FakeSoundDevice()), list[int](), Speaker.wait

    def wait(speaker: Speaker, seconds: float) -> None:
        usual(speaker, seconds)
        held.append(speaker._written - sum(map(len, library.played)))

    monkeypatch.setattr(Speaker, "wait", wait)
    args = ("generate", "rain", "--seconds", "12", "--steps", "1", "--format", "float", "--play")
    ok(run(*args, "--out", "a.wav"))
    np.testing.assert_array_equal(np.concatenate(library.played), read("a.wav").clip(-1, 1))
    assert len(held) > 5 and max(held) <= RATE
    install(FakeSoundDevice(problem="Device unavailable"))
    failed = run(*args, "--out", "b.wav")
    assert failed.code == 2 and "all was written" in failed.err and len(read("b.wav")) == 12 * RATE


def test_what_is_written_is_played(run: Run, install: Install):
    library = install(FakeSoundDevice())
    ok(run(*MAKE, "--batch", "2", "--out", "a.wav", "--play"))
    wanted = np.concatenate([read("a-1.wav"), read("a-2.wav")])
    np.testing.assert_array_equal(np.concatenate(library.played), wanted.clip(-1, 1))
    assert library.formats == [{"samplerate": RATE, "channels": 2, "dtype": "float32"}] and library.ends == ["stop"]
    assert threading.get_ident() not in library.threads, "decoding does not wait for the device"


def test_a_peak_limit_is_heard_too(run: Run, install: Install):
    library = install(FakeSoundDevice())
    ok(run(*MAKE, "--out", "a.wav", "--play", "--peak", "-20"))
    np.testing.assert_array_equal(np.concatenate(library.played), read("a.wav"))
    assert np.abs(read("a.wav")).max() <= 0.1001


def test_what_play_needs_is_said_before_any_work(
    run: Run, install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    result = run(*MAKE, "--play")
    assert result.code == 2 and result.err == "sa3: --play needs the sounddevice library: pip install 'sa3[play]'\n"
    install(FakeSoundDevice(device=False))
    result = run(*MAKE, "--play")
    assert result.code == 2 and "no audio device takes 2 channels at 8000 Hz (Error querying device -1)" in result.err
    assert not list(tmp_path.iterdir())


def test_a_device_that_fails_is_named_and_the_file_is_there(run: Run, install: Install):
    install(FakeSoundDevice(problem="Device unavailable"))
    result = run(*MAKE, "--out", "a.wav", "--play")
    assert result.code == 2 and result.err.endswith("all was written, but it could not be played: Device unavailable\n")
    assert len(read("a.wav")) == RATE / 2


def test_writing_does_not_wait_and_an_error_stops_the_sound(install: Install):
    library = install(FakeSoundDevice())
    library.may_play.clear()
    with pytest.raises(KeyboardInterrupt), Speaker(RATE, 2) as speaker:
        for _ in range(20):
            speaker.write(tone(1.0))
        threading.Timer(0.05, library.may_play.set).start()
        raise KeyboardInterrupt
    assert library.ends == ["abort", "stop"] and sum(map(len, library.played)) <= RATE


def test_without_a_sound_no_device_is_opened(install: Install):
    library = install(FakeSoundDevice())
    with Speaker(RATE, 2):
        pass
    assert library.formats == []


def test_doctor_names_the_device(run: Run, install: Install, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sa3_mlx.cli.models.doctor._gflops", lambda _run: 1.0)
    install(FakeSoundDevice())
    assert "speaker      built-in output" in run("doctor").out
    install(FakeSoundDevice(device=False))
    assert "speaker      none (Error querying device -1)" in run("doctor").out
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert "speaker      none; --play needs the sounddevice library: pip install" in run("doctor").out
