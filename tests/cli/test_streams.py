"""Standard streams that are closed, full or read by nobody: right words, right exit codes, files whole."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile

from sa3_mlx.cli.output.provenance import read_provenance
from tests.support.command import Run, ok, write_tone

ROOT = Path(__file__).resolve().parents[2]
SOUND = "generate rain --seconds 0.2 --steps 1 --seed 1"

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@dataclass(frozen=True)
class Done:
    code: int
    out: bytes
    err: str


@pytest.fixture
def shell(shared_home: Path, tmp_path: Path):
    """Run one line of a shell in which ``sa3`` is the command, with "little" as model, in an empty folder."""

    def line(text: str) -> Done:
        pytest.importorskip("mlx.core")
        command = f'sa3() {{ "{sys.executable}" -m sa3_mlx "$@"; }}; {text}'
        environment = os.environ | {"SA3_HOME": str(shared_home), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=100
        )
        assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr.decode())

    return line


def whole(path: Path) -> bool:
    return soundfile.info(path).frames == 1600 and read_provenance(path).clip.seed == 1


@pytest.mark.parametrize("streams", ["<&-", ">/dev/full", ">&-", "2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_a_file_is_made_whatever_becomes_of_the_report(shell, tmp_path: Path, streams: str) -> None:
    done = shell(f"{SOUND.replace('generate', 'sa3 generate')} --model little --out a.wav {streams}")
    assert done.code == 0 and whole(tmp_path / "a.wav")
    assert ("standard output cannot be written (No space left on device)" in done.err) == (streams == ">/dev/full")


def test_sound_on_a_stream_that_does_not_take_it(shell, tmp_path: Path) -> None:
    sound = f"sa3 {SOUND} --model little --out -"
    closed = shell(f"{sound} >&-")
    assert closed.code == 2 and "--out -: standard output is closed; give the name of a file" in closed.err
    full = shell(f"{sound} >/dev/full")
    assert full.code == 2 and "sa3: standard output cannot be written (No space left on device)" in full.err
    gone = shell(f"{sound} --seconds 3 | head -c 10 | wc -c; echo ${{PIPESTATUS[0]}}")
    assert gone.out.split() == [b"10", b"2"] and "sa3:" not in gone.err
    assert shell(f"{sound} 2>&- >a.wav").code == 0 and whole(tmp_path / "a.wav")


def test_an_interrupt_while_an_object_is_forgotten_is_not_lost(tmp_path: Path) -> None:
    """Python swallows what ``__del__`` raises, with a traceback; the command must end all the same."""
    script = """
import click, signal, sys, time
from sa3_mlx.cli import group

signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored in jobs in the background

class Forgotten:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

@click.group()
def program(): ...

@program.command()
def work():
    Forgotten()
    time.sleep(60)
    print("went on")

sys.argv = ["program", "work"]
group.run_process(program, "program")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == "program: interrupted; nothing half-written was left"


def test_commands_whose_product_is_text_fail_without_a_reader(shell) -> None:
    for command in ("models", "--help", "--version"):
        full = shell(f"sa3 {command} >/dev/full")
        assert full.code == 2 and "No space left on device" in full.err
    assert "standard output cannot be written (it is closed)" in shell("sa3 models >&-").err
    assert shell("sa3 models | true").err == ""


def test_prompts_from_a_closed_stream_and_from_pipes(shell, tmp_path: Path) -> None:
    sound = f"sa3 generate --model little --seconds 0.2 --steps 1 --seed 1 --out {tmp_path}/p.wav"
    closed = shell(f"{sound} --prompt-file - <&-")
    assert closed.code == 2 and "standard input is closed: give the name of a file in place of -" in closed.err
    assert shell(f"{sound} --prompt-file <(echo soft rain)").code == 0
    assert read_provenance(tmp_path / "p.wav").clip.prompt == "soft rain"
    big = shell(f"{sound} --force --prompt-file <(yes rain | head -c 20000000)")
    assert big.code == 2 and "more than 16 MiB of prompts" in big.err


def test_inputs_from_a_closed_stream_from_pipes_and_empty_ones(shell, tmp_path: Path) -> None:
    write_tone(tmp_path / "in.wav", 0.3)
    vary = "sa3 vary - rain --model little --steps 1 --out v.wav"
    assert "standard input is closed" in shell(f"{vary} <&-").err
    assert "standard input: nothing came" in shell(f"{vary} </dev/null").err
    assert "sa3: standard input: cannot be read as audio" in shell(f"echo no sound | {vary}").err
    assert shell(f"cat in.wav | {vary}").code == 0
    assert shell("sa3 vary <(cat in.wav) rain --model little --steps 1 --seed 1 --out w.wav").code == 0
    made = read_provenance(tmp_path / "w.wav")
    assert made.input is not None and made.input.name == "-"
    assert "needs the input" not in shell("sa3 rerun w.wav --input - <in.wav").err


def test_standard_input_is_an_input(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file by name and by - gives the same latents, sounds and information."""
    write_tone(Path("in.wav"), 0.5)
    ok(run("generate", "soft rain", "--seconds", "0.5", "--steps", "1", "--seed", "1", "--out", "tagged.wav"))

    def piped(*args: str, name: str = "in.wav") -> str:
        with Path(name).open("rb") as file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", type("Stdin", (), {"buffer": file}))
            return (lambda result: result.out + result.err)(ok(run(*args)))

    assert "frames x 8 channels" in piped("encode", "-", "a.npy")
    ok(run("encode", "in.wav", "b.npy"))
    assert Path("a.npy").read_bytes() == Path("b.npy").read_bytes()
    edit = ("bell", "--steps", "1", "--seed", "1")
    for name, options in {
        "vary": (),
        "inpaint": ("--region", "0.1:0.2"),
        "extend": ("--seconds", "0.7"),
    }.items():
        text = piped(name, "-", *edit, *options, "--out", "a.wav", "--force")
        ok(run(name, "in.wav", *edit, *options, "--out", "b.wav", "--force"))
        assert soundfile.read("a.wav")[0].tolist() == soundfile.read("b.wav")[0].tolist()
        assert "sa3 rerun" not in text, "standard input is gone"
    assert "soft rain" in piped("info", "-", name="tagged.wav")
    for name in ("b.npy", "b.safetensors"):
        ok(run("encode", "in.wav", name, "--force"))
        assert "frames             63" in piped("info", "-", name=name)
        ok(run("decode", name, "b.wav", "--force"))
        piped("decode", "-", "a.wav", "--force", name=name)
        assert soundfile.read("a.wav")[0][:4000].tolist() == soundfile.read("b.wav")[0][:4000].tolist()
    assert "that in the tags of - is taken, 'soft rain'" in piped("vary", "-", "--out", "c.wav", name="tagged.wav")
