"""``sa3 generate`` beyond the longest clip: whole files, pipes, pictures, and the same bits after kill -9."""

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

from sa3_mlx.common.generation.long.store import FolderStore
from tests.support.command import RATE, Run, ok, read, write_tone

ARGS = ("kick rain", "--seconds", "9", "--steps", "2", "--seed", "5")


def test_a_piece_is_a_file_that_can_be_made_again(run: Run) -> None:
    made = ok(run("generate", *ARGS, "--out", "a.wav"))
    assert len(read("a.wav")) == 9 * RATE and not list(Path().glob("*.windows"))
    assert "4 windows made" in made.out and "minute  level dB  centre Hz" in made.out
    assert "byte for byte" in ok(run("rerun", "a.wav")).out
    assert '"overlap_seconds": null' in ok(run("info", "a.wav", "--json")).out


def test_flac_pipe_and_picture(run: Run) -> None:
    ok(run("generate", *ARGS, "--out", "a.wav"))
    ok(run("generate", *ARGS, "--out", "a.flac", "--drift", "a.png"))
    assert np.array_equal(read("a.wav"), read("a.flac"))
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")
    piped = subprocess.run(
        [sys.executable, "-m", "sa3_mlx", "generate", *ARGS, "--out", "-", "--quiet", "--model", model()],
        capture_output=True,
        check=True,
    )
    audio, rate = soundfile.read(io.BytesIO(piped.stdout), dtype="float32", always_2d=True)
    assert rate == RATE and np.abs(audio - read("a.wav")).max() <= 2 / 32768  # chunks are shorter: rounding


def model() -> str:
    return str(Path(os.environ["SA3_HOME"]) / "models" / "little")


def test_it_goes_on_after_kill_9_with_the_same_bits(run: Run) -> None:
    long = ("kick rain", "--seconds", "60", "--steps", "2", "--model", model())
    ok(run("generate", *long, "--seed", "5", "--out", "whole.wav"))
    command = [sys.executable, "-m", "sa3_mlx", "generate", *long, "--out", "a.wav"]
    process = subprocess.Popen([*command, "--seed", "5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = Path("a.wav.windows")
    while len(list(folder.glob("*.npy"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it must be killed before it ends"
    kept = len(list(folder.glob("*.npy")))
    assert kept >= 3 and not Path("a.wav").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)  # the seed is that of the windows
    assert f"{kept} windows of it are in a.wav.windows" in again.stderr
    assert Path("a.wav").read_bytes() == Path("whole.wav").read_bytes()
    assert not folder.exists() and not list(Path().glob(".*.partial"))


def test_what_was_made_stays_after_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ok(run("generate", *ARGS, "--out", "whole.wav"))
    usual = FolderStore.write

    def full(store: FolderStore, index: int, latents: np.ndarray) -> None:
        if index == 2:
            raise OSError(28, "No space left on device", "a.wav.windows")
        usual(store, index, latents)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "write", full)
        failed = run("generate", *ARGS, "--out", "a.wav")
    assert failed.code == 2 and "2 windows stay in a.wav.windows: the same command (seed 5) goes on" in failed.err
    other = run("generate", *ARGS[:-1], "6", "--out", "a.wav")
    assert other.code == 2 and "another piece (it differs in request.items)" in other.err
    ok(run("generate", *ARGS, "--out", "a.wav"))
    assert Path("a.wav").read_bytes() == Path("whole.wav").read_bytes()


def test_another_piece_is_refused_and_force_begins_anew(run: Run) -> None:
    with FolderStore.open(Path("a.wav.windows"), {"request": {}}, anew=False) as store:
        store.write(0, np.zeros((3, 8), np.float32))
    refused = run("generate", *ARGS, "--out", "a.wav")
    assert refused.code == 2 and "a.wav.windows: has windows of another piece" in refused.err
    assert (Path("a.wav.windows") / "000000.npy").is_file()
    ok(run("generate", *ARGS, "--out", "a.wav", "--force"))
    assert len(read("a.wav")) == 9 * RATE


def test_several_pieces_and_a_memory_limit(run: Run) -> None:
    Path("p.txt").write_text("kick\nrain\n")
    args = ("--seconds", "4", "--steps", "1", "--seed", "1")
    ok(run("generate", "--prompt-file", "p.txt", *args, "--out", "a.wav", "--max-memory", "300MB"))
    assert len(read("a-1.wav")) == len(read("a-2.wav")) == 4 * RATE
    small = run("generate", "kick", *args, "--out", "b.wav", "--max-memory", "1MB")
    assert small.code == 2 and "memory: little needs" in small.err


REFUSED = {
    "batch": (["--batch", "2"], "is made by itself"),
    "a peak": (["--peak", "-1"], "--peak needs the whole audio"),
    "a spectrogram": (["--spectrogram", "a.png"], "--spectrogram needs the whole audio"),
    "drift as jpg": (["--drift", "a.jpg"], "a picture of drift is a .png file"),
    "drift in no folder": (["--drift", "no/a.png"], "no such folder"),
    "drift that exists": (["--drift", "b.png"], "exists already"),
    "window too short": (["--window", "0.01"], "little makes windows of"),
    "window too long": (["--window", "4"], "little makes windows of"),
    "window nan": (["--window", "nan"], "window is nan"),
    "window no number": (["--window", "long"], "not a valid float"),
    "overlap too long": (["--overlap", "3"], "overlap is 3 s"),
    "overlap zero": (["--overlap", "0"], "overlap is 0"),
    "overlap infinite": (["--overlap", "inf"], "overlap is inf"),
    "overlap negative": (["--overlap", "-1"], "overlap is -1"),
    "anchor above 1": (["--anchor", "2"], "anchor is 2"),
    "anchor negative": (["--anchor", "-1"], "anchor is -1"),
    "anchor nan": (["--anchor", "nan"], "anchor is nan"),
    "anchor no number": (["--anchor", "first"], "not a valid float"),
    "anchor of a clip": (["--anchor", "1", "--seconds", "1"], "1 s fit into one window of"),
    "overlap of a clip": (["--overlap", "0.5", "--seconds", "1"], "1 s fit into one window of"),
    "drift of a clip": (["--drift", "a.png", "--seconds", "1"], "1 s fit into one window of"),
    "more than a day": (["--seconds", "86401"], "at most 86400"),
    "a file that exists": (["--out", "b.wav"], "exists already"),
    "more than a wav holds": (["--seconds", "86400", "--format", "float", "--out", "a.wav"], "does not fit into a WAV"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_inputs_get_one_line(refused: Callable[..., str], case: str) -> None:
    args, message = REFUSED[case]
    if case == "a file that exists":
        write_tone(Path("b.wav"))
    Path("b.png").write_bytes(b"a picture")
    assert message in refused("generate", "rain", "--seconds", "9", *args)
