"""Whatever goes through many sounds shows a bar: on a terminal, after a second, and of all that there is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_mlx.cli.app import run
from sa3_mlx.cli.train import data
from tests.support.command import AUTOENCODER, RATE
from tests.support.tiny_checkpoint import write_checkpoint

COUNT = 4


class Bars:
    """Stand for tqdm, and note every bar: how much there was, and how much of it was gone through."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[str, int | None, int]] = {}

    def __call__(
        self, items: Iterable[object], *, desc: str, unit: str, disable: bool | None, delay: float
    ) -> Iterator[object]:
        assert disable is None and delay >= 1  # silent where there is no terminal, and for what is short
        total, done = len(items) if hasattr(items, "__len__") else None, 0
        for done, item in enumerate(items, 1):  # noqa: B007
            yield item
        self.found[desc] = (unit, total, done)


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> Bars:
    found = Bars()
    monkeypatch.setattr(data, "tqdm", found)
    return found


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(COUNT):
        audio = np.random.default_rng(number).integers(-9000, 9000, (1000, 2)).astype(np.int16)
        soundfile.write(folder / f"{number}.wav", audio, RATE)
        (folder / f"{number}.txt").write_text("noise\n")
    return folder


def _run(*words: object) -> None:
    assert run([str(word) for word in words]) == 0


def test_recordings_are_gone_through_with_a_bar(recordings: Path, tmp_path: Path, bars: Bars) -> None:
    _run("data", "import", recordings, tmp_path / "cache")
    assert run(["data", "lint", str(recordings)]) == 1  # their rate is low
    assert bars.found == {"import": ("file", COUNT, COUNT), "lint": ("file", COUNT, COUNT)}


def test_shards_are_gone_through_with_a_bar(recordings: Path, tmp_path: Path, bars: Bars) -> None:
    pytest.importorskip("webdataset", reason="the training extra is not installed")
    _run("data", "shards", recordings, tmp_path / "shards")
    _run("data", "index", tmp_path / "shards" / "audio-{000000..000000}.tar", tmp_path / "index.json")
    assert bars.found == {"shards": ("file", COUNT, COUNT), "index": ("shard", 1, 1)}


def test_latents_are_gone_through_with_a_bar(recordings: Path, tmp_path: Path, bars: Bars) -> None:
    pytest.importorskip("torch", reason="the training twin needs torch")
    pytest.importorskip("scipy", reason="the training extra is not installed")
    model = ("--autoencoder", write_checkpoint(tmp_path / "autoencoder", AUTOENCODER))
    _run("pre-encode", "--data", recordings, *model, "--out", tmp_path / "latents", "--copies", "1")
    _run("data", "gate", tmp_path / "latents", "--data", recordings, *model, "--items", "3")
    _run("data", "export-latents", tmp_path / "latents", tmp_path / "public", *model)
    assert bars.found == {"verify": ("file", 2, 2), "gate": ("item", 3, 3), "export": ("item", COUNT, COUNT)}
    _run("data", "import-latents", tmp_path / "public", tmp_path / "again", *model)
    assert bars.found["import"] == ("item", COUNT, COUNT)
