"""Loops, variations and choices on the command line: exact lengths, names, tags that make them again, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.cli.audio import loop as command
from sa3_mlx.cli.audio.loop import with_tempo
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.files.audio import read_tags
from sa3_mlx.common.generation.events import Generation
from sa3_mlx.common.generation.loop import Loop
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.measures import choice, tempo
from sa3_mlx.common.measures.choice import Grade, best, grade
from tests.support.command import RATE, Run, ok, read, tone

QUICK = ("--seed", "7", "--steps", "2")


@pytest.mark.parametrize(
    ("prompt", "known", "told"),
    [
        ("rain", True, "rain, 97.5 bpm"),
        ("rain, 90 BPM", True, "rain, 90 BPM"),
        ("rain", False, "rain"),
    ],
)
def test_a_tempo_is_put_into_the_prompt_where_the_model_knows_what_it_is(
    monkeypatch: pytest.MonkeyPatch, prompt: str, known: bool, told: str
) -> None:
    class _Words:
        def unknown(self, _text: str) -> tuple[str, ...]:
            return () if known else ("bpm",)

    monkeypatch.setattr("sa3_mlx.cli.audio.loop.open_tokenizer", lambda *_: _Words())
    assert with_tempo(prompt, 97.5, find_model("demo", generates=True)) == told


@pytest.mark.parametrize(
    ("prompt", "words", "samples"),
    [
        ("rain", ["--bpm", "120", "--bars", "1"], 16_000),
        ("rain 150 bpm", ["--bars", "1"], 12_800),
        ("BPM: 200", ["--bars", "2", "--beats-per-bar", "3"], 14_400),
        ("bell", ["--bpm", "174.3", "--bars", "2"], round(8 * 60 / 174.3 * RATE)),
        ("bell", ["--bpm", "97", "--bars", "1", "--way", "turn"], round(4 * 60 / 97 * RATE)),
        ("bell", ["--bpm", "97", "--bars", "1", "--way", "cut"], round(4 * 60 / 97 * RATE)),
    ],
)
def test_a_loop_has_the_samples_of_its_bars_and_is_made_again(
    run: Run, prompt: str, words: list[str], samples: int
) -> None:
    done = ok(run("loop", prompt, *words, "--out", "a.wav", *QUICK))
    assert len(read("a.wav")) == samples
    assert "score " in done.out and "of the inside is rougher" in done.out
    made = read_provenance(Path("a.wav"))
    assert made.command == "loop" and made.request.loop is not None and made.grade is not None
    assert 0 <= made.grade.checks["joint"] <= 1
    assert made.clip.prompt == prompt  # the model does not know what bpm are, so they are not put there
    assert "equals a.wav byte for byte" in ok(run("rerun", "a.wav")).out
    assert Path("a-rerun.wav").read_bytes() == Path("a.wav").read_bytes()


def test_the_best_of_several_tries_is_kept_and_made_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter((0.2, 0.9, 0.5))
    seen: list[Request] = []

    def marked(generation: Generation, item: int) -> Grade:
        assert item == 0
        seen.append(generation.request)
        total = next(marks)
        return Grade(total=total, checks={"sound": total})

    monkeypatch.setattr("sa3_mlx.cli.choosing.grade", marked)
    done = ok(run("generate", "bell", "--seconds", "0.5", "--best-of", "3", "--out", "a.wav", *QUICK))
    assert "best   of 3 by the checks\nscore  0.900 (sound 0.90)" in done.out and done.err.count("try ") == 3
    assert [request.items[0].seed for request in seen] == [7, 8, 9]
    made = read_provenance(Path("a.wav"))
    assert made.clip.seed == 8 and made.grade == Grade(total=0.9, checks={"sound": 0.9})
    ok(run("generate", "bell", "--seconds", "0.5", "--out", "b.wav", "--seed", "8", "--steps", "2"))
    np.testing.assert_array_equal(read("a.wav"), read("b.wav"))
    assert "grade" not in json.loads(read_tags(Path("b.wav")))
    assert "byte for byte" in ok(run("rerun", "a.wav")).out


def test_several_files_of_several_tries(run: Run) -> None:
    ok(run("generate", "bell", "--seconds", "0.5", "--batch", "2", "--best-of", "2", "--out", "a.wav", *QUICK))
    seeds = [read_provenance(Path(f"a-{number}.wav")).clip.seed for number in (1, 2)]
    assert seeds[0] in (7, 8) and seeds[1] in (9, 10)


def test_loopable_sounds_join(run: Run) -> None:
    done = ok(run("generate", "rain", "--seconds", "0.7", "--loopable", "--out", "a.wav", *QUICK))
    assert "rougher" in done.out and len(read("a.wav")) == 5600
    made = read_provenance(Path("a.wav"))
    assert made.request.loop == Loop() and "byte for byte" in ok(run("rerun", "a.wav")).out


def test_variations_are_near_their_seed(run: Run) -> None:
    ok(run("generate", "bell", "--seconds", "0.5", "--out", "plain.wav", *QUICK))
    done = ok(run("generate", "bell", "--seconds", "0.5", "--variations", "2", "--quiet", *QUICK))
    assert done.out.splitlines() == ["bell-7-8.wav seed 7", "bell-7-9.wav seed 7"]
    ok(run("generate", "bell", "--seconds", "0.5", "--variations", "2", "--spread", "0", "--out", "same.wav", *QUICK))
    ok(run("generate", "bell", "--seconds", "0.5", "--seed", "8", "--steps", "2", "--out", "other.wav"))
    plain, near, other = (read(name) for name in ("plain.wav", "bell-7-8.wav", "other.wav"))
    assert 0 < np.abs(near - plain).mean() < np.abs(other - plain).mean()
    for number in (1, 2):
        np.testing.assert_allclose(read(f"same-{number}.wav"), plain, atol=1 / 32768)  # a batch may round otherwise
    assert "byte for byte" in ok(run("rerun", "bell-7-9.wav")).out


def test_without_librosa_one_line_says_what_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (command, choice, tempo):
        monkeypatch.setattr(module, "has_librosa", lambda: False)
    done = ok(run("loop", "rain 150 bpm", "--bars", "1", "--out", "a.wav", *QUICK))
    assert done.err.count(tempo.MISSING) == 1 and "tempo" not in done.out
    with pytest.raises(ImportError, match="pip install"):
        tempo.tempo(np.zeros((100, 1)), RATE, loop=True)


def made_of(audio: np.ndarray, prompt: str = "", clipped: float = 0.0, loop: Loop | None = None) -> Generation:
    item = Item(prompt=prompt, seconds=len(audio) / RATE, seed=1)
    return Generation(
        request=Request(items=(item,), loop=loop),
        audio=(audio,),
        sample_rate=RATE,
        seeds=(1,),
        latents=(),
        seams=(),
        clipped_share=(clipped,),
        timings={},
        ways={},
    )


def test_grades_find_what_is_broken() -> None:
    good = grade(made_of(tone(1.0)), 0)
    assert good.total == 1 and set(good.checks) == {"sound", "clipping", "length"}
    assert grade(made_of(np.zeros((RATE, 2), np.float32)), 0).total == 0
    assert grade(made_of(tone(1.0), clipped=0.005), 0).checks["clipping"] == 0.5
    ended = tone(1.0)
    ended[RATE // 4 :] = 0
    assert grade(made_of(ended), 0).checks["length"] == 0.25
    looped = grade(made_of(ended, loop=Loop()), 0)
    assert looped.checks["joint"] < 0.2 and "length" not in looped.checks
    assert best([looped, good, good]) == 1


def test_keys_are_named_and_heard() -> None:
    time = np.arange(2 * RATE) / RATE
    notes = (60, 64, 67, 72, 65, 69, 71, 62)
    chord = sum(np.sin(2 * np.pi * 440 * 2 ** ((note - 69) / 12) * time) for note in notes)[:, None]
    assert tempo.key(chord, RATE) == "C major" and tempo.key(np.zeros((RATE, 1)), RATE)
    found = grade(made_of(0.1 * chord, "pads in C major"), 0)
    assert found.checks["key"] == 1 and found.heard["key"] == "C major, asked C major"
    assert grade(made_of(0.1 * chord, "Key: F# minor"), 0).checks["key"] == 0
    named = {"Key: Eb major": "D# major", "F sharp minor": "F# minor", "B flat maj": "A# major", "in a minor key": None}
    assert {text: tempo.named_key(text) for text in named} == named


def test_tempo_is_named_and_heard() -> None:
    named = {"breakbeat 120 bpm": 120.0, "BPM: 93.5 | x": 93.5, "174BPM": 174.0, "120": None, "bpm": None}
    assert {text: tempo.named_bpm(text) for text in named} == named
    assert tempo.tempo_share(120, 120) == tempo.tempo_share(60, 120) == tempo.tempo_share(240, 120) == 1
    assert tempo.tempo_share(130, 120) < 0.5 and tempo.tempo_share(140, 120) == 0
    pytest.importorskip("librosa")
    rng, clicks = np.random.default_rng(1), np.zeros((2 * 22_050, 1))
    for beat in range(4):
        clicks[beat * 11_025 :][:500, 0] = rng.normal(0, 0.3, 500)
    found = tempo.tempo(clicks, 22_050, loop=True)
    assert found is not None and abs(found - 120) < 3
    assert tempo.tempo(np.zeros((22_050, 1)), 22_050, loop=False) is None
    asked = replace(made_of(clicks, "clicks 120 bpm"), sample_rate=22_050)
    assert grade(asked, 0).checks["tempo"] > 0.8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loop", "rain"], "the tempo is missing: give --bpm, or name it in the prompt"),
        (["loop"], "Missing argument 'PROMPT'"),
        (["loop", "rain", "--bpm", "19"], "bpm is 19.0: allowed are 20 to 400"),
        (["loop", "rain", "--bpm", "401"], "bpm is 401.0: allowed are 20 to 400"),
        (["loop", "rain", "--bpm", "nan"], "bpm is nan: allowed are 20 to 400"),
        (["loop", "rain", "--bpm", "inf"], "bpm is inf: allowed are 20 to 400"),
        (["loop", "rain", "--bpm", "fast"], "'fast' is not a valid float"),
        (["loop", "rain 15 bpm"], "bpm is 15.0: allowed are 20 to 400"),
        (["loop", "rain 120 bpm", "--bpm", "121"], "the prompt says 120 bpm, --bpm says 121: leave one of them out"),
        (["loop", "rain", "--bpm", "120", "--bars", "0"], "--bars"),
        (["loop", "rain", "--bpm", "120", "--bars", "65"], "--bars"),
        (["loop", "rain", "--bpm", "120", "--bars", "1.5"], "'1.5' is not a valid integer"),
        (["loop", "rain", "--bpm", "120", "--beats-per-bar", "17"], "--beats-per-bar"),
        (
            ["loop", "rain", "--bpm", "120"],
            "bars are 4 of 4 beats at 120 bpm, 8.00 s: little makes up to 3.20 s; --bars 1 or",
        ),
        (
            ["loop", "rain", "--bpm", "60", "--bars", "1"],
            "bars are 1 of 4 beats at 60 bpm, 4.00 s: little makes up to 3.20 s; --bpm 75 or more fits",
        ),
        (["loop", "rain", "--bpm", "60", "--bars", "16", "--beats-per-bar", "8"], "fewer --beats-per-bar fits"),
        (["loop", "rain", "--bpm", "150", "--bars", "1", "--way", "knot"], "'knot' is not one of"),
        (["loop", "rain", "--bpm", "150", "--bars", "1", "--tries", "0"], "--tries"),
        (["loop", "rain", "--bpm", "150", "--bars", "1", "--tries", "257"], "--tries"),
        (
            ["loop", "rain", "--bpm", "150", "--bars", "1", "--head-room", "1"],
            "a loop has no end: leave out --head-room",
        ),
        (["loop", "rain", "--bpm", "150", "--bars", "1", "--way", "turn", "--decode-noise"], "does not go round"),
        (["loop", "rain", "--bpm", "150", "--bars", "1", "--seed", "-1"], "seed is -1"),
        (["loop", "rain", "--bpm", "150", "--bars", "1", "--model", "only-autoencoder"], "only-autoencoder"),
        (["loop", "(rain:99) 150 bpm", "--bars", "1"], "the weight of 'rain' at character 1 is 99"),
        (["generate", "rain", "--seconds", "1", "--loopable", "--head-room", "1"], "leave out head room"),
        (["generate", "rain", "--seconds", "0.02", "--loopable"], "is too short to join: at least 0.032 s"),
        (["generate", "rain", "--seconds", "9", "--loopable"], "leave out --loopable"),
        (["generate", "rain", "--spread", "0.2"], "--spread is for --variations"),
        (["generate", "rain", "--variations", "2", "--spread", "1.5"], "spread is 1.5: allowed are 0 to 1"),
        (["generate", "rain", "--variations", "2", "--spread", "nan"], "spread"),
        (["generate", "rain", "--variations", "2", "--spread", "-0.1"], "spread is -0.1: allowed are 0 to 1"),
        (["generate", "rain", "--variations", "0"], "--variations"),
        (["generate", "rain", "--variations", "65"], "--variations"),
        (["generate", "rain", "--variations", "2", "--best-of", "2"], "leave out --best-of and --batch"),
        (["generate", "rain", "--variations", "2", "--batch", "2"], "leave out --best-of and --batch"),
        (["generate", "rain", "--variations", "2", "--seed", str(2**63 - 1)], "toward: seed is 9223372036854775808"),
        (["generate", "rain", "--best-of", "0"], "--best-of"),
        (["generate", "rain", "--best-of", "2", "--seed", str(2**63 - 1)], "the last file would need seed"),
        (
            ["generate", "rain", "--best-of", "2", "--seconds", "100"],
            "leave out --loopable, --variations and --best-of",
        ),
    ],
)
def test_what_cannot_be_done_gets_one_line(refused: Callable[..., str], words: list[str], message: str) -> None:
    assert message in refused(*words)
