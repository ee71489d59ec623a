"""Adapters on the command line: --lora, sa3 lora info, merge and convert, and rerun of what they made."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.cli.adapters import parse_lora
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.adapters.format import read_adapter, write_adapter
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.config import ModelConfig
from tests.support.adapters import adapter_config, random_adapter
from tests.support.command import SMALL, Run, ok, read

MAKE = ("generate", "low kick", "--seconds", "0.3", "--steps", "2", "--seed", "3", "--format", "float")


@pytest.fixture
def files(run: Run, shared_home: Path) -> list[str]:  # noqa: ARG001 (which goes to the folder)
    """Two adapters in the current folder."""
    names = ["bell.safetensors", "warm.safetensors"]
    for seed, name in enumerate(names):
        adapter = random_adapter(shared_home / "models" / SMALL.name, adapter_config("dora-rows"), seed=seed)
        write_adapter(Path(name), adapter)
    return names


@pytest.mark.parametrize(
    ("text", "path", "strength", "interval"),
    [
        ("a.safetensors", "a.safetensors", 1.0, (0.0, 1.0)),
        ("a.safetensors:0.5", "a.safetensors", 0.5, (0.0, 1.0)),
        ("dir/a:b.safetensors:-.5:0.2-.8", "dir/a:b.safetensors", -0.5, (0.2, 0.8)),
        ("a:0:0-1", "a", 0.0, (0.0, 1.0)),
    ],
)
def test_lora_texts(text: str, path: str, strength: float, interval: tuple[float, float]) -> None:
    file = parse_lora(text)
    assert (file.path, file.strength, file.interval) == (Path(path), strength, interval)


def test_generate_with_adapters_and_rerun(run: Run, files: list[str]) -> None:
    plain = read_of(run, "plain.wav")
    changed = read_of(run, "changed.wav", "--lora", files[0], "--lora", f"{files[1]}:0.5:0.3-1")
    assert np.abs(changed - plain).max() > 1e-3
    np.testing.assert_array_equal(read_of(run, "off.wav", "--lora", f"{files[0]}:0"), plain)
    made = read_provenance(Path("changed.wav"))
    assert [(a.file, a.strength, a.interval) for a in made.model.adapters] == [
        (files[0], 1.0, (0.0, 1.0)),
        (files[1], 0.5, (0.3, 1.0)),
    ]
    assert "byte for byte" in ok(run("rerun", "changed.wav", "--out", "again.wav")).out


def read_of(run: Run, out: str, *args: str) -> np.ndarray:
    result = ok(run(*MAKE, "--out", out, *args))
    assert ("adapter bell" in result.err) == ("--lora" in args)
    return read(out)


def test_rerun_refuses_other_adapters(run: Run, files: list[str]) -> None:
    read_of(run, "a.wav", "--lora", files[0])
    Path(files[0]).rename("moved.safetensors")
    assert "say where with --lora" in run("rerun", "a.wav").err
    assert "was made with" in run("rerun", "a.wav", "--lora", files[1]).err
    ok(run("rerun", "a.wav", "--lora", "moved.safetensors"))


def test_merged_model_makes_the_same_sound(run: Run, files: list[str], shared_home: Path) -> None:
    both = ("--lora", f"{files[0]}:0.7", "--lora", files[1])
    wanted = read_of(run, "a.wav", *both)
    result = ok(run("lora", "merge", "little", f"{files[0]}:0.7", files[1], "merged"))
    assert "layers of little changed" in result.out and not list(Path().glob(".*partial"))
    for found in (read_of(run, "b.wav", *both, "--lora-merged"), read_model(run, "merged")):
        assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()
    assert "exists already" in run("lora", "merge", "little", files[0], "merged").err
    base = shared_home / "models" / SMALL.name / "model.safetensors"
    with TensorFile.open(base) as ours, TensorFile.open("merged/model.safetensors") as theirs:
        assert ours.shapes() == theirs.shapes()


def read_model(run: Run, model: str) -> np.ndarray:
    ok(run(*MAKE, "--model", model, "--out", "model.wav"))
    return read("model.wav")


def test_convert_and_info(run: Run, files: list[str], shared_home: Path) -> None:
    ok(run("lora", "convert", files[0], "official.safetensors", "--to-official"))
    ok(run("lora", "convert", "official.safetensors", "back.safetensors"))
    ours, back = read_adapter(files[0]), read_adapter("back.safetensors")
    assert back.config == ours.config and back.layers.keys() == ours.layers.keys()
    text = ok(run("lora", "info", "official.safetensors")).out
    assert "dora-rows" in text and f"{len(ours.layers)} of {len(ours.layers)} of little" in text
    ok(run(*MAKE, "--lora", "official.safetensors", "--out", "official.wav"))
    assert ModelConfig.load(shared_home / "models" / SMALL.name).name == ours.info.base


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--lora", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("--lora", "bell.safetensors:1:0.9-0.1"), "FROM-TO"),
        (("--lora", "bell.safetensors:1:0-0.5", "--lora-merged"), "merged adapter is on at all times"),
        (("--lora", "bell.ckpt"), "only .safetensors"),
    ],
)
def test_bad_adapters_are_refused_in_one_line(run: Run, files: list[str], args: tuple[str, ...], message: str) -> None:
    shutil.copy(files[0], "bell.ckpt")
    result = run(*MAKE, *args)
    assert result.code == 2 and message in result.err and "Traceback" not in result.err
