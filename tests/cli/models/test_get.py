"""``sa3 get`` against a stand-in for the hub: licence, resume, verification, every refusal in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click
import pytest
from sa3_convert import hub as hub_module
from sa3_convert.hub import DownloadError, check_room

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.models.get import _ask
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.licences import RELEASED
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.origin import read_origin
from tests.support.foreign.hub import COMMIT, Hub, serving
from tests.support.foreign.official_checkpoint import TINY, write_official
from tests.support.foreign.port_files import PORT, names_of, port_arrays, write_port_files
from tests.support.tiny_checkpoint import write_checkpoint

OPTIMIZED = "stabilityai/stable-audio-3-optimized"
ORIGINAL = "stabilityai/stable-audio-3-small-music"
MODEL = replace(PORT["tiny-s"], name="sm-music")
DIT = "MLX/dit_sm-music_f16.npz"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both repositories of small-music, tiny, and a model of somebody in our format."""
    root = tmp_path_factory.mktemp("served")
    write_port_files(root / "optimized" / "MLX", MODEL)
    (root / "optimized" / "MLX" / "huge.bin").write_bytes(b"x")
    write_official(root / "original", TINY)
    write_checkpoint(root / "own", replace(TINY, name="mine"))
    (root / "own" / "README.md").write_text("---\nlicense: mit\n---\n")
    return {OPTIMIZED: root / "optimized", ORIGINAL: root / "original", "someone/Their-Model": root / "own"}


@pytest.fixture
def hub(served: dict[str, Path]) -> Iterator[Hub]:
    with serving(served) as hub:
        yield hub


def installed(home: Path, name: str = "small-music") -> Path:
    return home / "sa3" / "models" / name


