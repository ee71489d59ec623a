"""Preparing sounds loses nothing: refused, killed or out of space, what was there stays, and nothing is left over."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_mlx.cli.app import run
from tests.support.command import AUTOENCODER, snapshot
from tests.support.command import RATE as RATE_OF_MODEL
from tests.support.tiny_checkpoint import write_checkpoint

RATE = 44_100


def _record(folder: Path, *names: str, bad: tuple[str, ...] = (), rate: int = RATE) -> Path:
    """Write short captioned recordings, the bad ones of which are text."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate((*names, *bad)):
        path = folder / f"{name}.wav"
        audio = np.random.default_rng(number).integers(-9000, 9000, (1000, 2)).astype(np.int16)
        soundfile.write(path, audio, rate)
        if name in bad:
            path.write_text("no audio")
        path.with_suffix(".txt").write_text(f"sound {name}\n")
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that is to be refused; return its one line."""

    def call(*words: object) -> str:
        capsys.readouterr()
        assert run([str(word) for word in words]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sa3: ")]
        assert len(said) == 1 and not re.search(r"Errno|Traceback|unexpected|unpack requires", said[0])
        return said[0]

    return call


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- data import


def test_a_refused_import_leaves_the_cache_that_was_there(tmp_path: Path, refused: Callable[..., str]) -> None:
    good, bad = _record(tmp_path / "good", "a"), _record(tmp_path / "bad", "b", bad=("c",))
    assert run(["data", "import", str(good), str(tmp_path / "cache")]) == 0
    before = snapshot(tmp_path / "cache")
    assert "unreadable" in refused("data", "import", bad, tmp_path / "cache", "--force")
    assert snapshot(tmp_path / "cache") == before
    assert "holds a cache already" in refused("data", "import", good, tmp_path / "cache")
    assert snapshot(tmp_path / "cache") == before and _names(tmp_path) == ["bad", "cache", "good"]
    assert run(["data", "import", str(_record(tmp_path / "new", "d")), str(tmp_path / "cache"), "--force"]) == 0
    assert "d.wav" in (tmp_path / "cache" / "index.json").read_text()


def test_what_is_no_cache_is_never_replaced(tmp_path: Path, refused: Callable[..., str]) -> None:
    good = _record(tmp_path / "good", "a")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "index.json").write_text('{"pages": 3}')
    assert "expected format" in refused("data", "import", good, tmp_path / "foreign", "--force")
    (tmp_path / "foreign" / "notes.md").write_text("mine")
    assert "holds notes.md" in refused("data", "import", good, tmp_path / "foreign", "--force")
    assert (tmp_path / "foreign" / "index.json").read_text() == '{"pages": 3}'
    before = snapshot(good)
    assert "the recordings lie in it" in refused("data", "import", good, good, "--force")
    assert "the recordings lie in it" in refused("data", "import", good, tmp_path, "--force")
    assert snapshot(good) == before


def test_a_killed_import_leaves_the_cache_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every step until the exchange the old index is there: what is written lies beside."""
    from sa3_torch.train.data import clip_cache
    from sa3_torch.train.data.user_folder import import_folder

    good = _record(tmp_path / "good", "a", "b")
    import_folder(good, tmp_path / "cache", captions_required=True)
    before = snapshot(tmp_path / "cache")
    inner = clip_cache.write_attribution

    def last_step(*arguments: object) -> None:
        assert snapshot(tmp_path / "cache") == before
        inner(*arguments)

    monkeypatch.setattr(clip_cache, "write_attribution", last_step)
    import_folder(good, tmp_path / "cache", captions_required=True, overwrite=True)


def test_the_share_of_unreadable_files_can_be_given(tmp_path: Path, refused: Callable[..., str]) -> None:
    folder = _record(tmp_path / "in", *"abcdefghi", bad=("z",))
    assert "more than 1 %" in refused("data", "import", folder, tmp_path / "cache")
    assert "more than 5 %" in refused("data", "import", folder, tmp_path / "cache", "--skip-unreadable", "5%")
    assert run(["data", "import", str(folder), str(tmp_path / "cache"), "--skip-unreadable", "10%"]) == 0
    assert "such as 5%" in refused("data", "import", folder, tmp_path / "no", "--skip-unreadable", "many")


