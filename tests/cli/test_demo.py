"""The embedded demo model: small, complete, and it makes what the prompt says."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import click
import numpy as np
import pytest

from sa3_mlx.assets import DEMO
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.quant.format import check_folder
from sa3_mlx.common.text.tokenizer import Tokenizer
from tests.support.command import sa3, write_tone
from tests.support.twins import Twin

PROMPTS = {"flute note A4": 69, "organ note C4": 60, "violin note G3": 55}  # prompt -> MIDI pitch


@cache
def sounds(name: str) -> tuple[np.ndarray, ...]:
    """The three notes and white noise, made by one twin in 16 guided steps."""
    if name == "mlx":
        from sa3_mlx.pipeline import Pipeline
    else:
        from sa3_torch.pipeline import Pipeline
    items = [Item(prompt=prompt, seconds=1.0, seed=number) for number, prompt in enumerate(PROMPTS)]
    items.append(Item(prompt="white noise", seconds=1.0, seed=9))
    sampling = Sampling(sampler="euler", steps=16, guidance=Guidance(scale=3.0))
    return Pipeline.load(DEMO).generate(Request(items=tuple(items), sampling=sampling)).audio


def test_it_is_the_preset_in_at_most_12_megabytes() -> None:
    check_folder(DEMO, ModelConfig.load(DEMO))
    assert replace(ModelConfig.load(DEMO), name="first", examples=(), dial=None) == PRESETS["first"]
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 12_000_000


def test_notes_have_the_asked_pitch_and_noise_is_noise(twin: Twin) -> None:
    """Within 50 cents (measured on held-out notes: median 4 cents, 100 % within 50)."""
    pytest.importorskip("scipy", reason="the judge needs scipy")
    from sa3_torch.evaluate.judge.judge import Judge
    from sa3_torch.evaluate.judge.pitch import cents_off

    *notes, noise = sounds(twin.name)
    for audio, (prompt, midi) in zip(notes, PROMPTS.items(), strict=True):
        assert abs(cents_off(audio, midi)) <= 50, prompt
    assert Judge().classifier.classify(noise).label in ("white", "pink")


def test_both_twins_make_the_same_sound() -> None:
    """SNR after 16 guided steps with trained weights (measured: 104 dB)."""
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    pytest.importorskip("torch", reason="torch is not installed")
    ours, theirs = (np.concatenate(sounds(name)) for name in ("mlx", "torch"))
    assert 10 * np.log10((ours**2).sum() / ((ours - theirs) ** 2).sum()) >= 40


def examples() -> Iterator[str]:
    """Yield the commands of the help texts that make sounds with the usual model."""
    from sa3_mlx.cli.app import COMMANDS, cli

    texts = [cli.epilog or ""]
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        texts.append(command.help or "")
    for line in "\n".join(texts).splitlines():
        found = re.search(r'sa3 generate ".*|sa3 (vary|inpaint|extend) \w+\.wav .*', line)
        if found and "--model" not in found[0]:
            yield found[0]


def test_examples_work_with_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing in them is refused, and the demo knows every word of their prompts."""
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name in ("take.wav", "song.wav", "intro.wav"):
        write_tone(Path(name), 3.0, rate=44_100)
    tokenizer = Tokenizer(DEMO / "tokenizer.json", 12)

    def start(*_: object, compiled: bool, adapters: object, merged: bool) -> None:  # noqa: ARG001
        raise RuntimeError("it would start")

    monkeypatch.setattr("sa3_mlx.cli.backend.load", start)
    commands = list(examples())
    assert len(commands) >= 6
    for command in commands:
        words = shlex.split(command)[1:]
        assert sa3(capfd, *words).err.endswith("sa3: it would start\n"), command
        prompt = words[1] if words[0] in ("generate", "loop") else words[2]
        if prompt.startswith("--"):  # the prompts stand in options, or in the tags of the input
            continue
        assert tokenizer.count(prompt) and not tokenizer.unknown(prompt), prompt


def test_a_prompt_that_is_not_heard_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    args = ("--seconds", "0.2", "--steps", "1")
    result = sa3(capfd, "generate", "ピアノ", *args, "--out", tmp_path / "a.wav")
    assert "note: demo does not know 'ピアノ'" in result.err and "demo hears nothing of the prompt" in result.err
    assert 'note: demo does well: "piano note A4", ' in result.err
    result = sa3(capfd, "generate", "Hi-hat, A♭4!", *args, "--out", tmp_path / "b.wav")
    assert "note:" not in result.err


def test_who_asks_for_nothing_is_told_what_the_demo_does_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each example is told by ``info`` and known by the demo word by word."""
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    result = sa3(capfd, "generate")
    assert result.code == 2 and 'give a PROMPT or --prompt-file; demo does well: "piano note A4", ' in result.err
    examples = ModelConfig.load(DEMO).examples
    assert json.loads(sa3(capfd, "info", "demo", "--json").out)["does well"] == list(examples)
    tokenizer = Tokenizer(DEMO / "tokenizer.json", 12)
    assert len(examples) >= 6 and not [text for text in examples if tokenizer.unknown(text)]


def test_a_part_without_a_layer_that_fits_is_said_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the result is no default model, and a file made with it can be made again."""
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("0.3 kick drum\n" * 4)
    monkeypatch.setattr("sa3_mlx.common.quant.calibration.STEPS_MAX", 2)
    args = ("--recipe", "8bit", "--calibration", "prompts.txt")
    refused = sa3(capfd, "quantize", "demo", "x", *args, "--text-encoder", "3bit")
    assert refused.code == 2 and "--text-encoder 3bit: demo has no layer in its text encoder" in refused.err
    done = sa3(capfd, "quantize", "demo", *args)
    assert done.code == 0 and "note: demo has no layer in its text encoder" in done.err, done
    assert "sa3 generate PROMPT --model demo-8bit" in done.out
    listing = sa3(capfd, "models").out
    assert "demo *" in listing and "demo-8bit *" not in listing
    made = sa3(
        capfd,
        "generate",
        "kick drum",
        "--seconds",
        "0.2",
        "--steps",
        "1",
        "--backend",
        "mlx",
        "--model",
        "demo-8bit",
        "--out",
        "h8.wav",
    )
    assert made.code == 0 and "demo-8bit (demo) on mlx" in made.err
    again = sa3(capfd, "rerun", "h8.wav")
    assert again.code == 0 and "byte for byte" in again.out
    kept = sa3(capfd, "quantize", "demo", "y", *args, "--text-encoder", "keep")
    assert kept.code == 0 and "note:" not in kept.err
