"""The ``sa3`` command with a tiny random model: what it makes, what it prints, what it records."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command import AUTOENCODER, RATE, SMALL, Result, make_home, sa3, tone, use_home, write_tone
from tiny_checkpoint import write_checkpoint

from sa3_mlx.cli import backend, home, job
from sa3_mlx.cli.app import COMMANDS
from sa3_mlx.cli.player import Player
from sa3_mlx.cli.provenance import read_provenance
from sa3_mlx.spec.audio import read_audio, write_audio
from sa3_mlx.spec.lengths import longest
from sa3_mlx.spec.tensorfile import TensorFile

Run = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def run(shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command, in a folder of its own, with "little" as the default model."""
    use_home(shared_home, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return lambda *args: sa3(capfd, *args)


def _read(path: str | Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32", always_2d=True)[0]


def _ok(result: Result) -> Result:
    assert result.code == 0, result
    return result


def test_help_needs_no_framework_and_names_every_command():
    code = (
        "import sys\n"
        "for name in ('mlx', 'torch', 'numpy', 'matplotlib'): sys.modules[name] = None\n"
        "from sa3_mlx.cli.app import run\n"
        "sys.exit(run(['--help']))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert all(f"\n  {name} " in result.stdout for name in COMMANDS)


def test_every_command_has_help(run: Run):
    for name in COMMANDS:
        assert "Usage: sa3" in _ok(run(name, "--help")).out


def test_the_package_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "sa3_mlx", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout.startswith("sa3")


def test_generate_writes_a_file_with_its_provenance(run: Run):
    result = _ok(run("generate", "soft rain", "--seconds", "1", "--seed", "7", "--out", "rain.wav"))
    assert "rain.wav" in result.out and "seed   7" in result.out and "real time" in result.out
    made = read_provenance(Path("rain.wav"))
    assert (made.prompt, made.seconds, made.seed, made.steps) == ("soft rain", 1.0, 7, 8)
    assert (made.model, made.sampler, made.command, made.format) == ("little", "pingpong", "generate", "pcm16")
    assert made.model_hash.startswith("sha256:")
    assert _read("rain.wav").shape == (RATE, 2)


def test_a_random_seed_is_printed_and_recorded(run: Run):
    _ok(run("generate", "rain", "--seconds", "0.3", "--out", "a.wav", "--quiet"))
    result = _ok(run("generate", "rain", "--seconds", "0.3", "--out", "b.wav", "--quiet"))
    seeds = [read_provenance(Path(name)).seed for name in ("a.wav", "b.wav")]
    assert seeds[0] != seeds[1] and result.out == f"b.wav seed {seeds[1]}\n"


def test_the_file_is_named_by_prompt_and_seed(run: Run, tmp_path: Path):
    _ok(run("generate", "A soft, HIGH bell!", "--seconds", "0.2", "--seed", "3"))
    assert [path.name for path in tmp_path.iterdir()] == ["a-soft-high-bell-3.wav"]


@pytest.mark.parametrize(
    ("name", "fmt", "subtype"),
    [
        ("a.wav", "pcm16", "PCM_16"), ("a.wav", "pcm24", "PCM_24"), ("a.wav", "float", "FLOAT"),
        ("a.flac", "pcm16", "PCM_16"), ("a.flac", "pcm24", "PCM_24"),
    ],
)  # fmt: skip
def test_formats(run: Run, name: str, fmt: str, subtype: str):
    _ok(run("generate", "rain", "--seconds", "0.2", "--out", name, "--format", fmt))
    assert soundfile.info(name).subtype == subtype
    assert read_provenance(Path(name)).format == fmt


def test_a_batch_makes_numbered_files_with_following_seeds(run: Run):
    args = ("generate", "rain", "--seconds", "0.5", "--seed", "4", "--format", "float")
    _ok(run(*args, "--batch", "3", "--out", "r.wav"))
    assert [read_provenance(Path(f"r-{number}.wav")).seed for number in (1, 2, 3)] == [4, 5, 6]
    _ok(run("generate", "rain", "--seconds", "0.5", "--seed", "5", "--format", "float", "--out", "one.wav"))
    np.testing.assert_allclose(_read("r-2.wav"), _read("one.wav"), atol=1e-4)


def test_a_file_of_prompts(run: Run):
    Path("prompts.txt").write_text("# sounds\nsoft rain\n\nlow kick\n")
    _ok(run("generate", "--prompt-file", "prompts.txt", "--seconds", "0.2", "--seed", "1", "--out", "p.wav"))
    made = [read_provenance(Path(f"p-{number}.wav")) for number in (1, 2)]
    assert [(item.prompt, item.seed) for item in made] == [("soft rain", 1), ("low kick", 2)]


def test_peak_and_clipping(run: Run):
    args = ("generate", "rain", "--seconds", "0.5", "--seed", "1", "--format", "float")
    _ok(run(*args, "--out", "float.wav"))
    loud = np.abs(_read("float.wav")).max()
    _ok(run(*args, "--out", "quiet.wav", "--peak", "-6"))
    assert np.abs(_read("quiet.wav")).max() == pytest.approx(min(loud, 10 ** (-6 / 20)), rel=1e-4)


def test_clipping_is_reported_with_advice(run: Run, capfd: pytest.CaptureFixture[str]):
    from sa3_mlx.cli.report import report_file

    _ok(run("generate", "rain", "--seconds", "0.2", "--out", "a.wav"))
    made, audio = read_provenance(Path("a.wav")), tone(0.5, level=2.0)
    report_file(Path("a.wav"), audio, audio, RATE, made, 1.0, (), None, quiet=False)
    assert "clipped" in (text := capfd.readouterr().out) and "--peak -1" in text
    few = tone(4.0)
    few[7:10] = 1.5
    report_file(Path("a.wav"), few, few, RATE, made, 1.0, (), None, quiet=False)
    assert "3 samples were clipped" in capfd.readouterr().out
    edited = replace(made, regions=((0.1, 0.2),), crossfade_ms=20.0)
    report_file(Path("a.wav"), audio, audio, RATE, edited, 1.0, (), None, quiet=False)
    text = capfd.readouterr().out
    assert "a .wav with --format float avoids it" in text and "--peak" not in text, "it would change kept audio"
    silent = np.zeros_like(audio)
    report_file(Path("a.wav"), silent, silent, RATE, made, 1.0, (), None, quiet=False)
    assert "silent" in capfd.readouterr().out


def test_a_spectrogram_beside_the_file(run: Run, tmp_path: Path):
    _ok(run("generate", "rain", "--seconds", "0.2", "--batch", "2", "--out", "r.wav", "--spectrogram", "r.png"))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["r-1.png", "r-2.png"]


def test_play_uses_a_player_that_is_there(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    player = tmp_path / "bin" / "aplay"
    player.parent.mkdir()
    player.write_text('#!/bin/sh\necho "$@" >> played\ncat >> heard.wav\n')
    player.chmod(0o755)
    monkeypatch.setenv("PATH", f"{player.parent}{os.pathsep}/usr/bin{os.pathsep}/bin")
    files_alone = Player(command=("aplay", "-q"), suffixes=(".wav",))
    monkeypatch.setattr("sa3_mlx.cli.player._PLAYERS", (files_alone,))
    _ok(run("generate", "rain", "--seconds", "0.2", "--out", "a.wav", "--play"))
    assert Path("played").read_text() == "-q a.wav\n"
    monkeypatch.setattr("sa3_mlx.cli.player._PLAYERS", (replace(files_alone, stream=("-",)),))
    _ok(run("generate", "rain", "--seconds", "0.2", "--out", "b.wav", "--play"))
    assert Path("played").read_text() == "-q a.wav\n-q -\n"
    np.testing.assert_array_equal(_read("heard.wav"), _read("b.wav"))


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_rerun_is_bit_identical(run: Run, name: str):
    if not backend.available(name):  # type: ignore[arg-type]
        pytest.skip(f"{name} is not installed")
    write_tone(Path("in.wav"), 0.6)
    common = ("--backend", name, "--format", "float")
    _ok(run("generate", "rain", "--seconds", "0.5", "--batch", "3", "--out", "g.wav", *common))
    _ok(run("vary", "in.wav", "bell", "--noise-level", "0.5", "--monotone", "--out", "v.wav", *common))
    _ok(run("inpaint", "in.wav", "bell", "--region", "0.2:0.4", "--out", "i.wav", "--guidance", "3",
            "--negative", "kick", "--backend", name))  # fmt: skip
    _ok(run("extend", "in.wav", "bell", "--seconds", "0.9", "--out", "e.flac", "--sampler", "dpmpp", "--steps", "3",
            "--backend", name, "--peak", "-3", "--decode-noise"))  # fmt: skip
    for file in ("g-2.wav", "v.wav", "i.wav", "e.flac"):
        result = _ok(run("rerun", file))
        assert "byte for byte" in result.out, file


def test_the_device_is_recorded_and_rerun_keeps_to_it(run: Run):
    if not (backend.available("mlx") and backend.available("torch")):
        pytest.skip("needs both backends")
    args = ("generate", "rain", "--seconds", "0.2", "--steps", "1", "--backend", "torch")
    _ok(run(*args, "--device", "cpu", "--out", "a.wav"))
    assert read_provenance(Path("a.wav")).device == "cpu"
    assert "byte for byte" in _ok(run("rerun", "a.wav")).out
    result = run("rerun", "a.wav", "--device", "auto", "--force", "--out", "b.wav")
    assert result.code in (0, 1) and read_provenance(Path("b.wav")).device == "auto"
    result = run("rerun", "a.wav", "--device", "auto", "--out", "c.wav")
    assert result.code == 2 and "device is auto, the file was made with cpu" in result.err
    run("rerun", "a.wav", "--backend", "mlx", "--force", "--out", "d.wav")
    assert read_provenance(Path("d.wav")).backend == "mlx"


def test_rerun_refuses_another_backend_unless_forced(run: Run):
    if not (backend.available("mlx") and backend.available("torch")):
        pytest.skip("needs both backends")
    _ok(run("generate", "rain", "--seconds", "0.5", "--out", "a.wav", "--backend", "mlx", "--format", "float"))
    result = run("rerun", "a.wav", "--backend", "torch")
    assert result.code == 2 and "made with mlx" in result.err
    result = run("rerun", "a.wav", "--backend", "torch", "--force")
    assert result.code == 1 and "no: samples differ" in result.out
    np.testing.assert_allclose(_read("a-rerun.wav"), _read("a.wav"), atol=1e-3)


@pytest.mark.parametrize(("rate", "channels"), [(RATE, 2), (RATE, 1), (11025, 2), (44100, 1), (48000, 3)])
def test_kept_samples_stay_bit_exact(run: Run, rate: int, channels: int):
    """Also of resampled and mono files: against the input as the model reads it."""
    source = write_tone(Path("in.wav"), 1.0, rate=rate, channels=channels)
    wanted = read_audio(source, RATE, 2)
    result = _ok(run("inpaint", source, "bell", "--region", "0.25:0.5", "--region", "0.7:0.8", "--out", "i.wav"))
    assert result.out.count("seam ") == 4 and "level" in result.out
    found = _read("i.wav")
    kept = np.ones(len(found), bool)
    kept[2000:4000] = kept[5600:6400] = False
    np.testing.assert_array_equal(found[kept], wanted[: len(found)][kept])
    assert np.abs(found[~kept] - wanted[: len(found)][~kept]).max() > 0.01
    assert "seam " in _ok(run("extend", source, "bell", "--seconds", "1.5", "--out", "e.wav")).out
    np.testing.assert_array_equal(_read("e.wav")[: len(wanted)], wanted)
    assert len(_read("e.wav")) == 1.5 * RATE


def test_24_bits_of_kept_samples_are_kept(run: Run):
    audio = (np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 2)) * 2**23).astype(np.int32) / np.float32(2**23)
    write_audio(Path("in.wav"), audio.astype(np.float32), RATE, "pcm24")
    _ok(run("inpaint", "in.wav", "--region", "0.5:0.6", "--out", "i.wav"))
    assert soundfile.info("i.wav").subtype == "PCM_24"
    np.testing.assert_array_equal(_read("i.wav")[:4000], _read("in.wav")[:4000])


@pytest.mark.parametrize(
    ("source", "options", "note"),
    [
        ("float", ("--out", "o.flac"), "rounded to pcm24; --out with .wav and --format float keeps them exactly"),
        ("float", ("--out", "o.wav", "--format", "pcm16"), "rounded to pcm16; --out with .wav and --format float"),
        ("pcm24", ("--out", "o.flac", "--format", "pcm16"), "rounded to pcm16; --format pcm24 keeps them exactly"),
        ("float", ("--out", "o.wav"), ""), ("pcm24", ("--out", "o.flac"), ""), ("pcm16", ("--out", "o.flac"), ""),
        ("float", ("--out", "o.flac", "--no-paste"), ""), ("float", ("--out", "o.flac", "--quiet"), ""),
    ],
)  # fmt: skip
def test_rounding_of_kept_samples_is_said(run: Run, source: str, options: tuple[str, ...], note: str):
    write_audio(Path("in.wav"), tone(0.5), RATE, source)  # type: ignore[arg-type]
    result = _ok(run("inpaint", "in.wav", "--region", "0.2:0.3", "--steps", "1", *options))
    assert note in result.err and ("kept samples" in result.err) == bool(note)


def test_no_paste_returns_the_model_s_audio(run: Run):
    write_tone(Path("in.wav"))
    result = _ok(run("inpaint", "in.wav", "--region", "0.5:0.6", "--out", "i.wav", "--no-paste"))
    assert "seam " not in result.out
    assert (_read("i.wav")[:4000] != _read("in.wav")[:4000]).any()


def test_vary_follows_the_input_s_length_and_level_of_noise(run: Run):
    write_tone(Path("in.wav"), 0.7)
    _ok(run("vary", "in.wav", "bell", "--out", "v.wav"))
    made = read_provenance(Path("v.wav"))
    assert len(_read("v.wav")) == 5600 and made.noise_level == 0.6 and made.input == "in.wav"


def test_the_tags_hold_no_absolute_path(run: Run, tmp_path: Path):
    write_tone(tmp_path / "in.wav")
    _ok(run("vary", tmp_path / "in.wav", "--out", "v.wav"))
    assert read_provenance(Path("v.wav")).input == "in.wav"
    _ok(run("rerun", "v.wav"))


@pytest.mark.parametrize("suffix", ["safetensors", "npy"])
def test_encode_then_decode(run: Run, suffix: str):
    write_tone(Path("in.wav"), 0.33)
    result = _ok(run("encode", "in.wav", f"z.{suffix}", "--check"))
    assert "snr " in result.out and " dB" in result.out
    decoded = _ok(run("decode", f"z.{suffix}", "out.wav", "--reference", "in.wav", "--format", "float"))
    assert len(_read("out.wav")) == 2640
    snr = [line.split()[1] for text in (result.out, decoded.out) for line in text.splitlines() if line[:3] == "snr"]
    assert snr[0] == snr[1]
    if suffix == "safetensors":
        with TensorFile.open("z.safetensors") as file:
            assert file.metadata["model_hash"].startswith("sha256:") and file.info("latents")[1] == (42, 8)
    else:
        assert json.loads(Path("z.npy.json").read_text())["samples"] == "2640"
        assert np.load("z.npy").shape == (42, 8)


def test_models_and_info(run: Run, shared_home: Path):
    listing = _ok(run("models")).out
    assert "little" in listing and "autoencoder" in listing and "huggingface.co/stabilityai" in listing
    text = _ok(run("info", "little")).out
    assert "sha256:" in text and "parameters" in text and '"latent_channels": 8' in text
    assert text == _ok(run("info", shared_home / "models" / "little")).out
    _ok(run("generate", "soft rain", "--seconds", "0.2", "--seed", "9", "--out", "a.wav"))
    text = _ok(run("info", "a.wav")).out
    assert "soft rain" in text and "PCM_16" in text and "peak" in text
    write_tone(Path("plain.wav"))
    assert "none" in _ok(run("info", "plain.wav")).out


def test_doctor_says_what_is_here(run: Run):
    result = run("doctor")
    assert result.code in (0, 1) and "GFLOP/s" in result.out and "GB free" in result.out
    assert (result.code == 1) == ("problem:" in result.out)


def test_convert_round_trip_through_the_official_layout(run: Run, shared_home: Path):
    result = _ok(run("convert", "little", "official", "--to-official"))
    assert "parameters" in result.out
    _ok(run("convert", "official", "again", "--name", "again"))
    first, second = (TensorFile.open(folder / "model.safetensors") for folder in (
        shared_home / "models" / "little", Path("again")))  # fmt: skip
    with first, second:
        assert first.names() == second.names()
        for name in first.names():
            np.testing.assert_allclose(first.read(name), second.read(name), atol=1e-6)
    _ok(run("generate", "rain", "--seconds", "0.2", "--model", "again", "--out", "a.wav"))


def test_convert_installs_under_a_name(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _ok(run("convert", "little", "official", "--to-official"))
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "other"))
    assert "--model mine" in _ok(run("convert", "official", "--name", "mine")).out
    _ok(run("generate", "rain", "--seconds", "0.2", "--model", "mine", "--out", "a.wav"))
    made = read_provenance(Path("a.wav"))
    assert (made.model, made.config) == ("mine", "mine")


def test_released_models_come_first_then_the_demo_and_no_other_is_a_default(
    run: Run, shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.undo()
    little = shared_home / "models" / "little"
    for name in ("another", "small-music-8bit", "medium", "small-music"):
        shutil.copytree(little, tmp_path / "home" / "models" / name)
    monkeypatch.setattr(home, "DEMO_FOLDER", little)
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    assert list(home.installed()) == ["small-music", "medium", "demo", "another", "small-music-8bit"]
    assert home.find_model(None, generates=True).name == "small-music"
    for name in ("medium", "small-music"):
        shutil.rmtree(tmp_path / "home" / "models" / name)
    assert home.find_model(None, generates=True).name == "demo"
    listing = _ok(run("models")).out
    assert "demo *" in listing and "another " in listing and listing.count(" *") == 1
    monkeypatch.setattr(home, "DEMO_FOLDER", tmp_path)
    assert "give --model" in run("generate", "rain", "--out", str(tmp_path / "a.wav")).err


def test_a_model_is_called_as_it_was_given(run: Run, shared_home: Path, tmp_path: Path):
    """Under its installed name or its path, beside the name in its configuration."""
    shutil.copytree(shared_home / "models" / "little", tmp_path / "own model")
    args = ("generate", "qwxyz", "--seconds", "0.2", "--steps", "1", "--backend", "mlx")
    result = _ok(run(*args, "--model", "own model", "--out", "a.wav"))
    assert "own model (little) on mlx" in result.err
    made = read_provenance(Path("a.wav"))
    assert (made.model, made.config) == ("own model", "little")
    _ok(run(*args, "--model", tmp_path / "own model", "--out", "b.wav"))
    assert read_provenance(Path("b.wav")).model == "own model", "no absolute path in tags"


def test_rerun_finds_the_model_by_its_weights(run: Run, shared_home: Path, tmp_path: Path, monkeypatch):
    own = tmp_path / "own"
    shutil.copytree(shared_home, own)
    write_checkpoint(own / "models" / "renamed", SMALL, variant="other ")
    use_home(own, monkeypatch)
    args = ("generate", "rain", "--seconds", "0.2", "--steps", "1", "--format", "float")
    _ok(run(*args, "--model", "renamed", "--out", "a.wav"))
    assert "byte for byte" in _ok(run("rerun", "a.wav")).out
    _ok(run(*args, "--model", own / "models" / "renamed", "--out", "b.wav"))
    assert "byte for byte" in _ok(run("rerun", "b.wav")).out
    (own / "models" / "renamed").rename(own / "models" / "renamed-again")
    result = _ok(run("rerun", "a.wav", "--out", "c.wav"))
    assert "audio equal, tags differ" in result.out and read_provenance(Path("c.wav")).model == "renamed-again"
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


def test_an_interrupted_run_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object, keep_resident: bool) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "_generate", interrupt)
    result = run("generate", "rain", "--seconds", "0.2", "--out", "a.wav")
    assert result.code == 130 and "interrupted" in result.err
    assert not list(tmp_path.iterdir())


