"""What a new user stumbles over, and what a file of somebody else must not do: sizes, names, links, prompts, extras."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.cli import backend
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.files.audio import read_tags, write_audio
from sa3_mlx.common.files.spectrogram import save_spectrogram
from tests.support.command import RATE, Run, ok, sa3, tone, use_home, write_tone

QUICK = ("--seconds", "0.2", "--steps", "1")


def retagged(name: str, change: Callable[[dict], object]) -> None:
    """Write a sound whose tags are those of a.wav but for a change."""
    tags = json.loads(read_tags("a.wav"))
    change(tags)
    write_audio(name, tone(0.2), RATE, comment=json.dumps(tags))


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_tags_cannot_ask_for_more_than_a_request(run: Run) -> None:
    """Thousands of clips in a batch, and prompts of megabytes, are refused before anything is made."""
    pytest.importorskip("mlx.core")
    ok(run("generate", "rain", *QUICK, "--out", "a.wav"))
    retagged("many.wav", lambda tags: tags["request"]["items"].extend(tags["request"]["items"] * 1999))
    retagged("long.wav", lambda tags: tags["request"]["items"][0].update(prompt="rain " * 2_000_000))
    many, long = run("rerun", "many.wav"), run("rerun", "long.wav")
    assert many.code == 2 and "items has 2,000 entries: allowed are up to 256" in many.err
    assert long.code == 2 and "prompt has 10,000,000 characters: allowed are up to 10,000" in long.err
    assert "tags of long.wav" in (edit := run("vary", "long.wav", "--steps", "1", "--out", "v.wav")).err
    assert edit.code == 2 and "prompt has 10,000,000 characters" in edit.err and len(edit.err) < 500


def test_a_prompt_of_unknown_words_costs_a_short_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of the prompt and of the negative one; the demo has a closed vocabulary."""
    pytest.importorskip("mlx.core")
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    words = ["".join(letters) for letters in product("bcdfghjklm", repeat=3)]
    negative = ("--guidance", "3", "--negative", f"drum {'x' * 200}")
    made = sa3(capfd, "generate", " ".join(words), *QUICK, *negative, "--out", tmp_path / "a.wav")
    assert made.code == 0 and f"'{words[4]}' and 995 more" in made.err and words[5] not in made.err
    assert f"does not know '{'x' * 40}...'" in made.err and all(len(line) < 200 for line in made.err.splitlines())


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg"])
def test_a_name_may_be_as_long_as_names_can_be(run: Run, suffix: str) -> None:
    pytest.importorskip("mlx.core")
    name = "a" * (255 - len(suffix)) + suffix
    picture = ["--spectrogram", "b" * 251 + ".png"] if suffix == ".wav" else []
    ok(run("generate", "rain", *QUICK, "--out", name, *picture))
    assert read_provenance(Path(name)).clip.prompt == "rain"


