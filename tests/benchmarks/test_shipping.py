"""What ships: two models in the package whose autoencoder is stored once, and the gallery of what they make."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks.shipping import ship as shipping
from benchmarks.shipping.gallery import gallery
from benchmarks.shipping.ship import ship
from sa3_mlx.common import installed
from sa3_mlx.common.embedded import Shipped
from sa3_mlx.common.files.audio import read_tags
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, file_hash, write_tensors
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.config import FORMAT, ModelConfig
from sa3_mlx.common.quant.affine import dequantize
from sa3_mlx.common.quant.format import Grid, Quantization, check_file, read_packed
from sa3_mlx.common.quant.recipes import layers_of
from sa3_mlx.common.quant.writer import nearest, write_quantized
from tests.support.command import SMALL, read, sa3
from tests.support.tiny_checkpoint import write_checkpoint

EXAMPLES = ("kick", "soft rain", "low drone")
Ship = Callable[..., Result]


def _quantized(source: Path, out: Path, bits: dict[str, int]) -> Path:
    """Round the layers of some parts of a model to so many bits."""
    grids = {layer: Grid(bits=b, group=64) for part, b in bits.items() for layer in layers_of(SMALL, part)}
    quantizers = {path: partial(nearest, grid=grid) for path, grid in grids.items()}
    write_quantized(source, out, recipe="test", grids=grids, quantizers=quantizers, velocity=None, force=False)
    return out


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A model and its base, which have the autoencoder in common, in few bits."""
    few = write_checkpoint(tmp_path / "few", SMALL)
    base = shutil.copytree(few, tmp_path / "base")
    with TensorFile.open(few / WEIGHTS_FILE) as file:
        arrays = {name: file.read(name) for name in file.names()}
    changed = [array_entry(n, a + 0.01 * n.startswith("dit."), "F32") for n, a in arrays.items()]
    write_tensors(base / WEIGHTS_FILE, changed, {"format": FORMAT})
    return (
        _quantized(few, tmp_path / "few-8", {"dit": 8, "same": 8}),
        _quantized(base, tmp_path / "base-4", {"dit": 4, "same": 8}),
    )


