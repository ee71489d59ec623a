"""``sa3 extend`` and ``sa3 bridge`` beyond the longest clip: given samples stay, and kill -9 changes no byte."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_mlx.cli.audio import source
from sa3_mlx.cli.audio.source import SourceFile
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.files.audio import write_audio
from tests.support.command import RATE, SMALL, Run, ok, read, tone, write_tone

ARGS = ("kick rain", "--steps", "2", "--seed", "5")


@pytest.mark.parametrize("seconds", [0.3, 2.0, 8.0])
def test_a_file_of_any_length_goes_on(run: Run, seconds: float) -> None:
    given = write_tone(Path("in.wav"), seconds)
    made = ok(run("extend", given, *ARGS, "--seconds", "12", "--out", "a.wav"))
    whole, kept = read("a.wav"), read("in.wav")
    assert len(whole) == 12 * RATE and np.array_equal(whole[: len(kept)], kept)
    assert np.abs(whole[len(kept) :]).max() > 1e-3 and not list(Path().glob("*.windows"))
    assert f"seam   {seconds:.3f} s, into the made part" in made.out and "windows made" in made.out
    assert "byte for byte" in ok(run("rerun", "a.wav")).out


@pytest.mark.parametrize("seconds", [0.5, 6.0])
def test_what_leads_up_may_be_longer_than_a_clip(run: Run, seconds: float) -> None:
    given = write_tone(Path("in.wav"), seconds)
    made = ok(run("extend", given, *ARGS, "--before", "9", "--out", "a.wav"))
    whole, kept = read("a.wav"), read("in.wav")
    assert len(whole) == 9 * RATE + len(kept) and np.array_equal(whole[9 * RATE :], kept)
    assert "9.000 s, out of the made part" in made.out and np.abs(whole[: 9 * RATE]).max() > 1e-3
    assert "byte for byte" in ok(run("rerun", "a.wav")).out


def test_a_bridge_may_be_longer_than_a_clip(run: Run) -> None:
    for name, seconds in (("a", 4.0), ("b", 0.7)):
        write_tone(Path(f"{name}.wav"), seconds)
    ok(run("bridge", "a.wav", "b.wav", *ARGS, "--seconds", "8", "--out", "c.wav"))
    first, second, whole = read("a.wav"), read("b.wav"), read("c.wav")
    assert len(whole) == len(first) + len(second) + 8 * RATE
    assert np.array_equal(whole[: len(first)], first) and np.array_equal(whole[-len(second) :], second)
    assert "byte for byte" in ok(run("rerun", "c.wav")).out


def test_finer_formats_pipes_and_pictures(run: Run) -> None:
    cut = tone(2.0)[3:-5] * np.float32(0.7)
    write_audio("in.wav", cut, RATE, "float")
    ok(run("extend", "in.wav", *ARGS, "--seconds", "9", "--drift", "a.png", "--anchor", "0.5", "--out", "a.wav"))
    assert np.array_equal(read("a.wav")[: len(cut)], cut) and Path("a.png").read_bytes().startswith(b"\x89PNG")
    write_tone(Path("b.wav"), 4.0)
    ok(run("extend", "b.wav", *ARGS, "--seconds", "9", "--out", "b.flac"))
    assert np.array_equal(read("b.flac")[: 4 * RATE], read("b.wav"))
    piped = subprocess.run(
        [*command("b.wav", "9"), "--seed", "5", "--out", "-", "--quiet"], capture_output=True, check=True
    )
    audio, rate = soundfile.read(io.BytesIO(piped.stdout), dtype="float32", always_2d=True)
    assert rate == RATE and np.array_equal(audio[: 4 * RATE], read("b.wav")) and len(audio) == 9 * RATE


def command(source: str, seconds: str) -> list[str]:
    model = str(Path(os.environ["SA3_HOME"]) / "models" / "little")
    words = ("extend", source, "kick rain", "--seconds", seconds, "--steps", "2", "--model", model)
    return [sys.executable, "-m", "sa3_mlx", *words]


def test_it_goes_on_after_kill_9_with_the_same_bytes(run: Run) -> None:
    write_tone(Path("in.wav"), 7.0)
    ok(run(*command("in.wav", "60")[3:], "--at", "20", "bell", "--seed", "5", "--out", "whole.wav"))
    words = [*command("in.wav", "60"), "--at", "20", "bell", "--out", "a.wav"]
    folder = Path("a.wav.windows")
    process = subprocess.Popen([*words, "--seed", "5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list(folder.glob("*.npy"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must be killed before it ends"
    kept = len(list(folder.glob("*.npy")))
    assert kept >= 3 and not Path("a.wav").exists()
    write_audio("other.wav", tone(7.0) * np.float32(0.5), RATE)
    Path("in.wav").rename("mine.wav")
    Path("other.wav").rename("in.wav")
    other = run(*words[3:], "--seed", "5")
    assert other.code == 2 and "another piece (it differs in input.hash)" in other.err
    Path("mine.wav").replace("in.wav")
    again = subprocess.run(words, capture_output=True, text=True, check=True)  # the seed is that of the windows
    assert f"{kept} windows of it are in a.wav.windows" in again.stderr
    assert Path("a.wav").read_bytes() == Path("whole.wav").read_bytes() and not folder.exists()


def test_of_a_long_file_only_its_end_is_held(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And passed on from the file: the sound is that of holding all of it, bit for bit, also of a resampled one."""
    for name, rate in (("in.wav", RATE), ("other.wav", 11_025)):
        write_tone(Path(name), 20.0, rate=rate)
        found = SourceFile.read(Path(name), SMALL, end=True)
        whole = SourceFile.read(Path(name), SMALL, whole=True)
        assert len(found.audio) < 5 * RATE and found.skipped % SMALL.same.samples_per_latent == 0
        blocks = [*found.beginning(SMALL), found.audio]
        assert np.array_equal(np.concatenate(blocks), whole.audio) and found.seconds == whole.seconds == 20
        assert (found.hash, found.exact) == (whole.hash, whole.exact)
        words = ("extend", name, *ARGS, "--seconds", "26", "--at", "22", "bell")
        ok(run(*words, "--out", f"a-{name}"))
        assert "byte for byte" in ok(run("rerun", f"a-{name}")).out
        with monkeypatch.context() as patch:
            patch.setattr(source, "_end", lambda blocks, _: (np.concatenate(list(blocks)), 0))
            ok(run(*words, "--out", f"b-{name}"))
        assert np.array_equal(read(f"a-{name}"), read(f"b-{name}")) and len(read(f"a-{name}")) == 26 * RATE
    told = read_provenance(Path("a-in.wav"))
    assert told.clip.seconds == 26 and told.request.made(0) == ((20.0, 26.0),)
    assert [later.start for later in told.clip.prompts_over_time] == [22.0]


