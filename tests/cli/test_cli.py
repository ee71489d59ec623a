"""The ``sa3`` command with a tiny random model: what it makes, what it prints, what it records."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_mlx.cli import backend
from sa3_mlx.cli import run as running
from sa3_mlx.cli.app import COMMANDS
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.cli.train.stages import SECTIONS as TRAINING
from sa3_mlx.common.files.audio import read_audio, write_audio
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item
from sa3_mlx.common.model.sampling import Sampling
from tests.support.command import RATE, Run, ok, read, tone, write_tone

ROOT = Path(__file__).resolve().parents[2]


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
        assert "Usage: sa3" in ok(run(name, "--help")).out


def test_the_package_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "sa3_mlx", "--version"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout.startswith("sa3")


def test_a_run_loads_no_converter_and_no_training(shared_home: Path, tmp_path: Path):
    """What a newcomer has to follow is small; the converter comes in for an adapter of the official layout only."""
    pytest.importorskip("mlx.core")
    code = (
        "import sys\n"
        "from sa3_mlx.cli.app import run\n"
        "args = ['--model', 'little', '--backend', 'mlx', '--seconds', '0.2', '--steps', '1', '--out', sys.argv[1]]\n"
        "assert run(['generate', 'rain', *args]) == 0\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "assert not names & {'sa3_convert', 'sa3_torch', 'torch', 'benchmarks', 'matplotlib'}, sorted(names)\n"
    )
    environment = os.environ | {"SA3_HOME": str(shared_home)}
    arguments = [sys.executable, "-c", code, str(tmp_path / "a.wav")]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_generate_writes_a_file_with_its_provenance(run: Run):
    result = ok(run("generate", "soft rain", "--seconds", "1", "--seed", "7", "--out", "rain.wav"))
    assert "rain.wav" in result.out and "seed   7" in result.out and "real time" in result.out
    made = read_provenance(Path("rain.wav"))
    assert made.clip == Item(prompt="soft rain", seconds=1.0, seed=7)
    assert (made.command, made.request.sampling) == ("generate", Sampling(sampler="pingpong", steps=8))
    assert (made.model.name, made.output.format) == ("little", "pcm16") and made.model.hash.startswith("sha256:")
    assert read("rain.wav").shape == (RATE, 2)


def test_a_random_seed_is_printed_and_recorded(run: Run):
    ok(run("generate", "rain", "--seconds", "0.3", "--out", "a.wav", "--quiet"))
    result = ok(run("generate", "rain", "--seconds", "0.3", "--out", "b.wav", "--quiet"))
    seeds = [read_provenance(Path(name)).clip.seed for name in ("a.wav", "b.wav")]
    assert seeds[0] != seeds[1] and result.out == f"b.wav seed {seeds[1]}\n"


def test_the_file_is_named_by_prompt_and_seed(run: Run, tmp_path: Path):
    ok(run("generate", "A soft, HIGH bell!", "--seconds", "0.2", "--seed", "3"))
    assert [path.name for path in tmp_path.iterdir()] == ["a-soft-high-bell-3.wav"]


@pytest.mark.parametrize(
    ("name", "fmt", "subtype"),
    [
        ("a.wav", "pcm16", "PCM_16"),
        ("a.wav", "pcm24", "PCM_24"),
        ("a.wav", "float", "FLOAT"),
        ("a.flac", "pcm16", "PCM_16"),
        ("a.flac", "pcm24", "PCM_24"),
    ],
)
def test_formats(run: Run, name: str, fmt: str, subtype: str):
    ok(run("generate", "rain", "--seconds", "0.2", "--out", name, "--format", fmt))
    assert soundfile.info(name).subtype == subtype
    assert read_provenance(Path(name)).output.format == fmt


def test_a_batch_makes_numbered_files_with_following_seeds(run: Run):
    args = ("generate", "rain", "--seconds", "0.5", "--seed", "4", "--format", "float")
    ok(run(*args, "--batch", "3", "--out", "r.wav"))
    assert [read_provenance(Path(f"r-{number}.wav")).clip.seed for number in (1, 2, 3)] == [4, 5, 6]
    ok(run("generate", "rain", "--seconds", "0.5", "--seed", "5", "--format", "float", "--out", "one.wav"))
    np.testing.assert_allclose(read("r-2.wav"), read("one.wav"), atol=1e-4)


def test_a_file_of_prompts(run: Run):
    Path("prompts.txt").write_text("# sounds\nsoft rain\n\nlow kick\n")
    ok(run("generate", "--prompt-file", "prompts.txt", "--seconds", "0.2", "--seed", "1", "--out", "p.wav"))
    made = [read_provenance(Path(f"p-{number}.wav")).clip for number in (1, 2)]
    assert [(clip.prompt, clip.seed) for clip in made] == [("soft rain", 1), ("low kick", 2)]


def test_peak_and_clipping(run: Run):
    args = ("generate", "rain", "--seconds", "0.5", "--seed", "1", "--format", "float")
    ok(run(*args, "--out", "float.wav"))
    loud = np.abs(read("float.wav")).max()
    ok(run(*args, "--out", "quiet.wav", "--peak", "-6"))
    assert np.abs(read("quiet.wav")).max() == pytest.approx(min(loud, 10 ** (-6 / 20)), rel=1e-4)


def test_clipping_is_reported_with_advice(run: Run, capfd: pytest.CaptureFixture[str]):
    from sa3_mlx.cli.output.report import report_file
    from sa3_mlx.common.delivery.chain import Delivered

    ok(run("generate", "rain", "--seconds", "0.2", "--out", "a.wav"))
    made, audio = read_provenance(Path("a.wav")), tone(0.5, level=2.0)
    report_file(Path("a.wav"), audio, Delivered(audio, RATE, 0.0, ()), RATE, made, 1.0, (), None, quiet=False)
    assert "clipped" in (text := capfd.readouterr().out) and "--peak -1" in text
    few = tone(4.0)
    few[7:10] = 1.5
    report_file(Path("a.wav"), few, Delivered(few, RATE, 0.0, ()), RATE, made, 1.0, (), None, quiet=False)
    assert "3 samples were clipped" in capfd.readouterr().out
    edited = replace(made, request=replace(made.request, inpaint=Inpaint(audio=audio, regions=((0.1, 0.2),))))
    report_file(Path("a.wav"), audio, Delivered(audio, RATE, 0.0, ()), RATE, edited, 1.0, (), None, quiet=False)
    text = capfd.readouterr().out
    assert "a .wav with --format float avoids it" in text and "--peak" not in text, "it would change kept audio"
    silent = np.zeros_like(audio)
    report_file(Path("a.wav"), silent, Delivered(silent, RATE, 0.0, ()), RATE, made, 1.0, (), None, quiet=False)
    assert "silent" in capfd.readouterr().out


def test_a_spectrogram_beside_the_file(run: Run, tmp_path: Path):
    ok(run("generate", "rain", "--seconds", "0.2", "--batch", "2", "--out", "r.wav", "--spectrogram", "r.png"))
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["r-1.png", "r-2.png"]


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_rerun_is_bit_identical(run: Run, name: str):
    if not backend.available(name):  # type: ignore[arg-type]
        pytest.skip(f"{name} is not installed")
    write_tone(Path("in.wav"), 0.6)
    common = ("--backend", name, "--format", "float")
    ok(run("generate", "rain", "--seconds", "0.5", "--batch", "3", "--out", "g.wav", *common))
    ok(run("vary", "in.wav", "bell", "--noise-level", "0.5", "--schedule", "monotone", "--out", "v.wav", *common))
    ok(
        run(
            "inpaint",
            "in.wav",
            "bell",
            "--region",
            "0.2:0.4",
            "--out",
            "i.wav",
            "--guidance",
            "3",
            "--negative",
            "kick",
            "--backend",
            name,
        )
    )
    ok(
        run(
            "extend",
            "in.wav",
            "bell",
            "--seconds",
            "0.9",
            "--out",
            "e.flac",
            "--sampler",
            "dpmpp",
            "--steps",
            "3",
            "--backend",
            name,
            "--peak",
            "-3",
            "--decode-noise",
        )
    )
    for file in ("g-2.wav", "v.wav", "i.wav", "e.flac"):
        result = ok(run("rerun", file))
        assert "byte for byte" in result.out, file


def test_the_device_is_recorded_and_rerun_keeps_to_it(run: Run):
    if not (backend.available("mlx") and backend.available("torch")):
        pytest.skip("needs both backends")
    args = ("generate", "rain", "--seconds", "0.2", "--steps", "1", "--backend", "torch")
    ok(run(*args, "--device", "cpu", "--out", "a.wav"))
    assert read_provenance(Path("a.wav")).runtime.device == "cpu"
    assert "byte for byte" in ok(run("rerun", "a.wav")).out
    result = run("rerun", "a.wav", "--device", "auto", "--force", "--out", "b.wav")
    assert result.code in (0, 1) and read_provenance(Path("b.wav")).runtime.device == "auto"
    result = run("rerun", "a.wav", "--device", "auto", "--out", "c.wav")
    assert result.code == 2 and "device is auto, the file was made with cpu" in result.err
    run("rerun", "a.wav", "--backend", "mlx", "--force", "--out", "d.wav")
    assert read_provenance(Path("d.wav")).runtime.backend == "mlx"


def test_rerun_refuses_another_backend_unless_forced(run: Run):
    if not (backend.available("mlx") and backend.available("torch")):
        pytest.skip("needs both backends")
    ok(run("generate", "rain", "--seconds", "0.5", "--out", "a.wav", "--backend", "mlx", "--format", "float"))
    result = run("rerun", "a.wav", "--backend", "torch")
    assert result.code == 2 and "made with mlx" in result.err
    result = run("rerun", "a.wav", "--backend", "torch", "--force")
    assert result.code == 1 and "no: samples differ" in result.out
    np.testing.assert_allclose(read("a-rerun.wav"), read("a.wav"), atol=1e-3)


@pytest.mark.parametrize(("rate", "channels"), [(RATE, 2), (RATE, 1), (11025, 2), (44100, 1), (48000, 3)])
def test_kept_samples_stay_bit_exact(run: Run, rate: int, channels: int):
    """Also of resampled and mono files: against the input as the model reads it."""
    source = write_tone(Path("in.wav"), 1.0, rate=rate, channels=channels)
    wanted = read_audio(source, RATE, 2)
    result = ok(run("inpaint", source, "bell", "--region", "0.25:0.5", "--region", "0.7:0.8", "--out", "i.wav"))
    assert result.out.count("seam ") == 4 and "level" in result.out
    found = read("i.wav")
    kept = np.ones(len(found), bool)
    kept[2000:4000] = kept[5600:6400] = False
    np.testing.assert_array_equal(found[kept], wanted[: len(found)][kept])
    assert np.abs(found[~kept] - wanted[: len(found)][~kept]).max() > 0.01
    assert "seam " in ok(run("extend", source, "bell", "--seconds", "1.5", "--out", "e.wav")).out
    np.testing.assert_array_equal(read("e.wav")[: len(wanted)], wanted)
    assert len(read("e.wav")) == 1.5 * RATE


def test_24_bits_of_kept_samples_are_kept(run: Run):
    audio = (np.random.default_rng(0).uniform(-0.5, 0.5, (RATE, 2)) * 2**23).astype(np.int32) / np.float32(2**23)
    write_audio(Path("in.wav"), audio.astype(np.float32), RATE, "pcm24")
    ok(run("inpaint", "in.wav", "--region", "0.5:0.6", "--out", "i.wav"))
    assert soundfile.info("i.wav").subtype == "PCM_24"
    np.testing.assert_array_equal(read("i.wav")[:4000], read("in.wav")[:4000])


@pytest.mark.parametrize(
    ("source", "options", "note"),
    [
        ("float", ("--out", "o.flac"), "rounded to pcm24; --out with .wav and --format float keeps them exactly"),
        ("float", ("--out", "o.wav", "--format", "pcm16"), "rounded to pcm16; --out with .wav and --format float"),
        ("pcm24", ("--out", "o.flac", "--format", "pcm16"), "rounded to pcm16; --format pcm24 keeps them exactly"),
        ("float", ("--out", "o.wav"), ""),
        ("pcm24", ("--out", "o.flac"), ""),
        ("pcm16", ("--out", "o.flac"), ""),
        ("float", ("--out", "o.flac", "--no-paste"), ""),
        ("float", ("--out", "o.flac", "--quiet"), ""),
    ],
)
def test_rounding_of_kept_samples_is_said(run: Run, source: str, options: tuple[str, ...], note: str):
    write_audio(Path("in.wav"), tone(0.5), RATE, source)  # type: ignore[arg-type]
    result = ok(run("inpaint", "in.wav", "--region", "0.2:0.3", "--steps", "1", *options))
    assert note in result.err and ("kept samples" in result.err) == bool(note)


def test_no_paste_returns_the_model_s_audio(run: Run):
    write_tone(Path("in.wav"))
    result = ok(run("inpaint", "in.wav", "--region", "0.5:0.6", "--out", "i.wav", "--no-paste"))
    assert "seam " not in result.out
    assert (read("i.wav")[:4000] != read("in.wav")[:4000]).any()


def test_vary_follows_the_input_s_length_and_level_of_noise(run: Run):
    write_tone(Path("in.wav"), 0.7)
    ok(run("vary", "in.wav", "bell", "--out", "v.wav"))
    made = read_provenance(Path("v.wav"))
    assert len(read("v.wav")) == 5600 and made.input is not None and made.input.name == "in.wav"
    assert isinstance(made.request.init, InitAudio) and made.request.init.noise_level == 0.6


def test_the_tags_hold_no_absolute_path(run: Run, tmp_path: Path):
    write_tone(tmp_path / "in.wav")
    ok(run("vary", tmp_path / "in.wav", "--out", "v.wav"))
    made = read_provenance(Path("v.wav"))
    assert made.input is not None and made.input.name == "in.wav"
    ok(run("rerun", "v.wav"))


def test_an_interrupted_run_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "stream", interrupt)
    result = run("generate", "rain", "--seconds", "0.2", "--out", "a.wav")
    assert result.code == 130 and "interrupted" in result.err
    assert not list(tmp_path.iterdir())


def test_train_needs_pytorch(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sa3_mlx.cli.train.stages.find_spec", lambda _name: None)
    result = run("train", "pretrain")
    assert result.code == 2 and "pip install 'sa3[train]'" in result.err


def test_every_training_command_has_help(run: Run):
    pytest.importorskip("torch")
    pytest.importorskip("scipy", reason="the training extra is not installed")
    commands = {name: entry for section in TRAINING.values() for name, entry in section.items()}
    for name, (_, _, text) in commands.items():
        shown = ok(run("train", name, "--help")).out
        assert "--settings" in shown and text.rstrip(".") in " ".join(shown.split())


def test_tuning_finds_a_model_by_name(run: Run):
    pytest.importorskip("torch")
    pytest.importorskip("scipy", reason="the training extra is not installed")
    result = run("train", "quantize", "--model", "nowhere", "--out", "r")
    assert result.code == 2 and "nowhere: no such model or folder; installed: little" in result.err
    result = run("train", "quantize", "--model", "little", "--out", "r", "--recipe", "2bit")
    assert result.code == 2 and "recipe is '2bit'" in result.err


def test_a_region_can_end_with_the_clip(run: Run):
    write_tone(Path("in.wav"), 1.0)
    ok(run("inpaint", "in.wav", "--region", "0.5:", "--steps", "1", "--out", "i.wav"))
    assert regions_of("i.wav") == ((0.5, 1.0),)
    ok(run("inpaint", "in.wav", "--region", "0.5:", "--seconds", "1.5", "--steps", "1", "--out", "longer.wav"))
    assert regions_of("longer.wav") == ((0.5, 1.5),)


def regions_of(file: str) -> tuple[tuple[float, float], ...]:
    inpaint = read_provenance(Path(file)).request.inpaint
    assert isinstance(inpaint, Inpaint)
    return inpaint.regions


def test_prompts_from_standard_input(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"soft rain\nlow kick\n")))
    ok(run("generate", "--prompt-file", "-", "--seconds", "0.2", "--steps", "1", "--out", "p.wav"))
    assert [read_provenance(Path(f"p-{number}.wav")).clip.prompt for number in (1, 2)] == ["soft rain", "low kick"]


def test_the_next_line_names_a_rerun_that_works(run: Run, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    source = write_tone(tmp_path / "elsewhere" / "in.wav", 0.4)
    edit = ("--region", "0.1:0.2", "--steps", "1", "--out", "i.wav")
    line = ok(run("inpaint", source, *edit)).out.splitlines()[-1]
    assert line.endswith(f"sa3 rerun i.wav --input {source}")
    ok(run(*shlex.split(line.partition("or sa3 ")[2])))
    line = ok(run("inpaint", Path("elsewhere") / "in.wav", *edit, "--force")).out.splitlines()[-1]
    assert line.endswith("sa3 rerun i.wav")
    ok(run(*shlex.split(line.partition("or sa3 ")[2]), "--force"))


def test_the_next_line_is_short(run: Run):
    result = ok(run("generate", "rain " * 600, "--seconds", "0.2", "--steps", "1", "--out", "a.wav"))
    assert [line for line in result.out.splitlines() if line.startswith("next")] == [
        "next   sa3 vary a.wav --noise-level 0.6",
        "next   sa3 extend a.wav --seconds 0.4",
    ]


def test_compiling_is_for_pytorch_and_recorded(run: Run, monkeypatch: pytest.MonkeyPatch):
    choices = pytest.importorskip("sa3_torch.choices")
    said: list[str] = []
    monkeypatch.setattr(choices, "use", lambda place, way: said.append(f"{place} {way}"))
    args = ("generate", "rain", "--seconds", "0.2", "--steps", "1", "--backend", "torch")
    compiled = ["compiled_step compiled", "compiled_decoder compiled", "graphs captured"]
    ok(run(*args, "--compile", "--out", "a.wav"))
    assert said == compiled and read_provenance(Path("a.wav")).runtime.compiled
    ok(run("rerun", "a.wav"))
    ok(run(*args, "--out", "b.wav"))
    assert said == [*compiled, *compiled, "compiled_step plain", "compiled_decoder plain", "graphs plain"]
    assert not read_provenance(Path("b.wav")).runtime.compiled
