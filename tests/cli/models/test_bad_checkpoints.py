"""Damaged checkpoints, tags and requests are refused in one clear line, and nothing half-written is left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.cli import backend
from sa3_mlx.cli.app import run
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.files.audio import read_tags, write_audio
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item, Request, extend
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Guidance, Sampling
from tests.support.command import (
    RATE,
    SMALL,
    sa3,
    tone,
    truncate,
    use_home,
    write_tone,
)
from tests.support.tiny_checkpoint import write_checkpoint

LITTLE = Path("models") / SMALL.name


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((folder / "config.json").read_text())
    change(data)
    (folder / "config.json").write_text(json.dumps(data))


def _edit_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    path = folder / "model.safetensors"
    with TensorFile.open(path) as file:
        arrays = {name: file.raw(name) for name in file.names()}
    change(arrays)
    write_tensors(path, [array_entry(name, array) for name, array in arrays.items()], {})


def _set_nan(arrays: dict[str, np.ndarray]) -> None:
    arrays["dit.layers.0.ff.proj_in.weight"][3, 5] = np.nan


def _set_shape(arrays: dict[str, np.ndarray]) -> None:
    arrays["dit.project_in.weight"] = np.ascontiguousarray(arrays["dit.project_in.weight"].T)


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda m: (m / "config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda m: (m / "config.json").write_text("[]"), "expected a JSON object"),
    "config of another format": (lambda m: _edit_config(m, lambda c: c.update(format="sa3/9")), "sa3/9"),
    "unknown field": (lambda m: _edit_config(m, lambda c: c.update(speed=3)), "unknown field(s) speed"),
    "missing field": (lambda m: _edit_config(m, lambda c: c["same"].pop("width")), "missing field(s) width"),
    "wrong type": (lambda m: _edit_config(m, lambda c: c.update(sample_rate="8k")), "sample_rate"),
    "negative size": (lambda m: _edit_config(m, lambda c: c["same"].update(stride=-4)), "must be positive"),
    "impossible width": (lambda m: _edit_config(m, lambda c: c["diffusion"]["dit"].update(width=65)), "multiple"),
    "unknown objective": (lambda m: _edit_config(m, lambda c: c["diffusion"].update(objective="gan")), "rf_denoiser"),
    "another depth": (lambda m: _edit_config(m, lambda c: c["diffusion"]["dit"].update(depth=2)), "missing"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "no such file"),
    "empty weights": (lambda m: (m / "model.safetensors").write_bytes(b""), "not a safetensors file"),
    "weights are text": (
        lambda m: (m / "model.safetensors").write_text("version https://git-lfs.github.com"),
        "not a safe",
    ),
    "truncated weights": (lambda m: truncate(m / "model.safetensors", 0.9), "truncated"),
    "missing tensor": (lambda m: _edit_weights(m, lambda w: w.pop("dit.project_in.weight")), "missing: dit.project_in"),
    "unexpected tensor": (lambda m: _edit_weights(m, lambda w: w.update(lora=np.zeros(3, np.float32))), "lora"),
    "wrong shape": (lambda m: _edit_weights(m, _set_shape), "wrong shape: dit.project_in"),
    "nan in weights": (lambda m: _edit_weights(m, _set_nan), "dit.layers.0.ff.proj_in.weight has NaN"),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "tokenizer.json"),
    "damaged tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), "tokenizer.json"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_damaged_checkpoints_are_refused(refused: Callable[..., str], own_home: Path, case: str):
    damage, message = CHECKPOINTS[case]
    damage(own_home / LITTLE)
    model = own_home / LITTLE if case == "no config" else "little"
    assert message in refused("generate", "rain", "--seconds", "0.2", "--model", model, "--out", "a.wav")


@pytest.mark.parametrize("case", ["config is not JSON", "no weights", "truncated weights", "missing tensor"])
def test_a_damaged_model_is_skipped_as_the_default(own_home: Path, capfd: pytest.CaptureFixture[str], case: str):
    write_checkpoint(own_home / "models" / "spare", SMALL)
    CHECKPOINTS[case][0](own_home / LITTLE)
    result = sa3(capfd, "generate", "rain", "--seconds", "0.2", "--out", "a.wav")
    assert result.code == 0 and "note: model little is damaged, spare is used instead" in result.err
    assert read_provenance(Path("a.wav")).model.name == "spare"
    listing = sa3(capfd, "models").out
    assert "spare *" in listing and "little *" not in listing and "damaged" in listing


def test_damage_is_what_is_refused_when_there_is_no_other_model(
    refused: Callable[..., str], own_home: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sa3_mlx.common.installed.DEMO_FOLDER", own_home / "no-demo")
    shutil.rmtree(own_home / "models" / "only-autoencoder")
    truncate(own_home / LITTLE / "model.safetensors", 0.5)
    assert "truncated" in refused("generate", "rain")


OFFICIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "no model_config": (lambda m: (m / "model_config.json").unlink(), "no model_config.json"),
    "model_config is not JSON": (lambda m: (m / "model_config.json").write_text("}"), "not valid JSON"),
    "model_config is empty": (lambda m: (m / "model_config.json").write_text("{}"), "model_config"),
    "truncated weights": (lambda m: truncate(m / "model.safetensors", 0.7), "truncated"),
    "a pickle": (lambda m: (m / "model.safetensors").rename(m / "model.ckpt"), "safetensors"),
    "missing tensor": (
        lambda m: _edit_weights(m, lambda w: w.pop("model.model.transformer.project_in.weight")),
        "project_in",
    ),
    "nan": (lambda m: _edit_weights(m, lambda w: w["model.model.transformer.project_in.weight"].fill(np.nan)), "NaN"),
    "no tokenizer": (lambda m: (m / "t5gemma-b-b-ul2" / "tokenizer.json").unlink(), "tokenizer"),
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_damaged_official_checkpoints_are_refused(refused: Callable[..., str], own_home: Path, case: str):
    from sa3_convert import export_official

    damage, message = OFFICIAL[case]
    export_official(own_home / LITTLE, Path("official"), force=False)
    damage(Path("official"))
    assert message in refused("convert", "official", "out", "--quiet")


# --- tags -------------------------------------------------------------------------------------------------------------


def test_rerun_refuses_another_model_another_input_and_damaged_tags(
    refused: Callable[..., str], own_home: Path, capfd: pytest.CaptureFixture[str]
):
    write_tone(Path("in.wav"))
    assert sa3(capfd, "vary", "in.wav", "--out", "v.wav").code == 0
    tags = read_tags("v.wav")
    for name, text in {
        "cut": tags[:-20],
        "other": json.dumps({"made": "elsewhere"}),
        "list": "[1]",
        "numbers": tags.replace('"little"', "7"),
        "hash": tags.replace("sha256:", "md5:"),
    }.items():
        write_audio(f"{name}.wav", tone(0.1), RATE, comment=text)
        assert "tags" in refused("rerun", f"{name}.wav")
    assert "no such folder" in refused("rerun", "v.wav", "--out", "no/v.wav")
    Path("in.wav").rename("moved.wav")
    assert "--input" in refused("rerun", "v.wav")
    write_tone(Path("in.wav"), 0.9)
    assert "input is sha256" in refused("rerun", "v.wav")
    write_checkpoint(own_home / "models" / "other", SMALL, variant="other ")
    assert "model other (little) is sha256" in refused("rerun", "v.wav", "--input", "moved.wav", "--model", "other")
    shutil.rmtree(own_home / LITTLE)
    assert "--model" in refused("rerun", "v.wav")


@pytest.fixture(scope="module")
def varied(shared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tags of a file made by "sa3 vary"."""
    folder = tmp_path_factory.mktemp("varied")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        use_home(shared_home, monkeypatch)
        write_tone(Path("in.wav"))
        assert run(["vary", "in.wav", "--out", "v.wav", "--quiet"]) == 0
        tags: dict[str, Any] = json.loads(read_tags("v.wav"))
    return tags


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("request.init.noise_level", "x"),
        ("output.peak_db", "x"),
        ("output.format", "mp2"),
        ("request.items.seed", ["1"]),
        ("runtime.backend", "jax"),
        ("command", "sing"),
        ("request.schedule", "no"),
        ("input", 3),
        ("request.items.seconds", None),
        ("request.sampling.steps", 2.5),
        ("request.inpaint", {"regions": [[1]]}),
        ("request.sampling.guidance", {"strength": 1}),
        ("item", 1),
        ("format", "sa3-sound/3"),
        ("model", None),
        ("runtime.dtype", "int3"),
        ("runtime.text_dtype", "float16"),
        ("runtime.device", "a" * 5000),
    ],
)
def test_rerun_refuses_tags_of_another_type(
    refused: Callable[..., str], varied: dict[str, Any], name: str, value: object
):
    tags = json.loads(json.dumps(varied))
    *groups, field = name.split(".")
    table = tags
    for group in groups:
        table = table[group][0] if group == "items" else table[group]
    table[field] = value
    write_audio("w.wav", tone(0.1), RATE, comment=json.dumps(tags))
    message = refused("rerun", "w.wav", "--force")
    assert "its tags are damaged" in message and field in message


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("request.items.seconds", 1e308, "seconds is 1e+308: little makes"),
        ("request.init.noise_level", -1, "init noise level is -1"),
        ("request.head_room_seconds", 1e308, "head room is 1e+308"),
        ("request.chunk_frames", 3, "chunk_frames is 3"),
        ("request.inpaint", [], "inpaint has 0 entries"),
    ],
)
def test_rerun_names_the_file_whose_tags_ask_too_much(
    refused: Callable[..., str], varied: dict[str, Any], name: str, value: object, text: str
):
    write_tone(Path("in.wav"))
    tags = json.loads(json.dumps(varied))
    *groups, field = name.split(".")
    table = tags
    for group in groups:
        table = table[group][0] if group == "items" else table[group]
    table[field] = value
    write_audio("w.wav", tone(0.1), RATE, comment=json.dumps(tags))
    message = refused("rerun", "w.wav", "--force")
    assert f"w.wav: its tags ask for what little cannot make: {text}" in message