REFUSED = {
    "less than there is": (["--seconds", "1"], "ask for a longer clip"),
    "a prompt after the end": (["--seconds", "9", "--at", "10", "bell"], "allowed are times above 0 and below 9 s"),
    "more than a day": (["--seconds", "86401"], "at most 86400"),
    "before more than a day": (["--before", "86401"], "allowed are 0.008 to 86400 s"),
    "window too long": (["--seconds", "9", "--window", "4"], "little makes windows of"),
    "overlap too long": (["--seconds", "9", "--overlap", "3"], "overlap is 3 s"),
    "anchor above 1": (["--seconds", "9", "--anchor", "2"], "anchor is 2"),
    "windows of a clip": (["--seconds", "3", "--anchor", "1"], "3 s fit into one window of"),
    "a peak": (["--seconds", "9", "--peak", "-1"], "--peak"),
    "a spectrogram": (["--seconds", "9", "--spectrogram", "a.png"], "--spectrogram needs the whole audio"),
    "drift as jpg": (["--seconds", "9", "--drift", "a.jpg"], "a picture of drift is a .png file"),
    "batch": (["--seconds", "9", "--batch", "2"], "is made by itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_inputs_get_one_line(refused: Callable[..., str], case: str) -> None:
    args, message = REFUSED[case]
    write_tone(Path("in.wav"), 2.0 if case in ("less than there is", "windows of a clip") else 7.0)
    assert message in refused("extend", "in.wav", "rain", *args)