def test_a_picture_that_fails_takes_no_sound_with_it(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core")

    def fail(path: Path, *args: object, title: str, made: object) -> None:
        if path.name.startswith("r-1"):
            raise OSError(f"{path}: could not be written (No space left on device)")
        save_spectrogram(path, *args, title=title, made=made)  # type: ignore[arg-type]

    monkeypatch.setattr("sa3_mlx.common.files.spectrogram.save_spectrogram", fail)
    result = run("generate", "rain", *QUICK, "--batch", "2", "--seed", "1", "--out", "r.wav", "--spectrogram", "r.png")
    assert result.code == 2 and result.out.count("file ") == 2
    assert "sa3: r-1.png: could not be written (No space left on device); its sound r-1.wav is whole" in result.err
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["r-1.wav", "r-2.png", "r-2.wav"]


def test_a_link_that_leads_nowhere_is_not_replaced(run: Run) -> None:
    write_tone(Path("in.wav"), 0.2)
    for name in ("a.wav", "a.png", "a.npy"):
        Path(name).symlink_to("elsewhere")
    for args in (
        ("generate", "rain", "--out", "a.wav"),
        ("generate", "rain", "--out", "b.wav", "--spectrogram", "a.png"),
        ("encode", "in.wav", "a.npy"),
    ):
        result = run(*args)
        assert result.code == 2 and "is a link to elsewhere, which is not there" in result.err
    assert all(Path(name).is_symlink() for name in ("a.wav", "a.png", "a.npy")) and not Path("b.wav").exists()


def test_files_that_are_not_named_are_called_after_their_own_prompt_and_seed(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    ok(run("generate", "rain", *QUICK, "--seed", "4", "--batch", "2"))
    Path("prompts").write_text("low kick\nbell\n")
    ok(run("generate", "--prompt-file", "prompts", *QUICK, "--seed", "7", "--format", "mp3"))
    names = ["bell-8.mp3", "low-kick-7.mp3", "rain-4.wav", "rain-5.wav"]
    assert sorted(path.name for path in tmp_path.glob("*-*.*")) == names
    for name in names:
        clip = read_provenance(Path(name)).clip
        assert name.startswith(f"{clip.prompt.replace(' ', '-')}-{clip.seed}.")


@pytest.mark.parametrize("suffix", ["mp3", "ogg"])
def test_lossy_files_are_made_again_from_their_tags(run: Run, suffix: str) -> None:
    pytest.importorskip("mlx.core")
    write_tone(Path("in.wav"), 0.5)
    ok(run("generate", "ピアノ", "--seconds", "0.5", "--steps", "1", "--out", f"a.{suffix}"))
    again = ok(run("rerun", f"a.{suffix}"))
    assert "equals" in again.out if suffix == "mp3" else "audio equal" in again.out
    assert read_provenance(Path(f"a-rerun.{suffix}")).clip.prompt == "ピアノ"
    edit = ok(run("inpaint", "in.wav", "bell", "--region", "0.1:0.2", "--steps", "1", "--out", f"i.{suffix}"))
    assert re.search("kept samples change in (mp3|vorbis); --out with .wav keeps them exactly", edit.err)
    assert "equal" in ok(run("rerun", f"i.{suffix}")).out
    ok(run("encode", f"a.{suffix}", "z.npy"))
    ok(run("decode", "z.npy", f"d.{suffix}"))


# --- homes and models -------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_read_does_not_stop_another(
    run: Run, shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx.core")
    shutil.copytree(shared_home, tmp_path / "own")
    use_home(tmp_path / "own", monkeypatch)
    (tmp_path / "own" / "models" / "locked").mkdir()
    (tmp_path / "own" / "models" / "spare").mkdir()
    is_file = Path.is_file

    def locked(path: Path) -> bool:
        if path.parent.name in ("locked", "spare"):
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", locked)
    assert "Permission denied" not in ok(run("generate", "rain", *QUICK, "--out", "a.wav")).err
    listing = ok(run("models")).out
    assert "locked" in listing and "Permission denied" in listing
    assert "Permission denied" in run("generate", "rain", "--model", "locked", "--out", "b.wav").err


def test_a_pipe_in_place_of_remembered_hashes_is_not_waited_for(
    run: Run, shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlx.core")
    shutil.copytree(shared_home, tmp_path / "own")
    use_home(tmp_path / "own", monkeypatch)
    store = tmp_path / "own" / "fingerprints.json"
    store.unlink(missing_ok=True)
    os.mkfifo(store)
    ok(run("generate", "rain", *QUICK, "--out", "a.wav"))
    assert json.loads(store.read_text())
    store.write_text("[" * 100_000)
    ok(run("generate", "rain", *QUICK, "--out", "b.wav"))


def test_models_of_the_hub_are_known_by_their_ids(run: Run) -> None:
    for text in ("https://huggingface.co/stabilityai/Stable-Audio-3-small-music", "small-music"):
        refused = run("convert", text)
        assert refused.code == 2 and "no such folder or file; 'sa3 get small-music'" in refused.err
    refused = run("convert", "stabilityai/stable-audio-open-1.0")
    assert refused.code == 2 and "released models: small-music, " in refused.err


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_an_edit_without_a_prompt_takes_that_of_the_tags_or_says_that_it_has_none(run: Run) -> None:
    pytest.importorskip("mlx.core")
    ok(run("generate", "soft rain", "--seconds", "0.5", "--steps", "1", "--out", "a.wav"))
    write_tone(Path("plain.wav"), 0.5)
    edits = {"vary": (), "inpaint": ("--region", "0.1:0.2"), "extend": ("--seconds", "0.7")}
    for name, options in edits.items():
        common = (*options, "--steps", "1", "--force", "--out", "o.wav")
        tagged = ok(run(name, "a.wav", *common))
        assert "note: no PROMPT: that in the tags of a.wav is taken, 'soft rain'" in tagged.err
        assert read_provenance(Path("o.wav")).clip.prompt == "soft rain"
        assert "nothing says what to make" in ok(run(name, "plain.wav", *common)).err
        assert read_provenance(Path("o.wav")).clip.prompt == ""
        assert "PROMPT" not in ok(run(name, "a.wav", "", *common)).err
        assert read_provenance(Path("o.wav")).clip.prompt == ""
        assert ok(run(name, "a.wav", "bell", *common, "--quiet")).err == ""
        assert read_provenance(Path("o.wav")).clip.prompt == "bell"


# --- what is missing --------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_missing_for_what(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sa3_mlx.cli.models.doctor._SIZE", 64)
    monkeypatch.setattr("sa3_mlx.cli.models.doctor._package", lambda name: None if name in ("torch", "mido") else "1")
    monkeypatch.setattr(backend, "available", lambda name: name == "mlx")
    monkeypatch.setattr("sa3_mlx.cli.models.doctor._blas", lambda _problems: None)
    result = run("doctor")
    assert re.search(r"torch +not installed: pip install 'sa3\[torch\]'", result.out)
    last = result.out.splitlines()[-1]
    assert last == "everything needed to make sounds is here; training needs torch, mido: pip install 'sa3[train]'"


def test_threads_of_pytorch_share_the_cores_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "available", lambda _name: True)
    for before, after in (
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ):
        monkeypatch.setattr(os, "environ", dict(before))
        assert backend.choose("torch") == "torch" and os.environ == after


def test_a_missing_package_is_named_with_its_extra(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "mido", None)
    result = run("data", "render", "sounds")
    if "fluidsynth" not in result.err:
        assert result.err == "sa3: this needs mido: pip install 'sa3[train]'\n"


def test_a_defect_is_one_line_and_a_traceback_on_demand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr("sa3_mlx.cli.models.listing.installed", broken)
    result = run("models")
    assert result.code == 2 and result.err == "sa3: unexpected KeyError ('x'): a defect of sa3; --debug shows where\n"
    with pytest.raises(KeyError):
        run("models", "--debug")


# --- long files -------------------------------------------------------------------------------------------------------


def test_of_a_long_sound_as_much_is_read_as_is_used(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten minutes, an edit of a fraction of a second reads the beginning; ``info`` reads none of an hour."""
    pytest.importorskip("mlx.core")
    write_audio("long.wav", np.tile(tone(1.0), (601, 1)), RATE)
    write_audio("short.wav", np.tile(tone(1.0), (3, 1)), RATE)
    read: list[int] = []
    import soundfile

    whole = soundfile.SoundFile.read

    def counted(self: soundfile.SoundFile, *args: object, **kwargs: object) -> np.ndarray:
        block = whole(self, *args, **kwargs)
        read.append(len(block))
        return block

    monkeypatch.setattr(soundfile.SoundFile, "read", counted)
    assert "peak not measured: longer than 600 s" in ok(run("info", "long.wav")).out and not read
    started = time.monotonic()
    for source in ("long.wav", "short.wav"):
        read.clear()
        ok(run("vary", source, "bell", "--seconds", "0.5", "--seed", "1", "--steps", "1", "--out", f"v-{source}"))
        assert sum(read) < 300_000, "a block or two"
    assert time.monotonic() - started < 60
    assert Path("v-long.wav").read_bytes()[-6000:] == Path("v-short.wav").read_bytes()[-6000:]
    assert "long.wav: 601.00 s long, little makes up to 3.20 s" in run("vary", "long.wav").err
    monkeypatch.setattr("sa3_mlx.cli.audio.source._HASHED_MAX", 1000)
    ok(run("vary", "long.wav", "bell", "--seconds", "0.5", "--seed", "1", "--steps", "1", "--out", "h.wav"))
    made = read_provenance(Path("h.wav"))
    assert made.input is not None and made.input.hash.startswith("audio-sha256:")
    assert "byte for byte" in ok(run("rerun", "h.wav")).out
    assert made.request == read_provenance(Path("v-long.wav")).request