@pytest.fixture
def shipped(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ship:
    """Return a function that ships them to a folder, in which commands find what comes with the package."""
    run = tmp_path / "ladder" / "base"
    (run / "model").mkdir(parents=True)
    (tmp_path / "ladder" / "begun").mkdir()
    for name in ("settings.json", "log.jsonl", f"model/{WEIGHTS_FILE}"):
        (run / name).write_text(name)
    assets = tmp_path / "assets"
    assets.mkdir()
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(installed, "DEMO_FOLDER", assets / "demo")
    monkeypatch.setattr(installed, "PACKED_BASE", assets / "demo-base")
    monkeypatch.chdir(tmp_path)

    def call(few: Path = models[0], base: Path = models[1], examples: tuple[str, ...] = EXAMPLES) -> Result:
        (tmp_path / "examples.txt").write_text("\n".join(examples))
        words = ["--ladder", tmp_path / "ladder", "--sampling", "pingpong:2:1", "--base-sampling", "euler:4:3"]
        words += ["--examples", tmp_path / "examples.txt", "--assets", assets]
        return CliRunner().invoke(ship, [str(word) for word in (few, base, *words)])

    return call


def test_the_autoencoder_is_stored_once_and_the_base_is_whole_again(
    shipped: Ship, models: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every tensor of the unpacked base has the values that its packed weights stand for, in half precision."""
    assert shipped().exit_code == 0
    demo, packed = tmp_path / "assets" / "demo", tmp_path / "assets" / "demo-base"
    assert file_hash(demo / WEIGHTS_FILE) == file_hash(models[0] / WEIGHTS_FILE)
    with TensorFile.open(packed / WEIGHTS_FILE) as file:
        assert file.names() and all(name.startswith("dit.") for name in file.names())
    listing = sa3(capfd, "models").out
    assert "demo-base" in listing and "demo *" in listing and not (tmp_path / "home").exists()
    name, folder = installed.find_model_folder("demo-base")
    config = ModelConfig.load(folder)
    assert (name, config.name, str(config.usual_sampling)) == ("demo-base", "demo-base", "euler:4:3")
    with TensorFile.open(folder / WEIGHTS_FILE) as whole, TensorFile.open(models[1] / WEIGHTS_FILE) as file:
        assert not check_file(whole, config)
        quantization = Quantization.read(file)
        assert quantization is not None
        grids = quantization.grids()
        for tensor in whole.names():
            layer = tensor.removesuffix(".weight")
            values = (
                file.read(tensor) if layer not in grids else dequantize(read_packed(file, layer, grids[layer]), "F16")
            )
            np.testing.assert_array_equal(whole.read(tensor), values.astype(np.float16), err_msg=tensor)


def test_it_says_how_it_was_made(shipped: Ship, models: tuple[Path, Path], tmp_path: Path) -> None:
    """The hashes of settings, log and weights of every run that is done, and those of the models themselves."""
    assert shipped().exit_code == 0
    made = Shipped.read(tmp_path / "assets" / "demo-base")
    assert made is not None and [stage.name for stage in made.stages] == ["base"]
    run = tmp_path / "ladder" / "base"
    assert (made.stages[0].settings, made.stages[0].log) == (
        file_hash(run / "settings.json"),
        file_hash(run / "log.jsonl"),
    )
    assert made.source == file_hash(models[1] / WEIGHTS_FILE)
    assert made.weights == file_hash(installed.find_model_folder("demo-base")[1] / WEIGHTS_FILE)


def test_commands_know_the_base_and_unpack_another_version_of_it(
    shipped: Ship, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    assert shipped().exit_code == 0
    words = ("--seconds", "0.2", "--seed", "1", "--backend", "mlx")
    for model in ("demo", "demo-base"):
        done = sa3(capfd, "generate", "kick", *words, "--model", model, "--out", tmp_path / f"{model}.wav")
        assert done.code == 0 and f"{model} on mlx" in done.err, done
    assert 'does well: "kick", "soft rain"' in sa3(capfd, "generate").err
    first = installed.find_model_folder("demo-base")[1]
    assert shipped(base=_quantized(tmp_path / "base", tmp_path / "base-6", {"dit": 6, "same": 8})).exit_code == 0
    assert installed.find_model_folder("demo-base")[1] != first


def test_a_model_that_is_sought_does_not_unpack_the_base(
    shipped: Ship, models: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    assert shipped().exit_code == 0
    words = ("--seconds", "0.2", "--seed", "1", "--backend", "mlx", "--out", tmp_path / "a.wav")
    assert sa3(capfd, "generate", "kick", *words, "--model", models[1]).code == 0
    shutil.rmtree(models[1])
    assert "is not installed; say where it is with --model" in sa3(capfd, "rerun", tmp_path / "a.wav").err
    assert not (tmp_path / "home" / "unpacked").exists()


def test_what_does_not_fit_is_refused_and_changes_nothing(
    shipped: Ship, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "does not know 'trombone'" in str(shipped(examples=("kick", "trombone")).exception)
    monkeypatch.setattr(shipping, "BYTES_MAX", 1000)
    assert "allowed are 0.001 MB" in str(shipped().exception)
    shutil.rmtree(tmp_path / "ladder" / "base")
    assert "no run that is done" in str(shipped().exception)
    assert not list((tmp_path / "assets").iterdir())


def test_the_gallery_shows_the_examples_and_is_the_same_again(shipped: Ship, tmp_path: Path) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    assert shipped().exit_code == 0
    words = ["--seconds", "0.3", "--out", str(tmp_path / "docs")]
    shown = CliRunner().invoke(gallery, words)
    assert shown.exit_code == 0 and '| "kick" | "soft rain" | "low drone" |' in shown.output, shown
    sounds = sorted((tmp_path / "docs" / "sounds").iterdir())
    assert [path.name for path in sounds] == ["kick.ogg", "low-drone.ogg", "soft-rain.ogg"]
    assert '"prompt": "soft rain"' in str(read_tags(sounds[2]))
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (tmp_path / "docs" / "pictures").iterdir())
    before = [read(path) for path in sounds]
    CliRunner().invoke(gallery, words)
    for path, audio in zip(sounds, before, strict=True):
        np.testing.assert_array_equal(read(path), audio)
