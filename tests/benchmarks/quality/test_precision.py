"""The table of precisions: its measures obey their definitions, and it runs on a random model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from tests.support.tiny_checkpoint import write_checkpoint

pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from benchmarks.quality import precision as module
from benchmarks.quality.precision import COLUMNS, envelope_db, interval, precision, stored
from sa3_mlx.common.model.checkpoint import expected_tensors
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.quant import calibration
from sa3_torch.train.demo_set.vocabulary import save_tokenizer

DEMO = PRESETS["first"]
DIT = replace(DEMO.require_diffusion().dit, width=128, depth=2)
DEMO = replace(DEMO, diffusion=replace(DEMO.require_diffusion(), dit=DIT))  # 16 bits are slow on a CPU


def test_interval_holds_the_mean_and_narrows_with_prompts() -> None:
    rng = np.random.default_rng(1)
    few, many = (rng.integers(0, 2, (n, 4)).astype(float) for n in (10, 400))
    for values in (few, many):
        low, high = interval(values)
        assert low < values.mean() < high
    assert np.diff(interval(many)) < 0.5 * np.diff(interval(few))
    assert interval(np.ones((5, 2))) == (1.0, 1.0)


def test_envelope_is_a_level_in_db() -> None:
    time = np.arange(44_100) / 44_100
    tone = (0.5 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)
    found = envelope_db(np.stack([tone, tone], axis=1))
    np.testing.assert_allclose(found[2:-2], 20 * np.log10(0.5 / np.sqrt(2)), atol=0.2)
    np.testing.assert_allclose(envelope_db(0 * tone), -60)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("precision") / "demo", DEMO)
    save_tokenizer(folder / "tokenizer.json")
    return folder


def test_sizes(model: Path) -> None:
    parameters = sum(int(np.prod(shape)) for shape in expected_tensors(DEMO).values())
    assert stored(model, "float32") == (None, 4 * parameters)
    assert stored(model, "float16") == (None, 2 * parameters)


def test_the_command_measures_and_stores(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tuple(
        calibration.CalibrationPrompt(0.3, text) for text in ("kick drum", "snare drum", "white noise", "tom drum")
    )
    monkeypatch.setattr(calibration, "DEMO", prompts)
    monkeypatch.setattr(calibration, "STEPS_MAX", 2)
    monkeypatch.setattr(module, "PEAK_SECONDS", 0.2)
    monkeypatch.setattr(module, "held_out_prompts", lambda seed: ADHERENCE_PROMPTS[:: 10 + seed])
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    done = CliRunner().invoke(
        precision,
        [
            str(model),
            "--rows",
            "fp32,fp16,4bit-gptq",
            "--steps",
            "1",
            "--guidance",
            "1",
            "--seeds",
            "2",
            "--results",
            str(tmp_path / "results"),
        ],
    )
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout.splitlines()[-1])
    (path,) = (tmp_path / "results").iterdir()
    assert json.loads(path.read_text()) == data
    assert path.name.startswith("precision-first-")
    names = [row["name"] for row in data["rows"]]
    assert names == ["fp32, other seeds", "fp32", "fp16", "4bit-gptq"]
    floor, full, half, four = data["rows"]
    assert full["velocity_error"] < 1e-6 < half["velocity_error"] < four["velocity_error"]
    assert full["log_mel"] == 0 < half["log_mel"] < four["log_mel"] < floor["log_mel"]
    assert four["bits_per_weight"] == 4.5
    assert four["peak_bytes"] < half["peak_bytes"] < full["peak_bytes"]
    assert len(half["velocity_error_by_time"]) == 2
    assert all(name in done.stdout for name in COLUMNS)


def test_unknown_rows_are_refused(model: Path) -> None:
    done = CliRunner().invoke(precision, [str(model), "--rows", "fp32,7bit"])
    assert done.exit_code == 2
    assert "no row '7bit'" in done.output


ADHERENCE_PROMPTS = module.held_out_prompts(0)
