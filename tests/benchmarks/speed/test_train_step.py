"""The parts of a training step that ``python -m benchmarks train-step`` tells apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from click.testing import CliRunner

from benchmarks.speed import train_step
from sa3_torch.train.autoencoder.stage import AutoencoderConfig
from sa3_torch.train.run.settings import load_settings
from tests.support import stages

SMALL = ("train.batch=2", "train.compile=false", "train.precision='fp32'", "crop_samples=8192")


def test_every_variant_adds_terms_to_the_one_before(workspace: Path) -> None:
    settings = load_settings(AutoencoderConfig, "autoencoder", "tiny", SMALL)
    terms = []
    for variant in train_step.variants(settings):
        config = load_settings(AutoencoderConfig, "autoencoder", "tiny", (*SMALL, *variant.changes))
        clips = train_step.ClipSet(workspace / "clips")
        stage = train_step.AutoencoderStage(stages.MODEL, config, clips)
        terms.append((variant.name, set(stage.losses(variant.step))))
    names, found = zip(*terms, strict=True)
    assert names == ("network", "spectral", "semantic", "adversarial", "discriminators")
    assert found[0] == {"waveform", "softnorm"} and found[1] - found[0] == {"spectral"}
    assert {"alignment", "critic", "level"} <= found[2] - found[1]
    assert found[3] - found[2] == {"adversarial", "feature_matching"} and found[4] == {"discriminator"}


def test_the_parts_add_up(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "PRESETS", {"first": stages.MODEL})
    changes = [word for change in SMALL for word in ("--set", change)]
    args = ["--data", str(workspace / "clips"), "--settings", "first", "--rounds", "1", *changes]
    result = CliRunner().invoke(train_step.train_step, args, catch_exceptions=False)
    made = json.loads(result.output.splitlines()[-1])
    assert made["network_seconds"] + made["spectral_seconds"] == pytest.approx(made["generator_seconds"])
    assert made["crops_per_second"] == pytest.approx(2 / made["generator_seconds"])
    assert "semantic_seconds" not in made  # this preset has no such networks
