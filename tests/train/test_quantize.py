"""Test ``sa3 train quantize``: what is exported is what the forward pass computed with, and tuning lowers the error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.precision import Precision, choose_precision
from sa3_mlx.common.quant.affine import dequantize
from sa3_mlx.common.quant.calibration import CalibrationPrompt
from sa3_mlx.common.quant.format import Quantization, check_file, read_packed
from sa3_mlx.common.quant.recipes import layers_of
from sa3_mlx.common.schema import ConfigError
from sa3_torch.fake_quant import fake_quant
from sa3_torch.pipeline import Pipeline
from sa3_torch.train.quantize.calibrate import gptq_starts, hessians, layer_at, velocity_at
from sa3_torch.train.quantize.stage import QuantizeConfig, QuantizeStage
from sa3_torch.train.run.loop import Trainer
from sa3_torch.train.run.settings import load_settings
from tests.support.stages import train, trainer_of

assert TINY["tiny-l"].diffusion is not None
CONFIG = dataclasses.replace(
    TINY["tiny-l"], diffusion=dataclasses.replace(TINY["tiny-l"].diffusion, head_room_seconds=0.0)
)
TEXTS = ("kick", "bell low", "rain soft", "drone", "snare", "hat high", "bell hard", "rain")
PROMPTS = tuple(CalibrationPrompt(0.5, text) for text in TEXTS)
FEW = PROMPTS[:4]
SETTINGS = (
    "recipe=3bit",
    "rounds=1",
    "train.batch=2",
    "train.steps=60",
    "optimizer.learning_rate=2e-4",
    "optimizer.warmup_steps=1",
    "train.validate_every=1000",
    "train.save_every=1000",
    "train.ema_decay=0.9",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tune") / "tiny", CONFIG)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizeStage, Path]:
    out = tmp_path_factory.mktemp("run")
    config = load_settings(QuantizeConfig, "quantize", "demo", SETTINGS)
    stage = QuantizeStage(source, config, PROMPTS)
    trainer = train(stage, out)
    trainer.ema.swap(stage.model)  # what was exported
    return stage, out


def test_exported_codes_are_those_of_the_forward_pass(run: tuple[QuantizeStage, Path]) -> None:
    stage, out = run
    with TensorFile.open(out / "model" / "model.safetensors") as file:
        assert set(check_file(file, CONFIG)) == set(stage.grids) == set(layers_of(CONFIG, "dit"))
        entry = Quantization.read(file)
        assert entry is not None
        assert entry.recipe == "3bit-qat"
        for path, grid in stage.grids.items():
            values = dequantize(read_packed(file, path, grid), "F32")
            layer = layer_at(stage.model, path)
            np.testing.assert_array_equal(layer.weight.detach().numpy(), values)
            assert fake_quant(layer).scales.all()  # frozen, and what the file holds
            np.testing.assert_array_equal(file.read(f"{path}.scales"), fake_quant(layer).scales.half().float().numpy())
    loaded = Pipeline.load(out / "model").load_part("dit")
    state = stage.held_out[0]
    wanted = velocity_at(stage.student, state).detach()
    found = loaded(state.x, torch.from_numpy(state.t), loaded.prepare(state.cond))
    # single-precision matrices beside the quantized ones became half precision: measured 2e-4 relative
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def test_tuning_lowers_the_error_on_other_prompts(run: tuple[QuantizeStage, Path]) -> None:
    """Lower it in 60 steps; measured: 0.76 of the error of rounding."""
    stage, out = run
    report = json.loads((out / "model" / "quantization.json").read_text())["velocity"]
    assert report["nearest_error"] == stage.rounded_error
    assert report["error"] < 0.85 * report["nearest_error"]


def test_everything_else_stays_as_it_was(source: Path, run: tuple[QuantizeStage, Path]) -> None:
    stage, out = run
    with (
        TensorFile.open(source / "model.safetensors") as old,
        TensorFile.open(out / "model" / "model.safetensors") as new,
    ):
        for name in old.names():
            if name.removesuffix(".weight") in stage.grids:
                continue
            wanted = old.read(name)
            if new.info(name)[0] == "F16":
                wanted = wanted.astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(new.read(name), wanted, err_msg=name)
    assert (out / "demo").is_dir()


def test_grids_freeze_for_the_last_part_of_the_run_and_are_state(source: Path, tmp_path: Path) -> None:
    """Stop and resume a run in it: bit for bit the run that was not stopped."""
    changes = (*SETTINGS, "train.steps=6", "frozen_share=0.5", "optimizer.learning_rate=1e-3")
    config = load_settings(QuantizeConfig, "quantize", "demo", changes)

    def trainer(folder: str) -> Trainer:
        made = trainer_of(QuantizeStage(source, config, FEW), tmp_path / folder)
        made._evaluate = lambda _log: None
        return made

    whole, first = trainer("whole"), trainer("halves")
    scales = {}

    def watch(step: int, inner=first.stage.losses):
        terms = inner(step)
        scales[step] = {name: b.clone() for name, b in first.stage.model.named_buffers() if name.endswith("scales")}
        first.asked = step == 4
        return terms

    first.stage.losses = watch
    assert whole.run() and not first.run()
    assert not any(bool(value.any()) for value in scales[2].values())
    assert all(bool(value.all()) and torch.equal(value, scales[3][name]) for name, value in scales[4].items())
    second = trainer("halves")
    assert second.step == 5 and second.run()
    for table, tensors in whole._tensors().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second._tensors()[table][name]), (table, name)


def test_the_end_of_the_run_is_a_target_where_there_is_no_guidance(run: tuple[QuantizeStage, Path]) -> None:
    stage, _ = run
    state = stage.states[0]
    terms = stage.losses(0)
    raw = stage.notes["end/raw"]
    assert set(terms) == {"velocity", "end"} and float(terms["end"].detach()) == pytest.approx(0.1 * float(raw))
    assert state.end is not None and state.end.shape == state.x.shape
    last = [s for s in stage.states if s.end is state.end][-1]
    t = torch.from_numpy(last.t)[:, None, None]
    torch.testing.assert_close(last.x - t * last.velocity, state.end)  # the last step of a ping-pong lands there
    config = stage.config
    stage.states[:], kept = [dataclasses.replace(s, end=None) for s in stage.states], list(stage.states)
    assert set(stage.losses(0)) == {"velocity"} and config.end_weight == 0.1
    stage.states[:] = kept


@pytest.mark.parametrize("recipe", ["3bit-gptq", "mixed-4.5-gptq"])
def test_tuning_starts_from_the_weights_of_gptq(source: Path, recipe: str, tmp_path: Path) -> None:
    """Keep their grid; the first forward pass is that of `sa3 quantize` up to the rounding of values to fp16."""
    config = load_settings(QuantizeConfig, "quantize", "demo", (*SETTINGS, f"recipe={recipe}", "train.steps=2"))
    stage = QuantizeStage(source, config, FEW)
    starts = gptq_starts(stage.teacher, stage.states, stage.grids, stage.storages)
    for path, packed, _ in starts:
        layer = layer_at(stage.model, path)
        wanted = torch.from_numpy(dequantize(packed, "F32"))
        assert float((layer.weight != wanted).float().mean()) < 0.01, path
        np.testing.assert_array_equal(fake_quant(layer).scales.numpy(), packed.scales)
    assert stage.start_error != stage.rounded_error
    if recipe.startswith("mixed"):
        assert len({grid.bits for grid in stage.grids.values()}) > 1
    train(stage, tmp_path, evaluated=False)
    with TensorFile.open(tmp_path / "model" / "model.safetensors") as file:
        assert check_file(file, CONFIG) == stage.grids
        np.testing.assert_array_equal(read_packed(file, path, stage.grids[path]).scales, packed.scales)


def test_hessians_are_the_outer_products_of_a_layers_inputs(run: tuple[QuantizeStage, Path]) -> None:
    stage, _ = run
    path, seen = "dit.layers.0.ff.proj_in", []
    layer = layer_at(stage.teacher, path)
    handle = layer.register_forward_hook(lambda _m, args, _out: seen.append(args[0].flatten(0, -2)))
    found = hessians(stage.teacher, stage.states[:3], [path])[path]
    handle.remove()
    x = torch.cat(seen).double()
    np.testing.assert_allclose(found, (x.T @ x).numpy(), rtol=1e-4, atol=1e-4)
    assert layer_at(stage.teacher, path) is layer


def test_only_single_precision_is_allowed() -> None:
    with pytest.raises(ConfigError, match="precision is 'bf16': values of a grid need 'fp32'"):
        load_settings(QuantizeConfig, "quantize", "demo", ("train.precision='bf16'",))


def test_the_student_is_in_single_precision_where_a_gpu_would_generate_in_half(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(dtype: str, text_dtype: str, *, on_gpu: bool) -> Precision:  # noqa: ARG001
        return choose_precision(dtype, text_dtype, on_gpu=True)

    monkeypatch.setattr("sa3_torch.pipeline.choose_precision", chosen)
    monkeypatch.setattr(QuantizeStage, "_visited", lambda *_, **__: iter(()))  # a CPU multiplies no float16
    monkeypatch.setattr("sa3_torch.train.quantize.stage.velocity_error", lambda *_: 1.0)
    stage = QuantizeStage(source, load_settings(QuantizeConfig, "quantize", "demo", SETTINGS), FEW)
    assert {parameter.dtype for parameter in stage.student.parameters()} == {torch.float32}
