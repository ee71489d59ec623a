"""``sa3 bridge`` and ``sa3 extend --before``: what is there stays bit-exact, whatever its length."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.common.files.audio import write_audio
from tests.support.command import RATE, Run, ok, read, tone, write_tone

ARGS = ("kick", "--steps", "2", "--seed", "4")


@pytest.mark.parametrize("lengths", [(0.6, 0.9), (5.0, 7.3), (5.0, 0.2), (0.1, 5.0)])
def test_a_bridge_keeps_both_ends(run: Run, lengths: tuple[float, float]) -> None:
    """Short files are heard whole, long ones near the bridge."""
    for name, seconds in zip(("a", "b"), lengths, strict=True):
        write_tone(Path(f"{name}.wav"), seconds)
    made = ok(run("bridge", "a.wav", "b.wav", *ARGS, "--seconds", "0.7", "--out", "c.wav"))
    first, second, whole = read("a.wav"), read("b.wav"), read("c.wav")
    start, stop = len(first), len(whole) - len(second)
    assert stop - start == int(0.7 * RATE)
    assert np.array_equal(whole[:start], first) and np.array_equal(whole[stop:], second)
    assert np.abs(whole[start:stop]).max() > 0.001
    assert f"{start / RATE:.3f} s, into the made part" in made.out
    assert f"{stop / RATE:.3f} s, out of the made part" in made.out
    assert "byte for byte" in ok(run("rerun", "c.wav")).out
    assert '"second input"' in ok(run("info", "c.wav", "--json")).out


@pytest.mark.parametrize("seconds", [0.8, 6.0])
def test_what_leads_up_keeps_what_follows(run: Run, seconds: float) -> None:
    write_tone(Path("a.wav"), seconds)
    made = ok(run("extend", "a.wav", *ARGS, "--before", "0.5", "--out", "b.wav"))
    source, whole = read("a.wav"), read("b.wav")
    assert len(whole) == len(source) + RATE // 2 and np.array_equal(whole[RATE // 2 :], source)
    assert "0.500 s, out of the made part" in made.out and np.abs(whole[: RATE // 2]).max() > 0.001
    assert "byte for byte" in ok(run("rerun", "b.wav")).out


def test_the_finer_format_of_both_is_kept(run: Run) -> None:
    ok(run("generate", "kick", "--seconds", "0.5", "--steps", "1", "--format", "float", "--out", "a.wav"))
    write_tone(Path("b.wav"), 0.5)
    for names in (("a.wav", "b.wav"), ("b.wav", "a.wav")):
        ok(run("bridge", *names, *ARGS, "--seconds", "0.4", "--out", "c.wav", "--force"))
        first, second, whole = (read(name) for name in (*names, "c.wav"))
        assert np.array_equal(whole[: len(first)], first) and np.array_equal(whole[-len(second) :], second)


def test_another_second_file_is_not_rerun(run: Run) -> None:
    for name, seconds in (("a", 0.5), ("b", 0.5), ("d", 0.6)):
        write_tone(Path(f"{name}.wav"), seconds)
    ok(run("bridge", "a.wav", "b.wav", *ARGS, "--seconds", "0.5", "--out", "c.wav"))
    other = run("rerun", "c.wav", "--second", "d.wav")
    assert other.code == 2 and "the result would differ" in other.err
    Path("b.wav").rename("moved.wav")
    lost = run("rerun", "c.wav")
    assert lost.code == 2 and "b.wav: the input of c.wav is not here; say where it is with --second" in lost.err
    assert "byte for byte" in ok(run("rerun", "c.wav", "--second", "moved.wav")).out


REFUSED = {
    "one file": (["bridge", "a.wav", "--seconds", "1"], "SECOND"),
    "no length": (["bridge", "a.wav", "a.wav"], "--seconds"),
    "length zero": (["bridge", "a.wav", "a.wav", "--seconds", "0"], "0 s are asked for: allowed are 0.008 to 86400 s"),
    "length negative": (["bridge", "a.wav", "a.wav", "--seconds", "-1"], "-1 s are asked for"),
    "length nan": (["bridge", "a.wav", "a.wav", "--seconds", "nan"], "nan s are asked for"),
    "length of a day": (["bridge", "a.wav", "a.wav", "--seconds", "90000"], "90000 s are asked for"),
    "second file missing": (["bridge", "a.wav", "no.wav", "--seconds", "1"], "no.wav: no such audio file"),
    "first file missing": (["bridge", "no.wav", "a.wav", "--seconds", "1"], "no.wav: no such audio file"),
    "second is no sound": (["bridge", "a.wav", "a.txt", "--seconds", "1"], "a.txt"),
    "before and seconds": (["extend", "a.wav", "--before", "1", "--seconds", "3"], "give either --seconds"),
    "neither": (["extend", "a.wav"], "give either --seconds"),
    "before zero": (["extend", "a.wav", "--before", "0"], "0 s are asked for"),
    "before negative": (["extend", "a.wav", "--before", "-2"], "-2 s are asked for"),
    "before infinite": (["extend", "a.wav", "--before", "inf"], "inf s are asked for"),
    "drift of one run": (["extend", "a.wav", "--before", "1.5", "--drift", "d.png"], "--drift draws pieces"),
    "two crossfades": (["extend", "a.wav", "--before", "1", "--no-paste", "--crossfade-ms", "5"], "--no-paste"),
    "crossfade too long": (["bridge", "a.wav", "a.wav", "--seconds", "1", "--crossfade-ms", "2000"], "0 to 1000"),
    "batch": (["bridge", "a.wav", "a.wav", "--seconds", "1", "--batch", "2"], "is made by itself"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_inputs_get_one_line(refused: Callable[..., str], case: str) -> None:
    args, message = REFUSED[case]
    write_tone(Path("a.wav"), 2.0)
    Path("a.txt").write_text("no sound")
    assert message in refused(*args)


def test_there_is_no_step_and_no_corner_at_a_seam(run: Run) -> None:
    """Where both ends are cut in the middle of a wave: its own largest step is 0.17, and that of its slope 0.06."""
    cut = tone(2.0)[2005:-1995]
    assert np.abs(cut[[0, -1], 0]).min() > 0.45
    write_audio("a.wav", cut, RATE, "float")
    for args in (
        ("bridge", "a.wav", "a.wav", *ARGS, "--seconds", "0.7"),
        ("extend", "a.wav", *ARGS, "--before", "0.7"),
        ("extend", "a.wav", *ARGS, "--seconds", f"{len(cut) / RATE + 0.7}"),
        ("extend", "a.wav", *ARGS, "--seconds", "5"),
    ):
        ok(run(*args, "--out", "c.wav", "--force"))
        whole, gap = read("c.wav"), int(0.7 * RATE)
        seams = [gap] if "--before" in args else [len(cut), len(cut) + gap][: 1 + (args[0] == "bridge")]
        steps = [float(np.abs(whole[seam] - whole[seam - 1]).max()) for seam in seams]
        bends = [float(np.abs(np.diff(whole[seam - 2 : seam + 2], 2, axis=0)).max()) for seam in seams]
        assert max(steps) < 0.18 and max(bends) < 0.07, (steps, bends)
