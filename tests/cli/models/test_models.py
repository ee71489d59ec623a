"""The commands about models and latents: models, info, doctor, convert, encode, decode, and which model is meant."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common import installed as models
from sa3_mlx.common.files.audio import write_audio
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.lengths import longest
from tests.support.command import AUTOENCODER, RATE, SMALL, Run, ok, read, use_home, write_tone
from tests.support.tiny_checkpoint import write_checkpoint


@pytest.mark.parametrize("suffix", ["safetensors", "npy"])
def test_encode_then_decode(run: Run, suffix: str):
    write_tone(Path("in.wav"), 0.33)
    result = ok(run("encode", "in.wav", f"z.{suffix}", "--check"))
    assert "snr " in result.out and " dB" in result.out
    decoded = ok(run("decode", f"z.{suffix}", "out.wav", "--reference", "in.wav", "--format", "float"))
    assert len(read("out.wav")) == 2640
    snr = [line.split()[1] for text in (result.out, decoded.out) for line in text.splitlines() if line[:3] == "snr"]
    assert snr[0] == snr[1]
    if suffix == "safetensors":
        with TensorFile.open("z.safetensors") as file:
            assert file.metadata["model_hash"].startswith("sha256:") and file.info("latents")[1] == (42, 8)
    else:
        assert json.loads(Path("z.npy.json").read_text())["samples"] == "2640"
        assert np.load("z.npy").shape == (42, 8)


def test_models_and_info(run: Run, shared_home: Path):
    listing = ok(run("models")).out
    assert "little" in listing and "autoencoder" in listing and "huggingface.co/stabilityai" in listing
    text = ok(run("info", "little")).out
    assert "sha256:" in text and "parameters" in text and '"latent_channels": 8' in text
    assert text == ok(run("info", shared_home / "models" / "little")).out
    ok(run("generate", "soft rain", "--seconds", "0.2", "--seed", "9", "--out", "a.wav"))
    text = ok(run("info", "a.wav")).out
    assert "soft rain" in text and "PCM_16" in text and "peak" in text
    write_tone(Path("plain.wav"))
    assert "none" in ok(run("info", "plain.wav")).out


def test_doctor_says_what_is_here(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sa3_mlx.cli.models.doctor._SIZE", 64)
    result = run("doctor")
    assert result.code in (0, 1) and "GFLOP/s" in result.out and "GB free" in result.out
    assert (result.code == 1) == ("problem:" in result.out)


def test_convert_round_trip_through_the_official_layout(run: Run, shared_home: Path):
    result = ok(run("convert", "little", "official", "--to-official"))
    assert "parameters" in result.out
    ok(run("convert", "official", "again", "--name", "again"))
    first, second = (
        TensorFile.open(folder / "model.safetensors") for folder in (shared_home / "models" / "little", Path("again"))
    )
    with first, second:
        assert first.names() == second.names()
        for name in first.names():
            np.testing.assert_allclose(first.read(name), second.read(name), atol=1e-6)
    ok(run("generate", "rain", "--seconds", "0.2", "--model", "again", "--out", "a.wav"))


def test_convert_installs_under_a_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ok(run("convert", "little", "official", "--to-official"))
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "other"))
    assert "--model mine" in ok(run("convert", "official", "--name", "mine")).out
    ok(run("generate", "rain", "--seconds", "0.2", "--model", "mine", "--out", "a.wav"))
    made = read_provenance(Path("a.wav"))
    assert (made.model.name, made.model.config) == ("mine", "mine")


def test_released_models_come_first_then_the_demo_and_no_other_is_a_default(
    run: Run, shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.undo()
    little = shared_home / "models" / "little"
    for name in ("another", "small-music-8bit", "medium", "small-music"):
        shutil.copytree(little, tmp_path / "home" / "models" / name)
    monkeypatch.setattr(models, "DEMO_FOLDER", little)
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    assert list(models.installed()) == ["small-music", "medium", "demo", "another", "small-music-8bit"]
    assert find_model(None, generates=True).name == "small-music"
    for name in ("medium", "small-music"):
        shutil.rmtree(tmp_path / "home" / "models" / name)
    assert find_model(None, generates=True).name == "demo"
    listing = ok(run("models")).out
    assert "demo *" in listing and "another " in listing and listing.count(" *") == 1
    monkeypatch.setattr(models, "DEMO_FOLDER", tmp_path)
    assert "give --model" in run("generate", "rain", "--out", str(tmp_path / "a.wav")).err


def test_a_model_is_called_as_it_was_given(run: Run, shared_home: Path, tmp_path: Path):
    """Under its installed name or its path, beside the name in its configuration."""
    shutil.copytree(shared_home / "models" / "little", tmp_path / "own model")
    args = ("generate", "qwxyz", "--seconds", "0.2", "--steps", "1", "--backend", "mlx")
    result = ok(run(*args, "--model", "own model", "--out", "a.wav"))
    assert "own model (little) on mlx" in result.err
    made = read_provenance(Path("a.wav"))
    assert (made.model.name, made.model.config) == ("own model", "little")
    ok(run(*args, "--model", tmp_path / "own model", "--out", "b.wav"))
    assert read_provenance(Path("b.wav")).model.name == "own model", "no absolute path in tags"


def test_rerun_finds_the_model_by_its_weights(run: Run, shared_home: Path, tmp_path: Path, monkeypatch):
    own = tmp_path / "own"
    shutil.copytree(shared_home, own)
    write_checkpoint(own / "models" / "renamed", SMALL, variant="other ")
    use_home(own, monkeypatch)
    args = ("generate", "rain", "--seconds", "0.2", "--steps", "1", "--format", "float")
    ok(run(*args, "--model", "renamed", "--out", "a.wav"))
    assert "byte for byte" in ok(run("rerun", "a.wav")).out
    ok(run(*args, "--model", own / "models" / "renamed", "--out", "b.wav"))
    assert "byte for byte" in ok(run("rerun", "b.wav")).out
    (own / "models" / "renamed").rename(own / "models" / "renamed-again")
    result = ok(run("rerun", "a.wav", "--out", "c.wav"))
    assert "audio equal, tags differ" in result.out and read_provenance(Path("c.wav")).model.name == "renamed-again"
    shutil.rmtree(own / "models" / "renamed-again")
    result = run("rerun", "a.wav", "--out", "d.wav")
    assert result.code == 2 and "model renamed (sha256:" in result.err and "--model" in result.err
    result = run("rerun", "a.wav", "--out", "d.wav", "--model", "little")
    assert result.code == 2 and "model little is sha256:" in result.err and "with --model" in result.err
    result = run("rerun", "a.wav", "--out", "d.wav", "--model", "little", "--force")
    assert result.code == 1 and "no: samples differ" in result.out
    before = Path("a.wav").read_bytes()
    assert run("rerun", "a.wav", "--out", "a.wav", "--model", "little", "--force", "--quiet").code == 1
    assert Path("a.wav").read_bytes() != before


def test_the_hash_of_weights_is_remembered_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sa3_mlx.cli.fingerprint import fingerprint

    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    folder = write_checkpoint(tmp_path / "m", SMALL)
    first = fingerprint(folder, SMALL)
    monkeypatch.setattr("sa3_mlx.cli.fingerprint.file_hash", lambda *_: "sha256:new")
    assert fingerprint(folder, SMALL) == first
    shutil.rmtree(folder)
    write_checkpoint(folder, SMALL, variant="other ")
    assert fingerprint(folder, SMALL) == "sha256:new"


def test_autoencoders_can_encode(run: Run):
    write_tone(Path("in.wav"), 0.2)
    ok(run("encode", "in.wav", "z.npy", "--model", AUTOENCODER.name))


def test_latents_take_the_options_of_the_autoencoder_alone(run: Run):
    write_tone(Path("in.wav"), 0.2)
    for options in (("--dtype", "float32"), ("--text-dtype", "float32"), ("--compile",), ("-q",)):
        assert "no such option" in run("encode", "in.wav", "z.npy", *options).err.lower()
    ok(run("encode", "in.wav", "z.npy", "--backend", "torch", "--device", "cpu"))
    assert "no such option" in run("decode", "z.npy", "out.wav", "--dtype", "float32").err.lower()


def test_silence_has_no_signal_to_noise_ratio(run: Run):
    write_audio(Path("in.wav"), np.zeros((1000, 2), np.float32), RATE)
    assert "not defined, as the reference is silent" in ok(run("encode", "in.wav", "z.npy", "--check")).out


def test_the_longest_clip_is_one_number_everywhere(run: Run):
    """Rounded down, so that it can be asked for."""
    shown = f"{int(SMALL.max_seconds * 100) / 100:.2f} s"
    assert shown in ok(run("models")).out and shown in ok(run("info", "little")).out
    write_tone(Path("in.wav"))
    assert shown in run("inpaint", "in.wav", "rain", "--region", "0.1:", "--seconds", "99", "--out", "a.wav").err
    demo = replace(SMALL, sample_rate=7193)  # 400 frames of 64 samples: 3.559...
    assert longest(demo) == "3.55 s"


def test_a_converted_autoencoder_is_for_encoding(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ok(run("convert", "only-autoencoder", "official", "--to-official"))
    result = ok(run("convert", "official", "again"))
    assert "sa3 encode INPUT OUT.safetensors --model again" in result.out and "generate" not in result.out
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "other"))
    assert "sa3 encode INPUT OUT.safetensors --model mine" in ok(run("convert", "official", "--name", "mine")).out
