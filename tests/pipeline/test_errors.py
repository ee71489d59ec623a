"""What the pipeline refuses, each in one line, and what it offers by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.generation.request import Inpaint, Item, Request
from sa3_mlx.common.model.sampling import Sampling
from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.twins import Twin

BASE = Request(
    items=(Item(prompt="kick", seconds=0.5, seed=1),),
    sampling=Sampling(sampler="euler", steps=1),
    head_room_seconds=0.0,
)


def test_an_autoencoder_alone_encodes_but_does_not_generate(twin: Twin, random_models: dict[str, Path]) -> None:
    autoencoder = twin.pipeline(random_models["autoencoder"])
    assert autoencoder.decode(autoencoder.encode(np.zeros((2400, 2), np.float32))).shape == (5 * 512, 2)
    with pytest.raises(ValueError, match="autoencoder is an autoencoder alone"):
        autoencoder.generate(BASE)
    with pytest.raises(ValueError, match="reads no prompts"):
        _ = autoencoder.tokenizer


def test_what_cannot_be_opened_is_one_line(twin: Twin, random_models: dict[str, Path], tmp_path: Path) -> None:
    load = twin.module("pipeline").Pipeline.load
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="dtype is 'float8': allowed are auto, float32"):
        load(random_models["tiny-s"], dtype="float8")
    for name in ("half", "float16"):  # activations of T5Gemma overflow float16
        with pytest.raises(ValueError, match=f"text_dtype is '{name}': allowed are auto, float32, bfloat16$"):
            load(random_models["tiny-s"], text_dtype=name)
    (tmp_path / "config.json").write_text((random_models["tiny-s"] / "config.json").read_text())
    with TensorFile.open(random_models["tiny-s"] / "model.safetensors") as file:
        entries = [array_entry(name, file.raw(name)) for name in file.names() if name != "dit.memory_tokens"]
        write_tensors(tmp_path / "model.safetensors", entries, {})
    with pytest.raises(ValueError, match=r"missing: dit\.memory_tokens"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((3, 15), np.float32), r"expected shape \(frames, 16\)"),
        (np.zeros((0, 16), np.float32), "at least 1 frame"),
        (np.zeros((3, 16)), "float32 numpy array"),
        (np.full((3, 16), np.nan, np.float32), "not all numbers are finite"),
    ],
)
def test_latents_that_cannot_be_decoded_are_refused(
    twin: Twin, random_models: dict[str, Path], latents: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        twin.pipeline(random_models["tiny-s"]).decode(latents)


@pytest.mark.parametrize("size", [-1, 0, 1])
def test_chunks_that_are_too_small_are_refused(twin: Twin, random_models: dict[str, Path], size: int) -> None:
    pieces = twin.pipeline(random_models["tiny-s"]).decode_stream(np.zeros((3, 16), np.float32), chunk_frames=size)
    with pytest.raises(ValueError, match=f"chunk_frames is {size}: to decode exactly"):
        next(pieces)


def test_a_foreign_tokenizer_is_refused(twin: Twin, tmp_path: Path) -> None:
    config = TINY["tiny-s"]
    assert config.diffusion is not None
    text = replace(config.diffusion.text_encoder, vocab_size=5)
    folder = write_checkpoint(tmp_path / "m", replace(config, diffusion=replace(config.diffusion, text_encoder=text)))
    with pytest.raises(ValueError, match="has 12 ids but the text encoder 5"):
        twin.pipeline(folder).generate(BASE)


def test_devices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    choose_device = Twin("torch").module("pipeline").choose_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert [choose_device(name).type for name in ("auto", "cpu", "mps")] == ["cpu", "cpu", "mps"]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("tpu", "mps", "mps:1", "cuda:99"):
        with pytest.raises(ValueError, match=f"device is '{name}'"):
            choose_device(name)


def test_the_packages_offer_the_pipeline_and_its_requests() -> None:
    import sa3_mlx
    import sa3_torch

    for package in (sa3_mlx, sa3_torch):
        assert package.Request is Request and package.Inpaint is Inpaint
        with pytest.raises(AttributeError, match="has no attribute 'Pipelin'"):
            _ = package.Pipelin
