"""Preparing sounds loses nothing: refused, killed or out of space, what was there stays, and nothing is left over."""

from __future__ import annotations

import errno
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@pytest.mark.parametrize("last", ["write_silence", "write_attribution", "write_json"])
def test_an_encoding_that_ends_before_its_end_has_no_index(
    last: str, tmp_path: Path, autoencoder: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    """The index is what makes latents complete, so it appears when all else is there."""
    from sa3_torch.evaluate.stored import open_latents
    from sa3_torch.train.data.encode import pre_encode

    folder = _record(tmp_path / "in", *"abc", rate=RATE_OF_MODEL)
    words = ["pre-encode", "--data", folder, "--autoencoder", autoencoder, "--copies", "1", "--out", tmp_path / "out"]
    inner = getattr(pre_encode, last)

    def killed(path: Path, data: object) -> None:
        if last != "write_json" or path.name == "details.json":
            raise OSError("killed")
        inner(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(pre_encode, last, killed)
        refused(*words)
    assert not (tmp_path / "out" / "index.json").exists()
    with pytest.raises(FileNotFoundError, match=r"no index\.json, so it is not a complete"):
        open_latents(tmp_path / "out")
    assert run([str(word) for word in words]) == 0
    names = {"index.json", "details.json", "ATTRIBUTION.tsv", "silence.safetensors"}
    assert names <= set(_names(tmp_path / "out")) and len(open_latents(tmp_path / "out").items) == 3


# --- what is damaged, or is something else


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, autoencoder: Path) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    _record(root / "in", "a", "b", rate=RATE_OF_MODEL)
    words = ["pre-encode", "--data", root / "in", "--autoencoder", autoencoder, "--copies", "1", "--out", root / "out"]
    assert run([str(word) for word in words]) == 0
    return root / "out"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "entry 1: id is None; expected a text that is not empty"),
        ({"id": ""}, "entry 1: id is ''"),
        ({"captions": 5}, "entry 1: captions is 5; expected a list of texts"),
        ({"captions": [5]}, r"entry 1: captions is \[5\]"),
        ({"frames": 0}, "entry 1: frames is 0; expected a whole number, at least 1"),
        ({"seconds": -2.0}, r"entry 1: seconds is -2\.0; expected a number of seconds, at least 0"),
        ({"seconds": float("nan")}, "entry 1: seconds is nan"),
        ({"offset": -1}, "entry 1: offset is -1"),
        ({"colour": 1}, "entry 1: 'colour' is not known"),
    ],
)
def test_latent_items_that_cannot_be_are_named(
    encoded: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    from sa3_torch.train.data.latents import LatentSet

    shutil.copytree(encoded, tmp_path / "latents")
    path = tmp_path / "latents" / "shard-00000.json"
    about = json.loads(path.read_text())
    about["items"][1] |= change
    path.write_text(json.dumps(about))
    digest = json.loads((encoded / "index.json").read_text())["autoencoder"]
    with pytest.raises(ValueError, match=message) as caught:
        LatentSet(tmp_path / "latents", autoencoder=digest)
    assert str(caught.value).startswith(f"{path}: items: ") and "\n" not in str(caught.value)


def test_an_item_without_an_id_is_named(encoded: Path, tmp_path: Path) -> None:
    from sa3_torch.train.data.latents import LatentSet

    shutil.copytree(encoded, tmp_path / "latents")
    path = tmp_path / "latents" / "shard-00000.json"
    about = json.loads(path.read_text())
    del about["items"][0]["id"]
    path.write_text(json.dumps(about))
    digest = json.loads((encoded / "index.json").read_text())["autoencoder"]
    with pytest.raises(ValueError, match="entry 0: id is missing"):
        LatentSet(tmp_path / "latents", autoencoder=digest)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "silence.safetensors", "index.json", "shard-00000.json"])
@pytest.mark.parametrize("size", [0, 5, 100, -4])
def test_damaged_latents_are_one_line(encoded: Path, tmp_path: Path, name: str, size: int) -> None:
    from sa3_torch.train.data.latents import LatentSet

    shutil.copytree(encoded, tmp_path / "latents")
    path = tmp_path / "latents" / name
    path.write_bytes(path.read_bytes()[:size])
    digest = json.loads((encoded / "index.json").read_text())["autoencoder"]
    with pytest.raises(ValueError, match=r"damaged, truncated|not valid JSON") as caught:
        LatentSet(tmp_path / "latents", autoencoder=digest)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "about", [{"prompt": ""}, {"seconds_total": -1}, {"id": 3}, {"prompt": 5}, {"padding_mask": []}]
)
def test_public_latents_that_cannot_be_are_refused(tmp_path: Path, about: dict[str, object]) -> None:
    from sa3_torch.train.data.encode.public_latents import import_public

    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "0.npy", np.zeros((4, 2), np.float32))
    np.save(tmp_path / "in" / "silence.npy", np.zeros((1, 4, 2), np.float32))
    good = {"prompt": "a", "seconds_start": 0, "seconds_total": 1, "padding_mask": [1, 1], "sample_rate": 8}
    (tmp_path / "in" / "0.json").write_text(json.dumps(good | about))
    with pytest.raises(ValueError, match=r"0\.npy: not a pair of the public layout \("):
        import_public(tmp_path / "in", tmp_path / "out", autoencoder="sha256:a")
    (tmp_path / "in" / "0.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a JSON object"):
        import_public(tmp_path / "in", tmp_path / "out", autoencoder="sha256:a")
    assert not (tmp_path / "out" / "index.json").exists()