def check_refused(done, home: Path, *words: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    last = [line for line in done.stderr.splitlines() if line.startswith("sa3: ")]
    assert len(last) == 1 and done.stderr.endswith(last[0] + "\n"), done.stderr
    for word in words:
        assert word in last[0], last[0]
    assert not (home / "sa3" / "models").exists()


def test_a_model_comes_without_an_account_verified_and_converted(hub, tmp_path):
    done = hub.sa3(tmp_path, "get", "small-music", "--accept-licence")
    assert done.returncode == 0, done.stderr
    assert "next: sa3 generate PROMPT --model small-music" in done.stdout
    for word in (OPTIMIZED, COMMIT, "Stability AI Community License: https://", "Gemma Terms of Use", "GB to download"):
        assert word in done.stderr
    folder = installed(tmp_path)
    assert ModelConfig.load(folder).name == "small-music"
    origin = read_origin(folder)
    assert origin is not None and (origin.repository, origin.revision) == (OPTIMIZED, COMMIT)
    hashes = {file.name: file.hash for file in origin.files}
    assert hashes[DIT] == file_hash(hub.repositories[OPTIMIZED] / DIT)
    assert not [path for _, path in hub.asked if path.endswith("huge.bin")]
    assert not (tmp_path / "sa3" / "downloads").exists()
    assert json.loads((tmp_path / "sa3" / "revisions.json").read_text()) == {OPTIMIZED: COMMIT}
    check = hub.sa3(tmp_path, "get", "small-music")
    assert check.returncode == 2 and "is installed already" in check.stderr
    again = hub.sa3(tmp_path, "get", "small-music", "--force", "--quiet")  # the licence was accepted for good
    assert again.returncode == 0 and again.stderr == ""
    assert hub.asked[-1][1].startswith(f"{OPTIMIZED}/resolve/{COMMIT}/")


def test_a_pipe_must_accept_the_licence(hub, tmp_path):
    done = hub.sa3(tmp_path, "get", "small-music")
    check_refused(done, tmp_path, "--accept-licence", "Stability AI Community License", "Gemma")
    assert not [path for _, path in hub.asked if "/resolve/" in path]


def test_with_a_token_the_original_one_is_taken(hub, tmp_path):
    done = hub.sa3(tmp_path, "get", "small-music", "--accept-licence", HF_TOKEN="hf_somebody")
    assert done.returncode == 0, done.stderr
    origin = read_origin(installed(tmp_path))
    assert origin is not None and origin.repository == ORIGINAL
    assert {file.name for file in origin.files} >= {"model.safetensors", "t5gemma-b-b-ul2/tokenizer.json"}
    wanted = hub.sa3(tmp_path, "get", "small-music", "--source", "optimized", "--name", "half", HF_TOKEN="hf_somebody")
    assert wanted.returncode == 0, wanted.stderr
    assert read_origin(installed(tmp_path, "half")).repository == OPTIMIZED


def test_a_download_that_breaks_off_goes_on_within_the_process(hub, tmp_path):
    hub.cut[DIT] = 300_000
    done = hub.sa3(tmp_path, "get", "small-music", "--accept-licence")
    assert done.returncode == 0, done.stderr
    tries = [asked for asked, path in hub.asked if path.endswith(DIT) and asked != "HEAD"]
    assert len(tries) == 2 and not hub.cut  # the library keeps whole blocks of 10 MB, which this file does not fill


def test_a_download_that_stalls_goes_on(hub, tmp_path):
    hub.stalls[DIT] = [5000, 9000]
    done = hub.sa3(tmp_path, "get", "small-music", "--accept-licence", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert done.returncode == 0, done.stderr
    tries = [asked for asked, path in hub.asked if path.endswith(DIT) and asked != "HEAD"]
    assert len(tries) == 3 and not hub.stalls[DIT]


def test_a_download_that_stalls_for_ever_is_one_line(hub, tmp_path):
    hub.stalls[DIT] = [5000] * 99
    done = hub.sa3(tmp_path, "get", "small-music", "--accept-licence", HF_HUB_DOWNLOAD_TIMEOUT="1")
    check_refused(done, tmp_path, "download failed", "ReadTimeout", "run again, what is there is kept")


def test_a_download_that_was_ended_goes_on_in_the_next_process(hub, tmp_path):
    """The disk refuses after 200,000 bytes of a file; the second try takes only what is missing."""
    full = hub.sa3(tmp_path, "get", "small-music", "--accept-licence", limit=200_000)
    check_refused(full, tmp_path, "could not be written", "what is there is kept", "free some space")
    hub.asked.clear()
    done = hub.sa3(tmp_path, "get", "small-music", "--accept-licence")
    assert done.returncode == 0, done.stderr
    ranges = [asked for asked, path in hub.asked if path.endswith(DIT) and asked.startswith("bytes=")]
    assert len(ranges) == 1 and 0 < int(ranges[0].removeprefix("bytes=").rstrip("-")) <= 200_000


def test_a_file_with_another_hash_is_refused_and_removed(hub, tmp_path):
    hub.lies.add(DIT)
    done = hub.sa3(tmp_path, "get", "small-music", "--accept-licence")
    check_refused(done, tmp_path, DIT, "is not what the hub announces", "run again")
    assert not list((tmp_path / "sa3" / "downloads").rglob("*dit*"))
    hub.lies.clear()
    assert hub.sa3(tmp_path, "get", "small-music").returncode == 0


def test_a_small_file_with_another_hash_is_refused_too(hub, tmp_path):
    hub.lies.add("MLX/model_config.json")
    done = hub.sa3(tmp_path, "get", "small-music", "--accept-licence")
    check_refused(done, tmp_path, "model_config.json is not what the hub announces", "git-sha1")


def test_no_network_is_one_line(tmp_path):
    done = Hub(repositories={}, port=1).sa3(tmp_path, "get", "small-music", "--accept-licence")
    check_refused(done, tmp_path, "cannot reach the hub", "check the network")


def test_offline_is_one_line(tmp_path):
    done = Hub(repositories={}, port=1).sa3(tmp_path, "get", "small-music", HF_HUB_OFFLINE="1")
    check_refused(done, tmp_path, "offline (HF_HUB_OFFLINE is set)", f"https://huggingface.co/{OPTIMIZED}")


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_names_its_page_the_login_and_the_way_without(hub, tmp_path, status):
    hub.status = status
    done = hub.sa3(tmp_path, "get", "small-music", "--accept-licence", HF_TOKEN="hf_of_somebody_without_access")
    words = (f"https://huggingface.co/{ORIGINAL}", "hf auth login", "--source optimized")
    check_refused(done, tmp_path, *words)


def test_a_failing_hub_is_one_line(hub, tmp_path):
    hub.status = 500
    check_refused(hub.sa3(tmp_path, "get", "small-music", "--accept-licence"), tmp_path, OPTIMIZED, "hub")


def test_a_repository_without_a_file_is_refused_before_the_licence_is_asked(hub, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(hub.repositories[OPTIMIZED], folder)
    (folder / "MLX" / "t5gemma_f16.npz").unlink()
    hub.repositories = {OPTIMIZED: folder}
    check_refused(hub.sa3(tmp_path, "get", "small-music"), tmp_path, "has no MLX/t5gemma_f16.npz at revision 01234567")


def test_a_damaged_model_is_not_installed(hub, tmp_path):
    """It has the hash that is announced, so only the conversion sees it."""
    folder, arrays = tmp_path / "copy" / "MLX", port_arrays(MODEL)
    del arrays["decoder"]["mapping.bias"]
    write_port_files(folder, MODEL, arrays)
    hub.repositories = {OPTIMIZED: tmp_path / "copy"}
    check_refused(hub.sa3(tmp_path, "get", "small-music", "--accept-licence"), tmp_path, "missing: mapping.bias")


def test_a_model_of_somebody_is_installed_under_the_name_of_its_repository(hub, tmp_path):
    hub.licence = "mit"
    done = hub.sa3(tmp_path, "get", "https://huggingface.co/someone/Their-Model", "--accept-licence")
    assert done.returncode == 0, done.stderr
    folder = installed(tmp_path, "their-model")
    assert (folder / "model.safetensors").read_bytes() == (
        hub.repositories["someone/Their-Model"] / "model.safetensors"
    ).read_bytes()
    assert read_origin(folder).licences[0].name == "mit"
    hub.repositories = {"someone/other": hub.repositories[ORIGINAL]}
    refused = hub.sa3(tmp_path, "get", "someone/other", "--accept-licence")
    assert refused.returncode == 2 and "not a model that 'sa3 push' wrote" in refused.stderr


def test_the_files_of_the_hubs_own_cache_are_used(hub, tmp_path):
    """Whoever has the official port has them there."""
    cache = tmp_path / "hf" / "hub" / f"models--{OPTIMIZED.replace('/', '--')}"
    snapshot = cache / "snapshots" / COMMIT / "MLX"
    shutil.copytree(hub.repositories[OPTIMIZED] / "MLX", snapshot)
    damaged = snapshot / names_of(MODEL)["encoder"]
    damaged.write_bytes(b"another file")
    done = hub.sa3(tmp_path, "get", "small-music", "--accept-licence")
    assert done.returncode == 0, done.stderr
    loaded = {path.rsplit("/", 1)[1] for asked, path in hub.asked if "/resolve/" in path and asked == "GET"}
    assert loaded == {names_of(MODEL)["encoder"]}
    assert damaged.read_bytes() == b"another file"


def test_names_that_are_none_are_refused_without_a_question(tmp_path):
    offline = Hub(repositories={}, port=1)
    check_refused(offline.sa3(tmp_path, "get", "large"), tmp_path, "there are no public weights of this model")
    check_refused(offline.sa3(tmp_path, "get", "smal-music"), tmp_path, "no released model has that name")
    check_refused(offline.sa3(tmp_path, "get", "small-music", "--name", "../x"), tmp_path, "not the name of a folder")
    check_refused(offline.sa3(tmp_path, "get", "same-s", "--source", "optimized"), tmp_path, "original repository only")


def test_a_full_disk_is_seen_before_anything_is_downloaded(monkeypatch, tmp_path):
    usage = type("Usage", (), {"free": 3_000_000_000})
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda _: usage)
    check_room({tmp_path / "a": 1_400_000_000, tmp_path / "b": 1_400_000_000})
    with pytest.raises(DownloadError, match=r"3.2 GB needed, 3.0 GB free; .* SA3_HOME"):  # both lie on one disk
        check_room({tmp_path / "a": 1_600_000_000, tmp_path / "b" / "c": 1_600_000_000})


def test_what_the_repository_names_cannot_leave_the_folder(hub, tmp_path, monkeypatch):
    import tests.support.foreign.hub as support

    entry = {"rfilename": "../../evil.npz", "size": 1, "blobId": "0" * 40}
    monkeypatch.setattr(support, "_listing", lambda *_: [entry])
    check_refused(hub.sa3(tmp_path, "get", "small-music"), tmp_path, "lists a file '../../evil.npz'")


@pytest.mark.parametrize("answer", [True, False])
def test_a_missing_model_is_offered_in_a_terminal(answer, monkeypatch, tmp_path):
    """And only there: the command that asked goes on with what was installed."""
    questions: list[str] = []

    def install(name: str, _: object) -> None:
        write_checkpoint(tmp_path / "models" / name, replace(TINY, name=name))

    def confirm(question: str, **_: object) -> bool:
        questions.append(question)
        return answer

    monkeypatch.setenv("SA3_HOME", str(tmp_path))
    monkeypatch.setattr("sa3_mlx.cli.models.get.install", install)
    monkeypatch.setattr("sa3_mlx.cli.home.click.confirm", confirm)
    with pytest.raises(FileNotFoundError, match="run 'sa3 get small-music'"):
        find_model("small-music", generates=True)
    assert questions == []
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(f"sys.{stream}", type("Terminal", (), {"isatty": lambda _: True})())
    with pytest.raises(FileNotFoundError, match="no such model or folder"):
        find_model("smal-music", generates=True)
    assert questions == []
    if answer:
        assert find_model("small-music", generates=True).config.name == "small-music"
    else:
        with pytest.raises(FileNotFoundError, match="run 'sa3 get small-music'"):
            find_model("small-music", generates=True)
    assert len(questions) == 1 and "sa3 get small-music" in questions[0]


@pytest.mark.parametrize("answer", [True, False])
def test_a_terminal_is_asked_once(answer, monkeypatch, tmp_path):
    """Whoever declines gets nothing and is asked again; whoever accepts is not."""
    asked: list[str] = []

    def confirm(question: str, **_: object) -> bool:
        asked.append(question)
        if not answer:
            raise click.Abort
        return True

    monkeypatch.setenv("SA3_HOME", str(tmp_path))
    monkeypatch.setattr("sa3_mlx.cli.models.get.click.confirm", confirm)
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda _: True})())
    wanted = type("Wanted", (), {"name": "small-music", "licences": RELEASED})()
    for _ in range(2):
        if answer:
            _ask(wanted, accepts=False)
        else:
            with pytest.raises(click.Abort):
                _ask(wanted, accepts=False)
    assert len(asked) == (1 if answer else 2)
    assert (tmp_path / "licences.json").is_file() == answer