def test_the_hash_of_weights_is_remembered_until_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sa3_mlx.cli.fingerprint import fingerprint

    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    folder = write_checkpoint(tmp_path / "m", SMALL)
    first = fingerprint(folder, SMALL)
    monkeypatch.setattr("sa3_mlx.cli.fingerprint.file_hash", lambda _path: "sha256:new")
    assert fingerprint(folder, SMALL) == first
    shutil.rmtree(folder)
    write_checkpoint(folder, SMALL, variant="other ")
    assert fingerprint(folder, SMALL) == "sha256:new"


def test_train_needs_pytorch(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sa3_mlx.cli.train.find_spec", lambda _name: None)
    result = run("train", "pretrain")
    assert result.code == 2 and "pip install 'sa3[train]'" in result.err


def test_autoencoders_can_encode(run: Run):
    write_tone(Path("in.wav"), 0.2)
    _ok(run("encode", "in.wav", "z.npy", "--model", AUTOENCODER.name))


def test_latents_take_the_options_of_the_autoencoder_alone(run: Run):
    write_tone(Path("in.wav"), 0.2)
    for options in (("--dtype", "float32"), ("--text-dtype", "float32"), ("--compile",), ("-q",)):
        assert "no such option" in run("encode", "in.wav", "z.npy", *options).err.lower()
    _ok(run("encode", "in.wav", "z.npy", "--backend", "torch", "--device", "cpu"))
    assert "no such option" in run("decode", "z.npy", "out.wav", "--dtype", "float32").err.lower()


def test_silence_has_no_signal_to_noise_ratio(run: Run):
    write_audio(Path("in.wav"), np.zeros((1000, 2), np.float32), RATE)
    assert "not defined, as the reference is silent" in _ok(run("encode", "in.wav", "z.npy", "--check")).out


def test_a_region_can_end_with_the_clip(run: Run):
    write_tone(Path("in.wav"), 1.0)
    _ok(run("inpaint", "in.wav", "--region", "0.5:", "--steps", "1", "--out", "i.wav"))
    assert read_provenance(Path("i.wav")).regions == ((0.5, 1.0),)
    _ok(run("inpaint", "in.wav", "--region", "0.5:", "--seconds", "1.5", "--steps", "1", "--out", "longer.wav"))
    assert read_provenance(Path("longer.wav")).regions == ((0.5, 1.5),)


def test_prompts_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"soft rain\nlow kick\n")))
    _ok(run("generate", "--prompt-file", "-", "--seconds", "0.2", "--steps", "1", "--out", "p.wav"))
    assert [read_provenance(Path(f"p-{number}.wav")).prompt for number in (1, 2)] == ["soft rain", "low kick"]


