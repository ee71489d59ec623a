"""Lines that begin with "next": each is a command that can be copied, with all that it needs."""

from __future__ import annotations

import importlib
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import click
import pytest

from sa3_mlx.assets import DEMO
from sa3_mlx.cli.app import cli
from tests.project.test_commands_in_docs import resolve
from tests.support.adapters import adapter_config, random_adapter
from tests.support.command import Run, ok, use_home

RUN = Path("runs/a run")
LATENTS = ("--latents", "a", "--latents", "b")
# module below sa3_torch.train -> function, stage, arguments, words of the next command
COMMANDS = {
    "autoencoder.stage": (
        "autoencoder",
        "AutoencoderStage",
        {"data": "my sounds", "size": "first", "folder": None, "stride": None},
        ["pre-encode", "--data", "my sounds", "--autoencoder", "runs/a run/model", "--out", "latents"],
    ),
    "flow.pretrain": (
        "pretrain",
        "PretrainStage",
        {
            "latents": (),
            "ungated": True,
            "autoencoder": DEMO,
            "tokenizer": DEMO / "tokenizer.json",
            "start": None,
            "size": "first",
        },
        ["generate", "piano note A4", "--model", "runs/a run/model"],
    ),
    "few_steps.ode_warmup": (
        "ode_warmup",
        "OdeWarmupStage",
        {"model": DEMO, "latents": (Path("a"), Path("b")), "ungated": True, "autoencoder": None, "student": None},
        ["train", "posttrain", "--model", "runs/a run/model", "--base", "demo", *LATENTS, "--out", "runs/posttrain"],
    ),
    "lora.stage": (
        "lora",
        "LoraStage",
        {"model": DEMO, "latents": (), "autoencoder": None, "kind": None, "rank": None},
        ["generate", "PROMPT", "--model", "demo", "--lora", "runs/a run/model/adapter.safetensors"],
    ),
    "quantize.stage": (
        "quantize",
        "QuantizeStage",
        {"model": DEMO, "recipe": None, "calibration": None},
        ["generate", "PROMPT", "--model", "runs/a run/model"],
    ),
}


def complete(words: list[str]) -> None:
    """Check that a command exists, has its options, and that nothing that it needs is missing."""
    command, ctx, rest = resolve(cli, words, "sa3")
    values, leftover, _ = command.make_parser(ctx).parse_args(list(rest))
    assert not leftover, words
    missing = [
        param.name for param in command.get_params(ctx) if param.required and values.get(param.name or "") is None
    ]
    assert not missing, (words, missing)
    if words[0] == "train":
        assert "--out" in words


@pytest.mark.parametrize("module", COMMANDS)
def test_after_a_training(
    module: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    function, stage, arguments, expected = COMMANDS[module]
    found = importlib.import_module(f"sa3_torch.train.{module}")
    made = MagicMock(parents={}, digest="")
    monkeypatch.setattr(found, stage, lambda *_, **__: made)
    for name in ("open_audio", "LatentSet"):
        monkeypatch.setattr(found, name, lambda *_, **__: made, raising=False)
    run = SimpleNamespace(out=RUN, settings=lambda *_: None, train=lambda *_: True)
    command = getattr(found, function)
    assert isinstance(command, click.Command) and command.callback is not None
    command.callback(run, **arguments)
    line = capfd.readouterr().out.splitlines()[-1]
    words = shlex.split(line.removeprefix("next: sa3 "))
    assert line.startswith("next: sa3 ") and words == expected
    complete(words)


def test_after_a_sound_with_model_and_adapter(
    run: Run, shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both commands are copied and make the next sound with the same model and adapter."""
    pytest.importorskip("mlx.core")
    from sa3_mlx.common.adapters.format import write_adapter

    shutil.copytree(shared_home, tmp_path / "own")
    use_home(tmp_path / "own", monkeypatch)
    (tmp_path / "own" / "models" / "little").rename(tmp_path / "own" / "models" / "my model")
    adapter = random_adapter(tmp_path / "own" / "models" / "my model", adapter_config("lora"), seed=0)
    write_adapter(Path("bell.safetensors"), adapter)
    choice = ("--model", "my model", "--lora", "bell.safetensors:0.5:0.25-1")
    made = ok(run("generate", "rain", "--seconds", "0.2", "--steps", "1", *choice, "--out", "-a.wav"))
    lines = [line.split(maxsplit=1)[1] for line in made.out.splitlines() if line.startswith("next")]
    assert lines == [
        "sa3 vary ./-a.wav --noise-level 0.6 --model 'my model' --lora bell.safetensors:0.5:0.25-1",
        "sa3 extend ./-a.wav --seconds 0.4 --model 'my model' --lora bell.safetensors:0.5:0.25-1",
    ]
    for line in lines:
        result = ok(run(*shlex.split(line)[1:], "--steps", "1"))
        assert "my model (little) on" in result.err and "adapter bell.safetensors" in result.err
    edit = ok(run("inpaint", "./-a.wav", "--region", "0:0.1", "--steps", "1", *choice, "--out", "i.wav"))
    again = edit.out.splitlines()[-1].partition("or sa3 ")[2]
    assert again == "rerun i.wav --model 'my model' --lora bell.safetensors"
    ok(run(*shlex.split(again)))


def test_after_data_commands(capfd: pytest.CaptureFixture[str]) -> None:
    from sa3_mlx.cli.train.data import _next_autoencoder

    assert not capfd.readouterr().out
    line = _next_autoencoder(Path("my sounds"))
    assert line == "next: sa3 train autoencoder --data 'my sounds' --out runs/autoencoder"
    complete(shlex.split(line)[2:])


def test_merging_is_suggested_where_adapters_only_cost_time(
    tmp_path: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """With 16-bit weights that an adapter changes at all times; not in fp32, for parts of the times, or merged."""
    pytest.importorskip("mlx.core")
    from sa3_mlx.common.adapters.format import write_adapter

    use_home(shared_home, monkeypatch)
    adapter = random_adapter(shared_home / "models" / "little", adapter_config("lora"), seed=0)
    write_adapter(tmp_path / "bell.safetensors", adapter)
    always, half = f"{tmp_path / 'bell.safetensors'}", f"{tmp_path / 'bell.safetensors'}:1:0.5-1"
    made = ("generate", "rain", "--model", "little", "--seconds", "0.1", "--steps", "1", "--force", "--out", "a.wav")
    for words, suggested in (
        (("--lora", always, "--dtype", "float16"), True),
        (("--lora", always, "--dtype", "float32"), False),
        (("--lora", half, "--dtype", "float16"), False),
        (("--lora", always, "--dtype", "float16", "--lora-merged"), False),
    ):
        assert ("note: --lora-merged" in ok(run(*made, *words)).err) == suggested, words