def test_an_input_with_an_impossible_name_is_asked_for(refused: Callable[..., str], varied: dict[str, Any]):
    varied = varied | {"input": {"name": "a" * 5000, "hash": "sha256:0"}}
    write_audio("w.wav", tone(0.1), RATE, comment=json.dumps(varied))
    message = refused("rerun", "w.wav")
    assert len(message) < 1600 and message.startswith("sa3: aaaa")


def test_decoded_files_have_no_recipe(refused: Callable[..., str]):
    write_tone(Path("in.wav"), 0.2)
    assert run(["encode", "in.wav", "z.npy"]) == run(["decode", "z.npy", "out.wav"]) == 0
    assert "decoded files have no recipe to rerun" in refused("rerun", "out.wav")


def test_tags_and_files_that_are_nested_without_end_are_refused(refused: Callable[..., str], own_home: Path):
    write_audio("w.wav", tone(0.1), RATE, comment='{"a":' * 100_000)
    assert "damaged" in refused("rerun", "w.wav")
    (own_home / LITTLE / "config.json").write_text("[" * 100_000)
    assert "nested too deeply" in refused("generate", "rain", "--model", "little")


# --- the API ----------------------------------------------------------------------------------------------------------

ITEM = Item(prompt="rain", seconds=1.0, seed=1)
GOOD = Request(items=(ITEM,), sampling=Sampling(sampler="euler", steps=2))
CLIP = tone(1.0)