def test_the_next_line_names_a_rerun_that_works(run: Run, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    source = write_tone(tmp_path / "elsewhere" / "in.wav", 0.4)
    edit = ("--region", "0.1:0.2", "--steps", "1", "--out", "i.wav")
    line = _ok(run("inpaint", source, *edit)).out.splitlines()[-1]
    assert line.endswith(f"sa3 rerun i.wav --input {source}")
    _ok(run(*shlex.split(line.partition("or sa3 ")[2])))
    line = _ok(run("inpaint", Path("elsewhere") / "in.wav", *edit, "--force")).out.splitlines()[-1]
    assert line.endswith("sa3 rerun i.wav")
    _ok(run(*shlex.split(line.partition("or sa3 ")[2]), "--force"))


def test_the_next_line_is_short(run: Run):
    result = _ok(run("generate", "rain " * 600, "--seconds", "0.2", "--steps", "1", "--out", "a.wav"))
    assert result.out.splitlines()[-1].startswith("next   sa3 vary a.wav PROMPT --noise-level")


def test_compiling_is_for_pytorch_and_recorded(run: Run, monkeypatch: pytest.MonkeyPatch):
    layers = pytest.importorskip("sa3_torch.layers")
    calls: list[bool] = []
    monkeypatch.setattr(layers, "compiling", calls.append)
    args = ("generate", "rain", "--seconds", "0.2", "--steps", "1", "--backend", "torch")
    _ok(run(*args, "--compile", "--out", "a.wav"))
    assert calls == [True] and read_provenance(Path("a.wav")).compiled
    _ok(run("rerun", "a.wav"))
    _ok(run(*args, "--out", "b.wav"))
    assert calls == [True, True, False] and not read_provenance(Path("b.wav")).compiled


def test_the_longest_clip_is_one_number_everywhere(run: Run):
    """Rounded down, so that it can be asked for."""
    shown = f"{int(SMALL.max_seconds * 100) / 100:.2f} s"
    assert shown in _ok(run("models")).out and shown in _ok(run("info", "little")).out
    assert shown in run("generate", "rain", "--seconds", "99", "--out", "a.wav").err
    demo = replace(SMALL, sample_rate=7193)  # 400 frames of 64 samples: 3.559...
    assert longest(demo) == "3.55 s"


def test_a_converted_autoencoder_is_for_encoding(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _ok(run("convert", "only-autoencoder", "official", "--to-official"))
    result = _ok(run("convert", "official", "again"))
    assert "sa3 encode INPUT OUT.safetensors --model again" in result.out and "generate" not in result.out
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "other"))
    assert "sa3 encode INPUT OUT.safetensors --model mine" in _ok(run("convert", "official", "--name", "mine")).out