# --- shards and pre-encode


def test_refused_shards_leave_nothing_and_the_mended_folder_is_packed(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    pytest.importorskip("webdataset", reason="the training extra is not installed")
    folder = _record(tmp_path / "in", "a", bad=("b",))
    assert "unreadable" in refused("data", "shards", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _record(folder, "b")
    assert run(["data", "shards", str(folder), str(tmp_path / "out")]) == 0
    assert "the recordings lie in it" in refused("data", "shards", folder, folder)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch", reason="the training twin needs torch")
    return write_checkpoint(tmp_path_factory.mktemp("autoencoder"), AUTOENCODER)


def test_a_refused_pre_encode_goes_on_once_its_files_are_mended(
    tmp_path: Path, autoencoder: Path, refused: Callable[..., str]
) -> None:
    """With nothing encoded yet, with whole shards before the bad file, and with one that was left out before."""
    words = ["--autoencoder", str(autoencoder), "--copies", "1", "--shard-frames", "20"]
    for name, bad, share in (("first", ("a",), "1%"), ("later", ("d",), "1%"), ("both", ("a", "d"), "20%")):
        folder = _record(tmp_path / name, *(set("abcdef") - set(bad)), bad=bad, rate=RATE_OF_MODEL)
        encode = ["pre-encode", "--data", folder, *words, "--out", tmp_path / f"{name}-out", "--skip-unreadable", share]
        assert "unreadable" in refused(*encode)
        done = set((tmp_path / f"{name}-out").glob("shard-*.json"))
        assert bool(done) == (name != "first")
        _record(folder, *bad, rate=RATE_OF_MODEL)
        assert run([str(word) for word in encode]) == 0
        encode[encode.index("--out") + 1] = tmp_path / f"{name}-whole"
        assert run([str(word) for word in encode]) == 0
        one, other = (snapshot(tmp_path / f"{name}-{end}") for end in ("out", "whole"))
        assert [*one.values()] == [*other.values()]


def test_other_recordings_do_not_go_on_in_the_same_folder(
    tmp_path: Path, autoencoder: Path, refused: Callable[..., str]
) -> None:
    words = ["--autoencoder", autoencoder, "--copies", "1", "--shard-frames", "20", "--out", tmp_path / "out"]
    folder = _record(tmp_path / "in", *"abc", bad=("d",), rate=RATE_OF_MODEL)
    assert "unreadable" in refused("pre-encode", "--data", folder, *words)
    before = snapshot(tmp_path / "out")
    other = _record(tmp_path / "other", *"xyz", rate=RATE_OF_MODEL)
    assert "begun with another recordings" in refused("pre-encode", "--data", other, *words)
    assert snapshot(tmp_path / "out") == before


def test_a_disk_that_is_full_for_a_moment_leaves_no_recording_out(
    tmp_path: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """One writing that fails among many stops the command; the next run holds every recording."""
    from sa3_torch.train.data.latents import ShardFile

    folder = _record(tmp_path / "in", *(f"{number:03d}" for number in range(102)), rate=RATE_OF_MODEL)
    words = ["pre-encode", "--data", folder, "--autoencoder", autoencoder, "--copies", "1", "--out", tmp_path / "out"]
    inner, calls = ShardFile._put, list[int]()

    def full(self: ShardFile, data: bytes) -> None:
        calls.append(len(data))
        if len(calls) == 50:
            raise OSError(errno.ENOSPC, "No space left on device")
        inner(self, data)

    monkeypatch.setattr(ShardFile, "_put", full)
    said = refused(*words)
    assert "shard-00000.safetensors: could not be written (No space left on device)" in said and "free some" in said
    assert not list((tmp_path / "out").glob(".*")) and not list((tmp_path / "out").glob("shard*"))
    assert run([str(word) for word in words]) == 0
    assert len(json.loads((tmp_path / "out" / "shard-00000.json").read_text())["items"]) == 102