def sampled(**changes: Any) -> Request:
    assert GOOD.sampling is not None
    return replace(GOOD, sampling=replace(GOOD.sampling, **changes))


API: dict[str, tuple[Callable[[], Request], str]] = {
    "no items": (lambda: replace(GOOD, items=()), "items is empty"),
    "items are numbers": (lambda: replace(GOOD, items=[3]), "expected Item"),  # type: ignore[list-item]
    "prompt is a number": (lambda: replace(GOOD, items=(replace(ITEM, prompt=3),)), "expected text"),  # type: ignore[arg-type]
    "seed is a float": (lambda: replace(GOOD, items=(replace(ITEM, seed=1.0),)), "seed"),  # type: ignore[arg-type]
    "steps are true": (lambda: sampled(steps=True), "steps"),
    "unknown sampler": (lambda: sampled(sampler="heun"), "pingpong"),
    "audio of integers": (
        lambda: replace(GOOD, init=InitAudio(audio=CLIP.astype(np.int16), noise_level=0.5)),  # type: ignore[arg-type]
        "float32",
    ),
    "audio of one channel": (lambda: replace(GOOD, init=InitAudio(audio=CLIP[:, :1], noise_level=0.5)), "shape"),
    "empty audio": (lambda: replace(GOOD, init=InitAudio(audio=CLIP[:0], noise_level=0.5)), "at least 1 sample"),
    "nan audio": (lambda: replace(GOOD, init=InitAudio(audio=CLIP * np.float32("nan"), noise_level=0.5)), "finite"),
    "two inits for one item": (lambda: replace(GOOD, init=(InitAudio(audio=CLIP, noise_level=0.5),) * 2), "2 entries"),
    "init in inpaint": (lambda: replace(GOOD, inpaint=InitAudio(audio=CLIP, noise_level=1)), "expected Inpaint"),  # type: ignore[arg-type]
    "no regions": (lambda: replace(GOOD, inpaint=Inpaint(audio=CLIP, regions=())), "no region"),
    "chunks too small": (lambda: replace(GOOD, chunk_frames=1), "chunk_frames"),
    "interval of three": (lambda: sampled(guidance=Guidance(interval=(0, 1, 2))), "interval"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", API)
def test_requests_are_refused_in_one_line(case: str):
    make, message = API[case]
    with pytest.raises(ValueError, match=message) as caught:
        plan(make(), SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_pipelines_refuse_what_they_cannot_do(shared_home: Path, name: str):
    if not backend.available(name):  # type: ignore[arg-type]
        pytest.skip(f"{name} is not installed")
    pipeline = backend.load(shared_home / LITTLE, name, "float32", "auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps"):
        pipeline.generate(sampled(steps=0))
    with pytest.raises(ValueError, match="expected shape"):
        pipeline.encode(CLIP[:, :1])
    with pytest.raises(ValueError, match="latents"):
        pipeline.decode(np.zeros((3, 5), np.float32))
    with pytest.raises(ValueError, match="float16"):
        backend.load(shared_home / LITTLE, name, "int4", "auto")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        backend.load(shared_home, name, "float32", "auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="autoencoder alone"):
        backend.load(shared_home / "models" / "only-autoencoder", name, "float32", "auto").generate(GOOD)  # type: ignore[arg-type]


def test_an_extension_must_extend():
    with pytest.raises(ValueError, match="longer clip"):
        extend(CLIP, 1.0, SMALL)
    with pytest.raises(ValueError, match="finite"):
        extend(CLIP, float("nan"), SMALL)
    with pytest.raises(FileNotFoundError):
        ModelConfig.load("nowhere")


def test_a_traceback_is_shown_on_demand_alone(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from sa3_mlx.cli.app import run

    monkeypatch.chdir(tmp_path)
    assert own_home.is_dir()
    with pytest.raises(FileNotFoundError, match="no such audio file"):
        run(["vary", "nothing.wav", "--debug"])
