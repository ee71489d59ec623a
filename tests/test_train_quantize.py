"""``sa3 train quantize``: what is exported is what the forward pass computed with, and tuning lowers the error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from tiny import TINY
from tiny_checkpoint import write_checkpoint

torch = pytest.importorskip("torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.spec.affine import dequantize  # noqa: E402
from sa3_mlx.spec.calibration import Prompt  # noqa: E402
from sa3_mlx.spec.config import ConfigError  # noqa: E402
from sa3_mlx.spec.quantization import Quantization, check_file, read_packed  # noqa: E402
from sa3_mlx.spec.recipes import layers_of  # noqa: E402
from sa3_mlx.spec.tensorfile import TensorFile  # noqa: E402
from sa3_torch.pipeline import Pipeline  # noqa: E402
from sa3_torch.train.loop import Trainer  # noqa: E402
from sa3_torch.train.quantize import QuantizeConfig, QuantizeStage  # noqa: E402
from sa3_torch.train.settings import load_settings, to_json  # noqa: E402

assert TINY["tiny-l"].diffusion is not None
CONFIG = dataclasses.replace(
    TINY["tiny-l"], diffusion=dataclasses.replace(TINY["tiny-l"].diffusion, head_room_seconds=0.0)
)
PROMPTS = tuple(Prompt(0.5, text) for text in ("kick", "bell low", "rain soft", "drone"))
SETTINGS = (
    "recipe=3bit", "rounds=1", "train.batch=2", "train.steps=60", "optimizer.learning_rate=1e-4",
    "optimizer.warmup_steps=1", "train.validate_every=1000", "train.save_every=1000", "train.ema_decay=0.9",
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("tune") / "tiny", CONFIG)


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizeStage, Path]:
    out = tmp_path_factory.mktemp("run")
    config = load_settings(QuantizeConfig, "quantize", "demo", SETTINGS)
    stage = QuantizeStage(source, config, PROMPTS)
    trainer = Trainer(stage, config.train, out, to_json(config))
    assert trainer.run()
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
            weight = stage.model.get_submodule(path.removeprefix("dit.")).weight
            np.testing.assert_array_equal(weight.detach().numpy(), values)
    loaded = Pipeline.load(out / "model").load_part("dit")
    state = stage.held_out[0]
    wanted = stage._velocity(state).detach()
    found = loaded(state.x, torch.from_numpy(state.t), loaded.prepare(state.cond))
    # single-precision matrices beside the quantized ones became half precision: measured 2e-4 relative
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


def test_tuning_lowers_the_error_on_other_prompts(run: tuple[QuantizeStage, Path]) -> None:
    """Measured in 60 steps: 0.71 of the error of rounding."""
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


def test_recipes_that_measure_are_refused(source: Path) -> None:
    config = load_settings(QuantizeConfig, "quantize", "demo", ("recipe=mixed-5",))
    with pytest.raises(ConfigError, match="tuning starts from rounding with equal bits"):
        QuantizeStage(source, config, PROMPTS)
