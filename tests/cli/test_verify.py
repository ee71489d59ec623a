"""``sa3 verify``: it passes on what is right and notices what is not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sa3_mlx.cli import backend
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from tests.support.command import SMALL, Run, ok
from tests.support.tiny_checkpoint import write_checkpoint


def test_twins_agree(run: Run):
    if not (backend.available("mlx") and backend.available("torch")):
        pytest.skip("needs both backends")
    result = ok(run("verify", "little", "--seconds", "0.5"))
    assert "audio" in result.out and "11 passed, 0 failed" in result.out
    assert "8 steps of pingpong, guidance 1, fp32" in result.out
    assert SMALL.diffusion is not None
    base = replace(SMALL, name="base", diffusion=replace(SMALL.diffusion, objective="rectified_flow"))
    result = ok(run("verify", write_checkpoint(Path("base"), base), "--seconds", "0.5"))
    assert "8 steps of euler, guidance 7, fp32" in result.out and "11 passed, 0 failed" in result.out


@pytest.mark.parametrize("model", ["tiny-s", "tiny-l"])
def test_verify_passes_on_the_reference_and_notices_another_output(
    run: Run, checkpoints: dict[str, Path], golden: Path, model: str
):
    areas = [word for area in ("schedule", "text", "cond", "dit", "guidance") for word in ("--area", area)]
    result = ok(run("verify", checkpoints[model], golden / model, *areas))
    assert " 0 failed" in result.out
    copy = Path("golden")
    copy.mkdir()
    for name in ("manifest.json", "weights.safetensors", "dit.safetensors"):
        shutil.copy(golden / model / name, copy / name)
    with TensorFile.open(copy / "dit.safetensors") as file:
        arrays = {name: file.raw(name) for name in file.names()}
    arrays["plain.out"][0, 3, 4] += 1
    write_tensors(copy / "dit.safetensors", [array_entry(name, array) for name, array in arrays.items()], {})
    result = run("verify", checkpoints[model], copy, "--failures")
    assert result.code == 1 and "FAILED" in result.out and "1 failed" in result.out
    result = run("verify", "little", copy)
    assert result.code == 2 and "was not converted from the weights" in result.err
    del arrays["plain.out"]
    write_tensors(copy / "dit.safetensors", [array_entry(name, array) for name, array in arrays.items()], {})
    result = run("verify", checkpoints[model], copy)
    assert result.code == 2 and "has no tensor 'plain.out', which case 'dit:plain'" in result.err


def test_an_autoencoder_alone_is_compared_too(run: Run):
    if not (backend.available("mlx") and backend.available("torch")):
        pytest.skip("needs both backends")
    result = ok(run("verify", "only-autoencoder", "--seconds", "0.5"))
    assert "latents" in result.out and "audio" in result.out and "2 passed, 0 failed" in result.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("little", "--area", "same"), "--area compares outputs with GOLDEN_FOLDER"),
        (("little", "--backend", "torch"), "--backend compares outputs with GOLDEN_FOLDER"),
        (("little", ".", "--prompt", "rain"), "--prompt is for the comparison of the backends"),
        (("little", ".", "--seed", "3"), "--seed is for the comparison of the backends"),
        (("only-autoencoder", "--prompt", "rain"), "--prompt is not for only-autoencoder"),
    ],
)
def test_options_of_the_other_way_to_verify_are_refused(run: Run, args: tuple[str, ...], message: str):
    result = run("verify", *args)
    assert result.code == 2 and message in result.err