def test_shards_that_are_damaged_or_no_tar_files_are_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    pytest.importorskip("webdataset", reason="the training extra is not installed")
    assert run(["data", "shards", str(_record(tmp_path / "in", "a", "b")), str(tmp_path / "out")]) == 0
    tar, index = tmp_path / "out" / "audio-000000.tar", tmp_path / "index.json"
    data = tar.read_bytes()
    for size in (700, 3000, 0):
        tar.write_bytes(data[:size])
        assert f"{tar}: no tar file with recordings, or damaged" in refused("data", "index", tar, index)
    tar.write_text("words " * 1000)
    assert f"{tar}: no tar file" in refused("data", "index", tar, index)
    assert "no such file" in refused("data", "index", tmp_path / "none.tar", index)
    assert not index.exists()
    tar.write_bytes(data)
    index.write_text('{"pages": 3}')
    assert "is no index of shards" in refused("data", "index", tar, index)


@pytest.mark.parametrize("pattern", ["{0..999999999}.tar", "{0..9999}-{0..9999}.tar", "x{a..z}" + "{a..z}" * 4])
def test_patterns_without_an_end_are_refused_at_once(tmp_path: Path, pattern: str, refused: Callable[..., str]) -> None:
    pytest.importorskip("webdataset", reason="the training extra is not installed")
    assert "up to 1,000,000 are allowed" in refused("data", "index", pattern, tmp_path / "index.json")


@pytest.mark.parametrize("size", [0, 60, 130, -1])
def test_a_damaged_cache_is_one_line(tmp_path: Path, size: int) -> None:
    from sa3_torch.train.data.clip_cache import ClipSet
    from sa3_torch.train.data.user_folder import import_folder

    import_folder(_record(tmp_path / "in", "a"), tmp_path / "cache", captions_required=True)
    path = tmp_path / "cache" / "audio.npy"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"audio\.npy: damaged or truncated; make the cache again"):
        ClipSet(tmp_path / "cache")


def test_a_misspelled_folder_is_called_that(tmp_path: Path) -> None:
    from sa3_torch.train.data.clip_cache import FORMAT, read_index

    with pytest.raises(FileNotFoundError, match=r"sonuds: no such folder$"):
        read_index(tmp_path / "sonuds", FORMAT)


def test_folders_of_a_mac_are_read(tmp_path: Path) -> None:
    from sa3_torch.train.data.recordings import find_audio, read_sidecar

    _record(tmp_path, "a", "b")
    (tmp_path / "._a.wav").write_bytes(b"\0\5\26\7")
    (tmp_path / "a.txt").rename(tmp_path / "a.TXT")
    (tmp_path / "b.JSON").write_text('{"prompt": "from b"}')
    assert [path.name for path in find_audio(tmp_path)] == ["a.wav", "b.wav"]
    assert read_sidecar(tmp_path / "a.wav").captions == ("sound a",)
    assert read_sidecar(tmp_path / "b.wav").captions == ("from b",)


# --- a full disk


@contextmanager
def _full_disk(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``limit`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("limit", [0, 150, 600, 3000])
@pytest.mark.parametrize("command", ["import", "shards", "pre-encode", "export-latents", "import-latents"])
def test_a_full_disk_is_one_line_with_name_and_remedy_and_leaves_nothing(
    tmp_path: Path, autoencoder: Path, encoded: Path, command: str, limit: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = tmp_path / "out", ["--autoencoder", autoencoder]
    folder = _record(tmp_path / "in", *"abcd", rate=RATE_OF_MODEL)
    public = tmp_path / "public"
    if command == "import-latents":
        assert run([str(word) for word in ("data", "export-latents", encoded, public, *model)]) == 0
    words = {
        "import": ["data", "import", folder, out],
        "shards": ["data", "shards", folder, out],
        "pre-encode": ["pre-encode", "--data", folder, "--out", out, *model],
        "export-latents": ["data", "export-latents", encoded, out, *model],
        "import-latents": ["data", "import-latents", public, out, *model],
    }[command]
    capsys.readouterr()
    with _full_disk(limit):
        code = run([str(word) for word in words])
    errors = capsys.readouterr().err
    if limit == 3000 and code == 0:
        return  # all of its files are smaller
    said = [line for line in errors.splitlines() if "sa3: " in line]
    assert code == 2 and len(said) == 1 and "Traceback" not in errors
    assert re.search(rf"sa3: {out}\S*: could not be written \(File too large\).*; raise the limit", said[0])
    assert command == "pre-encode" or not out.exists()
    assert not [path for path in tmp_path.rglob(".*") if path.name != ".lock"]
    assert run([str(word) for word in words]) == 0
