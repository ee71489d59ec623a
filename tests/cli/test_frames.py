"""Prompts over time and regions of their own on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.assets import DEMO
from sa3_mlx.cli.options.regions import WantedRegion, parse_region
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.generation.request import Inpaint, Patch, TimedPrompt
from sa3_mlx.common.model.config import ModelConfig
from tests.support.command import Run, ok, read, write_tone

COMMON = ("--model", "demo", "--steps", "2", "--seed", "3", "--format", "float")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("1.5:3", WantedRegion(start=1.5, end=3)),
        (":3=violin note A4", WantedRegion(start=0, end=3, prompt="violin note A4")),
        (
            "2: seed=7 strength=0.4 = a | b : 0.3",
            WantedRegion(start=2, end=None, prompt="a | b : 0.3", strength=0.4, seed=7),
        ),
        ("1:2 noise-level=.5 prompt=x=y", WantedRegion(start=1, end=2, prompt="x=y", noise_level=0.5)),
        (" 1 : 2  seed=0 ", WantedRegion(start=1, end=2, seed=0)),
    ],
)
def test_what_a_region_says(text: str, wanted: WantedRegion):
    assert parse_region(text) == wanted


def test_prompts_at_times_are_those_of_the_request(run: Run):
    ok(run("generate", "--at", "0", "snare drum", "--seconds", "0.6", "--out", "one.wav", *COMMON))
    ok(run("generate", "snare drum", "--at", "0.3", "snare drum", "--seconds", "0.6", "--out", "two.wav", *COMMON))
    np.testing.assert_array_equal(read("one.wav"), read("two.wav"))
    words = ("--at", "0.4", "bell", "--at", "0.2", "kick drum", "--prompt-fade", "0.1")
    ok(run("generate", "snare drum", *words, "--seconds", "0.6", "--out", "three.wav", *COMMON))
    made = read_provenance(Path("three.wav"))
    assert made.clip.prompts_over_time == (
        TimedPrompt(start=0.2, prompt="kick drum"),
        TimedPrompt(start=0.4, prompt="bell"),
    )
    assert made.request.prompt_fade_seconds == 0.1
    assert np.abs(read("three.wav") - read("one.wav")).max() > 1e-3
    ok(run("rerun", "three.wav", "--out", "again.wav"))
    assert Path("again.wav").read_bytes() == Path("three.wav").read_bytes()


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_regions_of_their_own_are_made_again_bit_for_bit(run: Run, backend: str):
    write_tone(Path("in.wav"), 0.6, rate=44_100)
    words = ("--region", "0.1:0.2=snare drum", "--region", "0.3:0.45 strength=0.4 seed=9 =bell", "--feather", "0.02")
    more = ("--noise-level", "0.8", "--backend", backend)
    ok(run("inpaint", "in.wav", "kick drum", *words, *more, "--out", "out.wav", *COMMON))
    made = read_provenance(Path("out.wav")).request
    level = ModelConfig.load(DEMO).noise_level(0.4, "monotone")
    assert made.init is None and isinstance(made.inpaint, Inpaint) and made.inpaint.feather_seconds == 0.02
    assert made.inpaint.regions == (
        Patch(start=0.1, end=0.2, prompt="snare drum", noise_level=0.8),
        Patch(start=0.3, end=0.45, prompt="bell", noise_level=level, seed=9),
    )
    before, after = read("in.wav"), read("out.wav")
    kept = np.ones(len(before), bool)
    for start, end in ((0.1, 0.2), (0.3, 0.45)):
        kept[int(start * 44_100) : int(end * 44_100)] = False
    np.testing.assert_array_equal(after[kept], before[kept])
    assert np.abs(after[~kept] - before[~kept]).max() > 1e-3
    ok(run("rerun", "out.wav", "--out", "again.wav"))
    assert Path("again.wav").read_bytes() == Path("out.wav").read_bytes()


def test_a_region_with_the_common_prompt_is_the_plain_one(run: Run):
    write_tone(Path("in.wav"), 0.6)
    for region, name in (("0.1:0.3", "a.wav"), ("0.1:0.3 noise-level=1 seed=3 =snare drum", "b.wav")):
        ok(run("inpaint", "in.wav", "snare drum", "--region", region, "--out", name, *COMMON))
    np.testing.assert_array_equal(read("a.wav"), read("b.wav"))


def test_other_commands_take_prompts_over_time(run: Run):
    write_tone(Path("in.wav"), 0.4)
    for command, words in (("vary", ()), ("extend", ("--seconds", "0.8"))):
        made = f"{command}.wav"
        ok(run(command, "in.wav", "bell", "--at", "0.2", "snare drum", *words, "--out", made, *COMMON))
        ok(run(command, "in.wav", "bell", *words, "--out", f"plain-{made}", *COMMON))
        assert np.abs(read(made) - read(f"plain-{made}")).max() > 1e-3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--at", "0", "y"], "several prompts begin at 0"),
        (["--at", "0", "x", "--at", "0", "y"], "several prompts begin at 0"),
        (["--at", "1", "x"], "give a PROMPT or --prompt-file"),
        (["--at", "0", "x", "--prompt-file", "p.txt"], "give either a PROMPT or --prompt-file"),
        (["x", "--at", "-1", "y"], "the prompt at -1 s: allowed are times above 0 and below 2 s"),
        (["x", "--at", "2", "y"], "the prompt at 2 s: allowed are times above 0 and below 2 s"),
        (["x", "--at", "nan", "y"], "start of a prompt is nan: expected a finite number"),
        (["x", "--at", "soon", "y"], "'soon' is not a valid float"),
        (["x", "--at", "1"], "--at"),
        (
            ["x", "--at", "0.01", "y"],
            "the prompt at 0.01 s: comes 0.01 s after the one before it; leave at least 0.023",
        ),
        (["x", "--at", "1", "y", "--at", "1", "z"], "the prompt at 1 s: comes 0 s after the one before it"),
        (["x", "--at", "1", "(y:11)"], "the prompt at 1 s: the weight of 'y' at character 1 is 11"),
        (["x", "--at", "1", "y | z : 2"], "the prompt at 1 s: the blend at character 9 is 2"),
        (["x", "--at", "1", "y" * 10_001], "the prompt at 1 s has 10,001 characters"),
        (["x", *(["--at", "1", "y"] * 65)], "65 prompts over time: allowed are up to 64"),
        (["x", "--prompt-fade", "-1"], "prompt fade is -1 s: allowed are 0 to 30 s"),
        (["x", "--prompt-fade", "31"], "prompt fade is 31 s: allowed are 0 to 30 s"),
        (["x", "--prompt-fade", "nan"], "prompt fade is nan: expected a finite number"),
    ],
)
def test_prompts_over_time_that_cannot_be_are_refused(refused: Callable[..., str], words: list[str], message: str):
    assert message in refused("generate", "--model", "demo", "--seconds", "2", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0.1:0.3 speed=2"], "'speed=2' at character 9: allowed are strength=0.4, noise-level=0.5, seed=7"),
        (["0.1:0.3 violin"], "'violin' at character 9: allowed are"),
        (["0.1:0.3:0.5"], "':0.5' at character 8: allowed are"),
        (["0.1:0.3="], "no words after '=' at character 8"),
        (["0.1:0.3 seed=1 seed=2"], "a second seed at character 16"),
        (["0.1:0.3 seed=1.5"], "seed is '1.5': expected a whole number"),
        (["0.1:0.3 seed=-1"], "seed is '-1': expected a whole number"),
        (["0.1:0.3 seed=9999999999999999999"], "region 0.1:0.3: seed is 9999999999999999999: allowed are the integers"),
        (["0.1:0.3 strength=much"], "strength is 'much': expected a number such as strength=0.4"),
        (["0.1:0.3 noise-level="], "noise-level is '': expected a number"),
        (["0.1:0.3 strength=0.5 noise-level=0.5"], "strength and noise-level say the same"),
        (["0.1:0.3 strength=2"], "strength is 2.0: allowed is above 0 and up to 1"),
        (["0.1:0.3 noise-level=0"], "region 0.1:0.3: noise level is 0: allowed is above 0 and up to 1"),
        (["0.1:0.3 noise-level=nan"], "region 0.1:0.3: noise level is nan: expected a finite number"),
        (["0.1:0.3=(bell:11)"], "region 0.1:0.3: prompt: the weight of 'bell' at character 1 is 11"),
        (["0.1:0.3=" + "x" * 10_001], "region 0.1:0.3: prompt has 10,001 characters"),
        (["0.1:0.3=bell", "--region", "0.2:0.4=kick"], "region 0.2:0.4: overlaps the region before it"),
        (["0.3:0.1=bell"], "region 0.3:0.1: is empty"),
        (["a:b=bell"], "expected START:END in seconds, such as 1.5:3 or 2:"),
        (["=bell"], "expected START:END in seconds, such as 1.5:3 or 2:"),
        (["0.1:0.3", "--feather", "-1"], "feather is -1 s: allowed are 0 to 30 s"),
        (["0.1:0.3", "--feather", "0.15"], "leaves nothing of it, 2 x 0.15 s; use up to 0.1 s"),
        (["0.4:", "--feather", "0.3"], "leaves nothing of it, 1 x 0.3 s; use up to 0.2 s"),
        (["0.1:0.3", "--feather", "nan"], "feather is nan: expected a finite number"),
        (["0.4: strength=0.5", "--seconds", "1"], "needs audio there, which ends at 0.600 s"),
        (["0.1:0.3 strength=0.5", "--schedule", "monotone"], "the monotone schedule is for init audio"),
        (
            ["0.1:0.3 strength=0.5", "--strength", "0.5", "--noise-level", "0.5"],
            "give either --noise-level or --strength",
        ),
    ],
)
def test_regions_that_cannot_be_are_refused_at_their_place(refused: Callable[..., str], words: list[str], message: str):
    write_tone(Path("in.wav"), 0.6)
    assert message in refused("inpaint", "in.wav", "bell", "--model", "demo", "--region", *words)


def test_a_strength_without_a_dial_is_refused(refused: Callable[..., str]):
    write_tone(Path("in.wav"), 0.6)
    said = refused("inpaint", "in.wav", "bell", "--model", "little", "--region", "0.1:0.3 strength=0.5")
    assert "little has no dial for strength: run 'sa3 calibrate'" in said
