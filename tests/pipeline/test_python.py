"""What a program or a notebook does with either twin: open by name, save, look, and be told what has no effect."""

from __future__ import annotations

import base64
import importlib
import io
import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_mlx.assets import DEMO
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.delivery.settings import Delivery
from sa3_mlx.common.files.audio import read_tags
from sa3_mlx.common.generation.events import Generation
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.installed import model_folder
from sa3_mlx.common.version import version
from tests.support.twins import Twin


@pytest.fixture
def home(random_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with one model, under the name of a released one."""
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    shutil.copytree(random_models["tiny-s"], tmp_path / "home" / "models" / "small-music")
    return tmp_path / "home"


REQUEST = Request(
    items=[
        Item(prompt="<b>kick</b>", seconds=0.5, seed=1),
        Item(prompt="", seconds=0.25, seed=2),
    ],
    sampling="euler:1:1",
    head_room_seconds=0,
)


def made(twin: Twin) -> Generation:
    return twin.module("pipeline").Pipeline.load("small-music").generate(REQUEST)


def test_models_are_opened_by_name_hub_id_and_path(twin: Twin, home: Path) -> None:
    load, installed = twin.module("pipeline").Pipeline.load, home / "models" / "small-music"
    assert load("demo").folder == DEMO
    repository = "stabilityai/stable-audio-3-small-music"
    for name in ("small-music", repository, f"https://huggingface.co/{repository}", str(installed), installed):
        assert load(name).folder == installed
    with pytest.raises(FileNotFoundError, match="sa3 get medium"):
        load("stabilityai/stable-audio-3-medium")
    with pytest.raises(FileNotFoundError, match="no model of the hub that sa3 knows; known: stabilityai/stable-audio"):
        load("stabilityai/stable-audio-open-1.0")
    with pytest.raises(FileNotFoundError, match="did you mean small-music"):
        load("smal-music")


def test_a_folder_goes_before_a_name_and_a_path_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert model_folder("demo") == DEMO and model_folder(Path("demo")) == Path("demo")
    Path("demo").mkdir()
    assert model_folder("demo") == Path("demo")


@pytest.mark.parametrize("name", ["sa3_mlx", "sa3_torch"])
def test_packages_say_their_version_and_have_what_the_page_of_music_names(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__version__ == version()
    page = (Path(__file__).parents[2] / "docs" / "music.md").read_text()
    named = set(re.findall(r"\b((?:[A-Z][a-z]+)+|extend)\((?=\w+[=,])", " ".join(re.findall(r"`([^`]+)`", page))))
    assert named >= {"Item", "TimedPrompt", "Inpaint", "Patch", "Loop", "extend"} and named <= set(package.__all__)
    assert all(hasattr(package, each) for each in package.__all__)


def test_what_was_ignored_is_refused(twin: Twin, home: Path) -> None:
    pipeline = twin.module("pipeline").Pipeline.load("small-music")
    assert home.is_dir()
    with pytest.raises(ValueError, match="part is 'all': tiny-s has text_encoder, conditioner, dit, same"):
        pipeline.free("all")
    with pytest.raises(ValueError, match="residency is 'x': allowed are run, phase, step"):
        pipeline.stream(REQUEST, residency="x")
    with pytest.raises(ValueError, match="items is 'rain'"):
        pipeline.stream(replace(REQUEST, items="rain"))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.ogg"])
def test_a_result_is_saved_with_its_request(twin: Twin, home: Path, tmp_path: Path, name: str) -> None:
    generation, path = made(twin), tmp_path / name
    assert home.is_dir() and generation.save(path, item=1) == path
    found = soundfile.read(path, dtype="float32", always_2d=True)[0]
    assert found.shape == generation.audio[1].shape
    if name in ("a.wav", "a.flac"):
        np.testing.assert_allclose(found, np.clip(generation.audio[1], -1, 1), atol=2**-15)
    tags = json.loads(read_tags(path))
    assert (tags["format"], tags["item"]) == ("sa3-request/1", 1) and Request.from_dict(tags["request"]) == REQUEST
    with pytest.raises(ValueError, match="a program saved it"):
        read_provenance(path)


def test_a_result_is_delivered_as_it_is_saved(twin: Twin, home: Path, tmp_path: Path) -> None:
    generation = made(twin)
    assert home.is_dir()
    wanted = Delivery(rate=16_000, peak_db=-30, fade_out=0.01)
    generation.save(tmp_path / "a.wav", delivery=wanted)
    found, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert rate == 16_000 and np.abs(found).max() == pytest.approx(10 ** (-30 / 20), rel=0.01)
    assert json.loads(read_tags(tmp_path / "a.wav"))["delivery"] == {"rate": 16_000, "peak_db": -30, "fade_out": 0.01}
    with pytest.raises(ValueError, match="fades of 9 s and 0 s do not fit into"):
        generation.save(tmp_path / "b.wav", delivery=Delivery(fade_in=9.0))


def test_saving_refuses_in_one_line(twin: Twin, home: Path, tmp_path: Path) -> None:
    generation = made(twin)
    assert home.is_dir()
    with pytest.raises(ValueError, match="item is 2: there are 2, counted from 0"):
        generation.save(tmp_path / "a.wav", item=2)
    with pytest.raises(ValueError, match=r"unknown audio extension '\.aac'; allowed: \.wav, \.flac, \.mp3, \.ogg"):
        generation.save(tmp_path / "a.aac")
    with pytest.raises(ValueError, match="cannot hold 'float'"):
        generation.save(tmp_path / "a.flac", subtype="float")
    assert not list(tmp_path.glob("a.*"))


def test_a_notebook_shows_players_and_pictures(twin: Twin, home: Path) -> None:
    generation = made(twin)
    assert home.is_dir() and repr(generation) == "Generation(2 x audio at 8000 Hz: 0.50 s, 0.25 s)"
    html = generation._repr_html_()
    assert "&lt;b&gt;kick&lt;/b&gt; (seed 1, 0.50 s)" in html and "no prompt (seed 2" in html and "<b>" not in html
    sounds = re.findall(r"data:audio/flac;base64,([^\"]+)", html)
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", html)
    assert len(sounds) == len(pictures) == 2 and base64.b64decode(pictures[0]).startswith(b"\x89PNG")
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[0])), dtype="float32")
    assert rate == 8000
    np.testing.assert_allclose(audio, np.clip(generation.audio[0], -1, 1), atol=2**-15)


def test_a_pipeline_works_in_a_thread_that_did_not_import_it(random_models: dict[str, Path]) -> None:
    """Streams of MLX belong to threads: the one that reads files too."""
    pytest.importorskip("mlx.core")
    from sa3_mlx import Pipeline

    made: list[np.ndarray] = []

    def work() -> None:
        made.append(Pipeline.load(random_models["tiny-s"]).generate(REQUEST).audio[0])

    for _ in range(2):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(made) == 2 and np.array_equal(*made)
