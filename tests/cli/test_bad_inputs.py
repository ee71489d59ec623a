"""Everything that can be wrong is refused in one clear line, with a non-zero exit, and nothing half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from sa3_mlx.cli import backend
from sa3_mlx.common.files.safetensors import array_entry, write_tensors
from tests.support.command import RATE, SMALL, sa3, tone, truncate, write_tone

LITTLE = Path("models") / SMALL.name
HUGE = str(10**30)


# --- the command line -------------------------------------------------------------------------------------------------

GENERATE = {
    "no prompt": ([], "PROMPT"),
    "prompt not UTF-8": (["rain \udcff"], "not UTF-8"),
    "too many arguments": (["rain", "and", "wind"], "unexpected"),
    "unknown option": (["rain", "--loud"], "--loud"),
    "seconds zero": (["rain", "--seconds", "0"], "seconds is 0"),
    "seconds negative": (["rain", "--seconds", "-1"], "seconds is -1"),
    "seconds of days": (["rain", "--seconds", "1e6"], "at most 86400"),
    "seconds not a number": (["rain", "--seconds", "long"], "'long' is not a valid float"),
    "seconds nan": (["rain", "--seconds", "nan"], "finite"),
    "seconds infinite": (["rain", "--seconds", "inf"], "finite"),
    "seconds below a sample": (["rain", "--seconds", "0.00001"], "less than one sample"),
    "no steps": (["rain", "--steps", "0"], "1 to 1000"),
    "too many steps": (["rain", "--steps", "1001"], "1 to 1000"),
    "steps not whole": (["rain", "--steps", "1.5"], "not a valid integer"),
    "unknown sampler": (["rain", "--sampler", "ddim"], "euler"),
    "unknown backend": (["rain", "--backend", "jax"], "mlx"),
    "unknown dtype": (["rain", "--dtype", "int8"], "float16"),
    "text dtype that overflows": (["rain", "--text-dtype", "float16"], "'auto', 'float32', 'bfloat16'"),
    "unknown device": (["rain", "--device", "tpu"], "mps"),
    "device with mlx": (["rain", "--backend", "mlx", "--device", "cpu"], "MLX chooses its own"),
    "unknown format": (["rain", "--format", "mp2"], "pcm24"),
    "guidance too large": (["rain", "--guidance", "1000"], "0 to 100"),
    "guidance nan": (["rain", "--guidance", "nan"], "finite"),
    "apg out of range": (["rain", "--guidance", "2", "--apg", "2"], "0 to 1"),
    "rescale out of range": (["rain", "--rescale", "-0.1"], "0 to 1"),
    "interval reversed": (["rain", "--interval", "0.9", "0.1"], "start <= end"),
    "interval with one end": (["rain", "--interval", "0.5"], "--interval"),
    "norm threshold negative": (["rain", "--norm-threshold", "-1"], "norm threshold"),
    "apg without guidance": (["rain", "--guidance", "1", "--apg", "0.5"], "no effect at guidance scale 1"),
    "rescale without guidance": (["rain", "--rescale", "0.5"], "no effect at guidance scale 1"),
    "interval without guidance": (["rain", "--interval", "0", "0.5"], "no effect at guidance scale 1"),
    "norm threshold without guidance": (["rain", "--norm-threshold", "2"], "no effect at guidance scale 1"),
    "compiling with mlx": (["rain", "--backend", "mlx", "--compile"], "--compile is for --backend torch"),
    "seed negative": (["rain", "--seed", "-1"], "seed"),
    "seed too large": (["rain", "--seed", HUGE], "seed"),
    "seed runs over": (["rain", "--seed", str(2**63 - 1), "--batch", "2"], "seed"),
    "seed not whole": (["rain", "--seed", "lucky"], "not a valid integer"),
    "batch zero": (["rain", "--batch", "0"], "--batch"),
    "batch too large": (["rain", "--batch", "65"], "--batch"),
    "head-room negative": (["rain", "--head-room", "-1"], "head room"),
    "peak above full scale": (["rain", "--peak", "3"], "-60 to 0"),
    "peak nan": (["rain", "--peak", "nan"], "-60 to 0"),
    "unknown extension": (["rain", "--out", "a.aac"], ".flac"),
    "mp3 in wav": (["rain", "--out", "a.wav", "--format", "mp3"], "cannot hold 'mp3'"),
    "pcm in mp3": (["rain", "--out", "a.mp3", "--format", "pcm16"], "cannot hold 'pcm16'; allowed: mp3"),
    "mp3 on a pipe": (["rain", "--out", "-", "--format", "mp3"], "a WAV cannot hold 'mp3'"),
    "name too long": (["rain", "--out", "a" * 252 + ".wav"], "the name is too long"),
    "long name of a picture": (
        ["rain", "--out", "a.wav", "--spectrogram", "a" * 252 + ".png"],
        "the name is too long",
    ),
    "memory beyond count": (["rain", "--max-memory", f"{'9' * 5000}GB"], "size is '999"),
    "seed of thousands of digits": (["rain", "--seed", "9" * 5000], "seed"),
    "misspelled model": (["rain", "--model", "litle"], "did you mean little?"),
    "unknown model of the hub": (["rain", "--model", "facebook/musicgen-small"], "no model of the hub that sa3 knows"),
    "model of the hub": (["rain", "--model", "stabilityai/stable-audio-3-medium"], "sa3 get medium"),
    "no extension": (["rain", "--out", "a"], "extension"),
    "float in flac": (["rain", "--out", "a.flac", "--format", "float"], "cannot hold"),
    "folder missing": (["rain", "--out", "no/a.wav"], "no such folder"),
    "picture is no png": (["rain", "--out", "a.wav", "--spectrogram", "a.jpg"], ".png"),
    "picture folder missing": (["rain", "--out", "a.wav", "--spectrogram", "no/a.png"], "no such folder"),
    "unknown model": (["rain", "--model", "gpt"], "known: small-music"),
    "model not installed": (["rain", "--model", "medium"], "sa3 get medium"),
    "model without weights": (["rain", "--model", "large"], "no public weights"),
    "autoencoder": (["rain", "--model", "only-autoencoder"], "autoencoder alone"),
    "prompt file missing": (["--prompt-file", "p.txt"], "no such file"),
}


@pytest.mark.parametrize("case", GENERATE)
def test_generate_refuses(refused: Callable[..., str], case: str):
    args, message = GENERATE[case]
    assert message in refused("generate", *args)


def test_no_command_at_all_shows_the_help(capfd: pytest.CaptureFixture[str]):
    result = sa3(capfd)
    assert result.code == 2 and "generate  Make audio from a prompt." in result.err and "sa3:" not in result.err


def test_commands_refuse_what_they_do_not_know(refused: Callable[..., str]):
    assert "no command 'sing'; commands: generate" in refused("sing")
    assert "no command 'genrate'; did you mean 'generate'?" in refused("genrate", "rain")
    assert "Did you mean 'render'?" in refused("data", "rendr", "x")
    assert "'--seconds'" in refused("generate", "rain", "--secnds", "1")
    assert "no such option" in refused("--sing").lower()
    assert "MODEL" in refused("info") and "no such model" in refused("info", "nothing.wav")
    assert "PROMPT" not in refused("convert", "nothing") and "released" in refused("convert", "nothing")
    assert "no such folder or file" in refused("convert", "large", "out")
    assert "no public weights" in refused("get", "large")
    assert "needs OUT" in refused("convert", "little", "--to-official")
    Path("plain").mkdir()
    assert "--name" in refused("convert", "plain")
    for source in (Path("..") / "home" / LITTLE, "little", "demo"):
        assert f"{source}: already in the sa3 format" in refused("convert", source, "out")
        assert f"{source}: already in the sa3 format" in refused("convert", source)
    assert "not the name of a folder" in refused("convert", "plain", "--name", "../x")
    assert "no manifest.json" in refused("verify", "little", ".")


def test_existing_files_are_not_replaced_without_force(refused: Callable[..., str]):
    write_tone(Path("a.wav"))
    Path("a.png").write_bytes(b"a picture")
    Path("a.npy").write_bytes(b"latents")
    Path("r-2.wav").write_bytes(b"one of a batch")
    assert "--force" in refused("generate", "rain", "--out", "a.wav")
    assert "--force" in refused("generate", "rain", "--out", "b.wav", "--spectrogram", "a.png")
    assert "--force" in refused("generate", "rain", "--out", "r.wav", "--batch", "2")
    assert "--force" in refused("encode", "a.wav", "a.npy")
    Path("plain").mkdir()
    assert "--force" in refused("convert", "plain", ".")


def test_a_folder_is_not_replaced_by_a_file(refused: Callable[..., str]):
    write_tone(Path("a.wav"))
    for name in ("f.wav", "f.png", "f.npy", "f.safetensors"):
        Path(name).mkdir()
    assert "is a folder" in refused("generate", "rain", "--out", "f.wav", "--force")
    assert "is a folder" in refused("generate", "rain", "--out", "b.wav", "--spectrogram", "f.png", "--force")
    assert "is a folder" in refused("encode", "a.wav", "f.npy", "--force")
    assert "is a folder" in refused("encode", "a.wav", "f.safetensors", "--force")


def test_a_result_that_is_not_finite_is_not_written(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlx.core")
    monkeypatch.setattr(
        "sa3_mlx.common.generation.pipeline.kept_part", lambda _chunk, decoded, _ratio: decoded * np.float32(np.nan)
    )
    assert "overflowed" in refused("generate", "rain", "--seconds", "0.2", "--out", "a.wav", "--backend", "mlx")


def test_a_failing_backend_is_one_line(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    def fail(message: str) -> Callable[..., None]:
        def load(*_: object, compiled: bool, adapters: object, merged: bool) -> None:  # noqa: ARG001
            raise RuntimeError(message)

        return load

    monkeypatch.setattr(backend, "load", fail("[malloc] Unable to allocate 10 bytes.\nsecond line"))
    assert "out of memory ([malloc] Unable to allocate 10 bytes.)" in refused("generate", "rain", "--out", "a.wav")
    monkeypatch.setattr(backend, "load", fail("device lost"))
    assert refused("generate", "rain", "--out", "a.wav") == "sa3: device lost"


def test_a_prompt_file_must_be_text_with_prompts(refused: Callable[..., str]):
    Path("empty.txt").write_text("\n# nothing\n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00rain")
    assert "no prompt in it" in refused("generate", "--prompt-file", "empty.txt")
    assert "UTF-8" in refused("generate", "--prompt-file", "binary.txt")


def test_a_full_disk_is_noticed_before_any_work(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(total=10**9, used=10**9, free=1000))
    assert "free" in refused("generate", "rain", "--out", "a.wav")


def test_a_disk_that_fills_up_while_writing_leaves_nothing(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert "No space left on device" in refused("generate", "rain", "--seconds", "0.2", "--out", "a.wav")


def test_a_missing_framework_is_named(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "available", lambda name: name == "mlx")
    assert "pip install 'sa3[torch]'" in refused("generate", "rain", "--backend", "torch")
    monkeypatch.setattr(backend, "available", lambda _name: False)
    assert "neither mlx nor torch" in refused("generate", "rain")


# --- audio files ------------------------------------------------------------------------------------------------------


def _audio_file(kind: str) -> Path:
    path = Path("in.flac" if "flac" in kind else "in.wav")
    if kind == "missing":
        return path
    if kind == "folder":
        path.mkdir()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("this is not audio, it is a sentence")
    elif kind == "random bytes":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "header alone":
        write_tone(path)
        path.write_bytes(path.read_bytes()[:20])
    elif kind == "no samples":
        soundfile.write(path, np.zeros((0, 2), np.float32), RATE)
    elif kind in ("truncated wav", "truncated flac"):
        write_tone(path)
        truncate(path, 0.5)
    elif kind in ("nan", "infinite"):
        audio = tone(0.5)
        audio[77, 1] = np.nan if kind == "nan" else np.inf
        soundfile.write(path, audio, RATE, subtype="FLOAT")
    return path


AUDIO = {
    "missing": "no such audio file",
    "folder": "not a file",
    "empty": "cannot be read",
    "text": "cannot be read",
    "random bytes": "cannot be read",
    "header alone": "in.wav",
    "no samples": "no audio",
    "truncated wav": "truncated",
    "truncated flac": "in.flac",
    "nan": "sample 77",
    "infinite": "sample 77",
}


@pytest.mark.parametrize("kind", AUDIO)
def test_bad_audio_is_refused_by_every_command_that_reads_it(refused: Callable[..., str], kind: str):
    path = _audio_file(kind)
    for args in (
        ("vary", path, "rain"),
        ("inpaint", path, "--region", "0.1:0.2", "--out", "o.wav"),
        ("extend", path, "--seconds", "2"),
        ("encode", path, "z.npy"),
    ):
        assert AUDIO[kind] in refused(*args)


def test_names_of_files_that_are_not_utf8_are_refused(refused: Callable[..., str]):
    try:
        write_tone(Path("in\udcff.wav"))
    except OSError:
        pytest.skip("names of files are UTF-8 here")
    path = "in\udcff.wav"
    for args in (("vary", path, "rain"), ("encode", path, "z.npy"), ("info", path), ("rerun", path)):
        assert "'in\\udcff.wav': the name of the file is not UTF-8" in refused(*args)


EDITS = {
    "noise level zero": (["vary", "in.wav", "--noise-level", "0"], "noise level is 0"),
    "noise level above 1": (["vary", "in.wav", "--noise-level", "1.1"], "noise level is 1.1"),
    "noise level nan": (["vary", "in.wav", "--noise-level", "nan"], "noise level"),
    "vary without input": (["vary"], "INPUT"),
    "input too long": (["vary", "long.wav"], "--seconds"),
    "no region": (["inpaint", "in.wav"], "--region"),
    "region without colon": (["inpaint", "in.wav", "--region", "0.5"], "START:END"),
    "region of words": (["inpaint", "in.wav", "--region", "a:b"], "START:END"),
    "region without both ends": (["inpaint", "in.wav", "--region", ""], "START:END"),
    "inpainted input too long": (["inpaint", "long.wav", "--region", "0.1:0.2"], "long.wav: 4.00 s long, little makes"),
    "crossfade without a seam": (
        ["extend", "in.wav", "--seconds", "2", "--no-paste", "--crossfade-ms", "20"],
        "no effect",
    ),
    "region reversed": (["inpaint", "in.wav", "--region", "0.5:0.2"], "end must come after"),
    "region empty": (["inpaint", "in.wav", "--region", "0.5:0.5"], "end must come after"),
    "region before the clip": (["inpaint", "in.wav", "--region", "-0.5:0.5"], "starts before"),
    "region beyond the clip": (["inpaint", "in.wav", "--region", "0.5:1.5"], "outside the clip"),
    "region nan": (["inpaint", "in.wav", "--region", "nan:0.5"], "finite"),
    "regions overlap": (["inpaint", "in.wav", "--region", "0.1:0.5", "--region", "0.4:0.6"], "overlaps"),
    "region beyond all audio": (["inpaint", "in.wav", "--region", "0:1e308"], "no audio has this length"),
    "extend beyond all audio": (["extend", "in.wav", "--seconds", "1e308"], "no audio has this length"),
    "region too short": (["inpaint", "in.wav", "--region", "0.0085:0.0088"], "too short"),
    "clip beyond the audio": (["inpaint", "in.wav", "--region", "0.1:0.2", "--seconds", "2"], "add a region"),
    "crossfade negative": (["inpaint", "in.wav", "--region", "0.1:0.2", "--crossfade-ms", "-1"], "crossfade"),
    "crossfade too long": (["inpaint", "in.wav", "--region", "0.1:0.2", "--crossfade-ms", "2000"], "crossfade"),
    "extend without length": (["extend", "in.wav"], "--seconds"),
    "extend to less": (["extend", "in.wav", "--seconds", "0.5"], "longer"),
    "extend too far": (["extend", "in.wav", "--seconds", "90000"], "at most 86400"),
    "latents extension": (["encode", "in.wav", "z.pt"], ".safetensors"),
    "latents folder missing": (["encode", "in.wav", "no/z.npy"], "no such folder"),
    "no tags": (["rerun", "in.wav"], "no tags"),
    "rerun of nothing": (["rerun", "nothing.wav"], "no such audio file"),
}


@pytest.mark.parametrize("case", EDITS)
def test_edits_refuse(refused: Callable[..., str], case: str):
    write_tone(Path("in.wav"), 1.0)
    write_tone(Path("long.wav"), 4.0)
    args, message = EDITS[case]
    assert message in refused(*args)


def _write_latents(kind: str) -> Path:
    path = Path("z.npy" if kind.startswith("npy") else "z.safetensors")
    good = np.zeros((4, 8), np.float32)
    arrays: dict[str, dict[str, np.ndarray]] = {
        "wrong name": {"noise": good},
        "two tensors": {"latents": good, "more": good},
        "wrong channels": {"latents": good[:, :5]},
        "no frames": {"latents": good[:0]},
        "one axis": {"latents": good[0]},
        "whole numbers": {"latents": good.astype(np.int32)},
        "nan": {"latents": good * np.nan},
        "wrong length": {"latents": good},
        "length of thousands of digits": {"latents": good},
        "length of another script": {"latents": good},
        "other model": {"latents": good},
        "truncated": {"latents": good},
        "other format": {"latents": good},
    }
    encoded = {"format": "sa3-encoded/1"}
    tags = {
        "wrong length": encoded | {"samples": "9000"},
        "length of thousands of digits": encoded | {"samples": "9" * 5000},
        "length of another script": encoded | {"samples": "²"},
        "other format": {"format": "sa3-latents/1"},
        "other model": encoded | {"model": "m", "model_hash": "sha256:other"},
    }
    if kind in arrays:
        entries = [array_entry(name, array) for name, array in arrays[kind].items()]
        write_tensors(path, entries, tags.get(kind, {}))
        if kind == "truncated":
            truncate(path, 0.9)
    elif kind == "npy of another format":
        np.save(path, good)
        Path("z.npy.json").write_text('{"samples": "64"}')
    elif kind == "npy with tags in a list":
        np.save(path, good)
        Path("z.npy.json").write_text("[1]")
    elif kind == "npy with tags that are no JSON":
        np.save(path, good)
        Path("z.npy.json").write_text("{")
    elif kind == "npy of a zip":
        with path.open("wb") as file:
            np.savez(file, latents=good)
    elif kind == "npy of zip garbage":
        path.write_bytes(b"PK\x03\x04" + bytes(range(200)))
    elif kind == "npy with a damaged header":
        np.save(path, good)
        path.write_bytes(path.read_bytes().replace(b"'shape'", b"'shape"))
    elif kind == "npy of more than it has":
        np.save(path, good)
        path.write_bytes(path.read_bytes().replace(b"(4, 8)", b"(9000000000000,8)").replace(b" " * 10 + b"\n", b"\n"))
    elif kind == "npy beyond float32":
        np.save(path, np.full((4, 8), 1e300))
    elif kind == "npy of objects":
        np.save(path, np.array([{}, 1], dtype=object), allow_pickle=True)
    elif kind == "npy of text":
        path.write_text("numbers")
    return path


LATENTS = {
    "missing": "no such file",
    "wrong name": "one tensor 'latents'",
    "two tensors": "one tensor 'latents'",
    "wrong channels": "5 channels",
    "no frames": "(frames, channels)",
    "one axis": "(frames, channels)",
    "whole numbers": "int32",
    "nan": "NaN",
    "wrong length": "9000 samples",
    "length of thousands of digits": "999... samples, which does not fit 4 frames",
    "length of another script": "² samples, which does not fit 4 frames",
    "npy of more than it has": "z.npy: not a file of latents, or damaged",
    "other model": "encoded by m",
    "truncated": "truncated",
    "npy of objects": "not a file of latents",
    "npy of text": "not a file of latents",
    "other format": "its format is 'sa3-latents/1', expected 'sa3-encoded/1'",
    "npy of another format": "z.npy.json: its format is None",
    "npy with tags in a list": "z.npy.json: not the tags of latents",
    "npy of a zip": "z.npy: not a file of latents",
    "npy with tags that are no JSON": "z.npy.json: not the tags of latents",
    "npy of zip garbage": "z.npy: not a file of latents",
    "npy with a damaged header": "z.npy: not a file of latents",
    "npy beyond float32": "z.npy: the latents have NaN or infinite values, or values beyond float32",
}


@pytest.mark.parametrize("kind", LATENTS)
def test_bad_latents_are_refused(refused: Callable[..., str], kind: str):
    assert LATENTS[kind] in refused("decode", _write_latents(kind), "o.wav", "--model", "little")
