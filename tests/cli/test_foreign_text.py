"""Prompts, tags, names of models and files with control characters never reach the terminal raw."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sa3_mlx.cli.latents.files import output_samples, read_latents
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.files.audio import write_audio
from tests.support.command import AUTOENCODER, RATE, SMALL, Result, Run, ok, tone, use_home
from tests.support.tiny_checkpoint import write_checkpoint

EVIL = "rain\x1b]0;owned\x07\x9b31m"
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def clean(result: Result) -> Result:
    assert not RAW.search(result.out) and not RAW.search(result.err), result
    return result


def test_of_prompts_and_names_of_files(run: Run) -> None:
    pytest.importorskip("mlx.core")
    name = f"{EVIL}.wav"
    made = clean(ok(run("generate", EVIL, "--seconds", "0.2", "--steps", "1", "--out", name)))
    assert r"\x1b]0;owned\x07" in made.out and read_provenance(Path(name)).clip.prompt == EVIL
    assert r"'rain\x1b" in clean(ok(run("vary", name, "--steps", "1", "--out", "v.wav"))).err
    shown = clean(ok(run("info", name)))
    assert r"\x1b]0;owned\x07\x9b31m" in shown.out
    assert json.loads(clean(ok(run("info", name, "--json"))).out)["prompt"] == EVIL
    clean(ok(run("rerun", name)))
    clean(run("generate", "rain", "--out", f"{EVIL}/a.wav"))
    clean(run(f"sing{EVIL}"))
    clean(run("generate", "rain", "--model", EVIL))


def test_of_tags_of_others(run: Run) -> None:
    write_audio(Path("a.wav"), tone(0.1), RATE, comment=f"made by {EVIL}")
    write_audio(Path("b.wav"), tone(0.1), RATE, comment=json.dumps({"format": EVIL, EVIL: 1}))
    for name in ("a.wav", "b.wav"):
        assert r"\x1b" in clean(ok(run("info", name))).out
        clean(run("rerun", name))


def test_of_models(run: Run, shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core")
    shutil.copytree(shared_home, tmp_path / "own")
    use_home(tmp_path / "own", monkeypatch)
    write_checkpoint(tmp_path / "own" / "models" / f"m{EVIL}", replace(SMALL, name=f"n{EVIL}"))
    assert r"\x1b" in clean(ok(run("models"))).out
    assert r"n" in clean(ok(run("info", f"m{EVIL}"))).out
    made = clean(
        ok(run("generate", "rain", "--model", f"m{EVIL}", "--seconds", "0.2", "--steps", "1", "--out", "a.wav"))
    )
    assert r"mrain\x1b" in made.err and r"mrain\x1b" in made.out


def test_a_length_with_a_line_end_is_named_in_one_line():
    frames = np.zeros((20, AUTOENCODER.same.latent_channels), np.float32)
    with pytest.raises(ValueError, match=r"^b\.npy: its tags say 9 samples, which does not fit 20 frames$"):
        output_samples(Path("b.npy"), frames, {"samples": "9\r"}, AUTOENCODER)


def test_long_names_of_tensors_are_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"{'lat' * 1000}{i}": np.zeros(1, np.float32) for i in range(20)}, path)
    with pytest.raises(ValueError, match="expected one tensor 'latents', found latlat") as refusal:
        read_latents(path)
    assert len(str(refusal.value)) < 1000 and "and 12 more" in str(refusal.value)
