"""Training of adapters: they start as the identity, they alone are trained, and the pipelines read them back."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.support.twins import Twin, relative

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.adapters.applied import Applied, check_adapter
from sa3_mlx.common.adapters.config import ADAPTER_TYPES, AdapterType
from sa3_mlx.common.adapters.format import read_adapter
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import ConfigError
from sa3_torch.lora import TrainedAdapter
from sa3_torch.train.lora.stage import LoraStage
from sa3_torch.train.run.settings import load_settings
from tests.support.command import sa3
from tests.support.stages import lora_stage, train
from tests.support.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")


def velocity(stage: LoraStage, *, on: bool = True) -> np.ndarray:
    """Of one batch at t = 0.5, with the adapters now in the stage."""
    for module in stage.model.modules():
        if isinstance(module, TrainedAdapter):
            module.on = on
    batch = stage.latents.train.batch(0)
    draw = stage.latents.masks(batch, slice(0, 4), 0)
    t = torch.full((len(batch.latents),), 0.5)
    with torch.no_grad():
        return stage.networks.dit(
            batch.latents, t, stage.networks.dit.prepare(stage.networks.conditioning(batch, draw))
        ).numpy()


@pytest.mark.parametrize("kind", ADAPTER_TYPES)
def test_training_starts_with_the_base(workspace: Path, kind: AdapterType) -> None:
    stage = lora_stage(workspace, f"adapter.type='{kind}'")
    assert relative(velocity(stage), velocity(stage, on=False)) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "bora-xs"])
def test_adapters_alone_are_trained_and_exported(workspace: Path, tmp_path: Path, kind: AdapterType) -> None:
    """The file makes the same velocities beside the weights. Measured: 5e-7."""
    stage = lora_stage(workspace, f"adapter.type='{kind}'", "train.steps=3", "optimizer.learning_rate=0.01")
    base = {name: value.clone() for name, value in stage.base.state_dict().items() if name.endswith("original")}
    train(stage, tmp_path / "run")
    assert all(torch.equal(stage.base.state_dict()[name], value) for name, value in base.items())
    adapter = read_adapter(tmp_path / "run" / "model" / "adapter.safetensors")
    model = ModelConfig.load(workspace / "base")
    assert check_adapter(adapter, model) == len(adapter.layers) == len(base)
    assert (adapter.info.base, adapter.info.step, adapter.config) == (model.name, 3, stage.config.adapter)
    plain, wanted = velocity(stage, on=False), velocity(stage)
    assert relative(wanted, plain) > 1e-3
    pipeline = Twin("torch").pipeline(workspace / "base", adapters=[Applied(adapter=adapter)])
    batch = stage.latents.train.batch(0)
    cond = stage.networks.conditioning(batch, stage.latents.masks(batch, slice(0, 4), 0))
    dit, t = pipeline.load_part("dit"), torch.full((len(batch.latents),), 0.5)
    with torch.no_grad():
        assert relative(dit(batch.latents, t, dit.prepare(cond)).numpy(), wanted) < 5e-6


def test_norms_are_differentiated() -> None:
    """The gradient of a DoRA is that of its formula, norm and all."""
    from sa3_mlx.common.adapters.config import AdapterConfig
    from sa3_torch.lora import add_adapter

    config = AdapterConfig(type="dora-rows", rank=2, alpha=4.0, include=(), exclude=())
    layer = torch.nn.Linear(6, 5)
    adapter = add_adapter(layer, config, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(adapter.lora_B, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    layer(x).square().sum().backward()
    a, b, magnitude = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B, adapter.magnitude))
    v = layer.parametrizations.weight.original + 2 * b @ a
    ((x @ (magnitude[:, None] * v / v.norm(dim=1, keepdim=True)).T) + layer.bias).square().sum().backward()
    for ours, wanted in ((adapter.lora_A, a), (adapter.lora_B, b), (adapter.magnitude, magnitude)):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-4, atol=1e-5)
    assert layer.bias.grad is None


def test_base_in_bf16_leaves_the_adapters_in_fp32(workspace: Path, tmp_path: Path) -> None:
    stage = lora_stage(workspace, "base_precision='bf16'", "train.precision='bf16'")
    stage.precision = "bf16"
    assert all(parameter.dtype == torch.float32 for parameter in stage.model.parameters())
    kinds = {p.dtype for p in stage.networks.dit.parameters() if p.ndim == 2 and not p.requires_grad}
    assert kinds == {torch.bfloat16}
    sum(stage.losses(0).values()).backward()
    assert all(parameter.grad is not None for parameter in stage.model.parameters())
    stage.demo(tmp_path, 0)


def test_validation_tells_the_error_of_the_base(workspace: Path) -> None:
    stage = lora_stage(workspace)
    with torch.no_grad():
        measures = stage.validate()
    assert measures["flow"] == pytest.approx(measures["base_flow"], rel=1e-5)


def test_a_set_without_held_out_items_is_validated_on_itself(workspace: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(workspace / "latents", tmp_path / "latents")
    for path in folder.glob("shard-*.json"):
        path.write_text(path.read_text().replace('"validation"', '"train"'))
    stage = LoraStage(workspace / "base", lora_stage(workspace).config, [folder])
    assert {item.split for item in stage.latents.validation.items} == {"train"}


def test_impossible_trainings_are_refused(workspace: Path, tmp_path: Path) -> None:
    stage, latents, autoencoder = lora_stage(workspace), workspace / "latents", workspace / "run" / "model"
    model = ModelConfig.load(workspace / "base")
    assert model.diffusion is not None
    post = dataclasses.replace(model, diffusion=dataclasses.replace(model.diffusion, objective="rf_denoiser"))
    folder = shutil.copytree(workspace / "base", tmp_path / "post")
    (folder / "config.json").write_text(post.to_json())
    with pytest.raises(ValueError, match="is post-trained, and flow matching would unlearn"):
        LoraStage(folder, stage.config, [latents])
    LoraStage(folder, dataclasses.replace(stage.config, posttrained=True), [latents], autoencoder)
    other = write_checkpoint(tmp_path / "other", model, variant="x")
    (other / "tokenizer.json").write_bytes((workspace / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match="not the autoencoder in"):
        LoraStage(other, stage.config, [latents], autoencoder)
    for record, found in (({"autoencoder": 5}, "5"), ({}, "None")):
        (other / "parents.json").write_text(json.dumps(record))
        with pytest.raises(
            ValueError, match=rf"parents\.json: autoencoder is {found}; expected a hash, or give --auto"
        ):
            LoraStage(other, stage.config, [latents])
    (other / "parents.json").write_text("[")
    with pytest.raises(ConfigError, match=r"parents\.json: not valid JSON"):
        LoraStage(other, stage.config, [latents])
    with pytest.raises(ConfigError, match="base_precision is 'bf16'"):
        lora_stage(workspace, "base_precision='bf16'")
    with pytest.raises(ValueError, match="leave none of the"):
        lora_stage(workspace, "adapter.include=['nowhere']")


def test_released_preset_is_valid() -> None:
    from sa3_torch.train.lora.stage import LoraConfig

    assert load_settings(LoraConfig, "lora", "released", ()).adapter.rank == 16


@pytest.mark.usefixtures("uncounted")
def test_words_that_the_tokenizer_lacks_are_said_once_and_shortly(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before the run, and in its plan; the first five of them, one line; nothing where all are known."""
    line = ["train", "lora", "--model", workspace / "base", "--dry-run", "--set=train.batch=4", "--latents"]
    known = sa3(capfd, *line, workspace / "latents")
    assert known.code == 0 and "note: " not in known.err
    shutil.copytree(workspace / "latents", tmp_path / "latents")
    described = tmp_path / "latents" / "shard-00000.json"
    about = json.loads(described.read_text())
    for number, item in enumerate(about["items"]):
        item["captions"] = [f"piano zither{number} " + "y" * 5000, "piano note A4"]
    described.write_text(json.dumps(about))
    lacking = sa3(capfd, *line, tmp_path / "latents")
    notes = [text for text in lacking.err.splitlines() if text.startswith("note: ")]
    assert lacking.code == 0 and len(notes) == 1 and len(notes[0]) < 500
    assert "does not know 'zither" in notes[0] and re.search(r"and \d+ more of the captions", notes[0])
    assert "piano" not in notes[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_training_that_is_asked_to_stop_says_so_and_goes_on(
    number: signal.Signals,
    workspace: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It exits with 75, which is neither success nor a refusal; the same command then ends with 0."""
    inner, steps = LoraStage.losses, list[int]()

    def losses(stage: LoraStage, step: int) -> dict[str, torch.Tensor]:
        steps.append(step)
        if len(steps) == 2:
            signal.raise_signal(number)
        return inner(stage, step)

    monkeypatch.setattr(LoraStage, "losses", losses)
    changes = ("train.steps=4", "train.batch=4", "train.precision='fp32'", "clips.buckets=1", "demo.steps=1")
    sets = [f"--set={change}" for change in changes]
    line = ["train", "lora", "--model", workspace / "base", "--latents", workspace / "latents", *sets, "--out"]
    stopped = sa3(capfd, *line, tmp_path / "run")
    assert stopped.code == 75 and "Traceback" not in stopped.err
    assert stopped.out.splitlines() == ["stopped at step 2 of 4; the same command goes on from there"]
    assert not (tmp_path / "run" / "model").exists()
    done = sa3(capfd, *line, tmp_path / "run")
    assert done.code == 0 and "going on from step 2" in done.out and steps == [0, 1, 2, 3]
    assert (tmp_path / "run" / "model" / "adapter.safetensors").is_file()


def test_the_command_trains_an_adapter_that_generate_uses(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    base, run = workspace / "base", tmp_path / "run"
    changes = ("train.steps=2", "train.batch=4", "train.precision='fp32'", "clips.buckets=1", "demo.steps=2")
    result = sa3(
        capfd,
        "train",
        "lora",
        "--model",
        base,
        "--latents",
        workspace / "latents",
        "--type",
        "lora",
        "--rank",
        "2",
        "--out",
        run,
        *(f"--set={change}" for change in changes),
    )
    assert result.code == 0, result
    adapter = run / "model" / "adapter.safetensors"
    assert f"adapter: {adapter}" in result.out
    assert read_adapter(adapter).config.alpha == 2.0
    arguments = ("generate", "piano note A4", "--model", base, "--seconds", "0.3", "--steps", "2", "--lora", adapter)
    result = sa3(capfd, *arguments, "--out", tmp_path / "a.wav")
    assert result.code == 0 and "adapter adapter.safetensors: lora" in result.err, result
