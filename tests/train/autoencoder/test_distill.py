"""Test distillation of an autoencoder: where gradients go, what stays frozen, what it learns [T2]."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.autoencoder.distill import DistillConfig, DistillStage
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.run.settings import load_settings, preset_names
from tests.support.learning import learn
from tests.support.stages import MODEL, autoencoder_stage, distill_stage, train


def reaches(term: torch.Tensor, module: torch.nn.Module) -> bool:
    found = torch.autograd.grad(term, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(gradient is not None and float(gradient.abs().sum()) > 0 for gradient in found)


@pytest.mark.parametrize("recompute", ["false", "true"])
def test_the_teachers_decoding_teaches_the_encoder_and_its_latents_the_decoder(workspace: Path, recompute: str) -> None:
    stage = distill_stage(workspace, f"recompute_teacher={recompute}")
    terms, model = stage.losses(0), stage.model
    assert reaches(terms["spectral_by_teacher"], model.encoder)
    assert not reaches(terms["spectral_by_teacher"], model.decoder)
    assert reaches(terms["spectral_of_teacher"], model.decoder)
    assert not reaches(terms["spectral_of_teacher"], model.encoder)
    for name in ("spectral", "spectral_as_teacher", "adversarial", "feature_matching"):
        assert reaches(terms[name], model.encoder) and reaches(terms[name], model.decoder)
    for name in ("latent_l1", "latent_mse"):
        assert reaches(terms[name], model.encoder) and not reaches(terms[name], model.decoder)
    torch.stack(list(terms.values())).sum().backward()
    assert all(parameter.grad is None for parameter in stage.teacher.parameters())


def test_the_teacher_stays_as_it_is(workspace: Path, tmp_path: Path) -> None:
    stage = distill_stage(workspace, "train.steps=2")
    before = {name: tensor.clone() for name, tensor in stage.teacher.state_dict().items()}
    train(stage, tmp_path, evaluated=False)
    assert not stage.teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.teacher.state_dict().items())


def test_the_adversarial_terms_are_those_of_four_pairs(workspace: Path) -> None:
    """Start at ln 2, as fresh discriminators cannot tell, for a pair of weight 1 and three of a quarter."""
    stage = distill_stage(workspace)
    assert float(stage.losses(1)["discriminator"].detach()) == pytest.approx(1.75 * 0.6931, rel=0.05)
    assert {"spectral", "spectral_as_teacher", "spectral_by_teacher", "spectral_of_teacher"} <= stage.losses(0).keys()
    assert stage.turn(1) == "discriminator"


@pytest.mark.parametrize("seed", [0, 3])
def test_latents_become_the_teachers(seed: int, workspace: Path) -> None:
    """From the teacher's own weights, disturbed, the squared error on one batch falls by 90 %; measured: 98 to 99 % for
    seeds 0 to 6. The scale is the teacher's: one that follows each batch keeps latents at 1, whatever his are."""
    changes = ("adversarial.start_step=100", "spectral_start=0.9", "spectral_full=1.0", f"train.seed={seed}")
    stage = distill_stage(workspace, *changes)
    stage.model.load_state_dict(stage.teacher.state_dict())
    stage.coder.settled = True
    weight = stage.model.encoder.mapping.weight
    with torch.no_grad():
        weight.add_(0.5 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    parameters = list(stage.model.encoder.parameters()) + list(stage.model.bottleneck.parameters())
    first, last = learn(parameters, lambda: stage.losses(0)["latent_mse"], steps=30, rate=3e-3)
    assert last < 0.1 * first, (first, last)


def test_a_student_of_another_shape_is_refused(workspace: Path) -> None:
    model = dataclasses.replace(MODEL, same=dataclasses.replace(MODEL.same, latent_channels=8))
    config = load_settings(DistillConfig, "distill-autoencoder", "tiny", ())
    with pytest.raises(ConfigError, match="latents of 16 channels per 1024 samples, test has 8 per 1024"):
        DistillStage(model, config, ClipSet(workspace / "clips"), workspace / "run" / "model")


@pytest.mark.parametrize("name", preset_names("distill-autoencoder"))
def test_presets_are_valid(name: str) -> None:
    config = load_settings(DistillConfig, "distill-autoencoder", name, ())
    assert config.path_weight == config.cross_share == 0.25 and config.semantics is None


def test_a_student_begins_with_latents_near_those_of_its_teacher(workspace: Path) -> None:
    """Begin by least squares; measured for the demo's: error 0.59 of the variance, 0.99 without."""
    stage = distill_stage(workspace)
    plain = autoencoder_stage(workspace, "train.seed=3").model
    audio = stage.crops.batch(3).audio
    with torch.no_grad():
        wanted = stage.teacher.encode(audio)
        found = [model.encode(audio) for model in (stage.model, plain)]
    errors = [float((latents - wanted).square().mean() / wanted.var()) for latents in found]
    assert errors[0] < 0.8 * errors[1]
