"""``sa3 verify``: it passes on what is right and notices what is not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.cli import backend
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from tests.support.command import SMALL, Run, ok
from tests.support.made_golden import record_run, write_golden
from tests.support.tiny import with_clap
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.twins import Twin


def test_twins_agree(run: Run):
    if not (backend.available("mlx") and backend.available("torch")):
        pytest.skip("needs both backends")
    result = ok(run("verify", "little", "--seconds", "0.5"))
    assert "audio" in result.out and "11 passed, 0 failed" in result.out
    assert "8 steps of pingpong, guidance 1, fp32" in result.out
    assert SMALL.diffusion is not None
    base = replace(SMALL, name="base", diffusion=replace(SMALL.diffusion, objective="rectified_flow"))
    result = ok(run("verify", write_checkpoint(Path("base"), with_clap(base)), "--seconds", "0.5"))
    assert "8 steps of euler, guidance 7, fp32" in result.out and "12 passed, 0 failed" in result.out
    assert "latent CLAP" in result.out


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


def test_length_arguments_of_an_official_run_are_read_and_unknown_ones_refused(run: Run, twin: Twin):
    """The model makes up to 400 frames; this run had 150, of which 188 were asked for with its head-room."""
    checkpoint, case = write_checkpoint(Path("little"), SMALL), "t2a_batch2_true_mask"
    tensors = record_run(twin, checkpoint, case, prompt="low bell", seconds=1.0, steps=2, head_room=0.5, frames=150)
    assert tensors[f"{case}.padding_mask"].shape == (1, 150)
    told = {"prompt": "low bell", "duration": 1.0, "steps": 2, "duration_padding_sec": 0.5, "sample_size": 150 * 64}
    refused = {
        "other": ({"dist_shift": "none", "wavelet": 1}, "cannot repeat the argument dist_shift, wavelet"),
        "short": ({"sample_size": 64 * 64}, "seconds is 1: little makes above 0 to 0.51 s"),
        "roomy": ({"duration_padding_sec": 99}, "head room is 99 s"),
    }
    entries = {name: told | changes for name, (changes, _) in refused.items()} | {case: told}
    cases = {name: {"kwargs": kwargs, "objective": "rf_denoiser"} for name, kwargs in entries.items()}
    golden = write_golden(Path("made"), checkpoint, "e2e", cases, tensors)
    result = ok(run("verify", checkpoint, golden, "--backend", twin.name))
    assert "6 passed, 0 failed, 3 skipped" in result.out and f"{case} step 1 " in result.out
    for name, (_, message) in refused.items():
        assert any(name in line and message in line for line in result.out.splitlines())


def test_decoder_noise_of_an_odd_number_of_frames_is_read(run: Run, twin: Twin):
    """[B47]: SAME-S decodes 5 frames as 6, and the official code draws for all of them."""
    checkpoint, random = write_checkpoint(Path("little"), SMALL), np.random.default_rng(0)
    shapes = {"latents": (2, 8, 5), "noise0": (2, 8, 5), "noise1": (2 * 6, 4, 64)}
    arrays = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    latents, noise = (twin.array(arrays[name].swapaxes(1, 2)) for name in ("latents", "noise0"))
    tokens = twin.array(arrays["noise1"].reshape(2, 6, 4, 64))
    audio = twin.numpy(twin.load(checkpoint, "same").decode(latents, noise, tokens))
    arrays["audio"] = np.pad(audio, ((0, 0), (0, 64), (0, 0))).swapaxes(1, 2)  # as the official code leaves it [B40]
    tensors = {f"dec_stochastic.{name}": array for name, array in arrays.items()}
    golden = write_golden(Path("made"), checkpoint, "same", {"dec_stochastic": {}}, tensors)
    assert "1 passed, 0 failed" in ok(run("verify", checkpoint, golden, "--backend", twin.name)).out


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
