"""Test other ways to train an autoencoder: from another one, with a frozen encoder, masked latents, another stride."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.schema import ConfigError
from sa3_torch.same import SAME
from sa3_torch.train.autoencoder.distill import DistillConfig, DistillStage
from sa3_torch.train.autoencoder.start import restride
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.data.pre_encode import load_autoencoder
from sa3_torch.train.networks.init import init_autoencoder
from sa3_torch.train.run.settings import load_settings
from tests.support.learning import learn
from tests.support.stages import MODEL, autoencoder_stage, train, trainer_of, variants_stage

PLAIN = ("variants.latent_mask=0.0", "variants.train_encoder=1.0", "variants.other_stride=0")
WIDER = dataclasses.replace(MODEL, same=dataclasses.replace(MODEL.same, stride=16))


def parts(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return what makes latents, and the rest."""
    state = load_autoencoder(folder)[0].state_dict()
    decoder = {name: tensor for name, tensor in state.items() if name.startswith("decoder.")}
    return {name: tensor for name, tensor in state.items() if name not in decoder}, decoder


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_decoder_alone_leaves_the_latents_bit_for_bit(workspace: Path, tmp_path: Path) -> None:
    """Weight decay and averages included; running_std too."""
    train(variants_stage(workspace, "train.steps=3", "variants.train_encoder=0.0"), tmp_path, evaluated=False)
    before, after = parts(workspace / "run" / "model"), parts(tmp_path / "model")
    assert equal(before[0], after[0]) and not equal(before[1], after[1])


def test_encoder_is_frozen_after_its_share_of_the_run(workspace: Path, tmp_path: Path) -> None:
    stage, states = variants_stage(workspace, "train.steps=4", "train.save_every=1"), []
    inner = stage.losses

    def losses(step: int) -> dict[str, torch.Tensor]:
        states.append({name: value.clone() for name, value in stage.model.encoder.state_dict().items()})
        return inner(step)

    stage.losses = losses  # type: ignore[method-assign]
    train(stage, tmp_path, evaluated=False)
    states.append(stage.model.encoder.state_dict())
    assert [equal(a, b) for a, b in pairwise(states)] == [False, False, True, True]


def test_frozen_encoder_costs_no_backward_pass_and_gets_gradients_of_zero(workspace: Path, tmp_path: Path) -> None:
    trainer = trainer_of(variants_stage(workspace, "variants.train_encoder=0.0"), tmp_path)
    trainer._gradients("generator")
    model = trainer.stage.model
    assert all(p.grad is not None and not p.grad.any() for p in model.encoder.parameters())
    assert any(p.grad.any() for p in model.decoder.parameters())
    assert trainer.stage.coder.raw_latents(torch.zeros(1, 8192, 2), 0).grad_fn.next_functions[0][0] is None


def test_a_start_keeps_weights_and_running_std(workspace: Path) -> None:
    stage = variants_stage(workspace, *PLAIN)
    began = load_autoencoder(workspace / "run" / "model")[0].state_dict()
    assert equal(dict(stage.model.state_dict()), dict(began))
    stage.losses(0)
    r = stage.model.bottleneck.running_std
    assert float(r) == pytest.approx(float(began["bottleneck.running_std"]), rel=2e-3)


def test_weights_for_another_stride_differ_in_where_new_tokens_look() -> None:
    """Turn a fresh autoencoder into a fresh one of another stride, and back; other weights stay."""
    audio = torch.randn(8, 8192, 2, generator=torch.Generator().manual_seed(0))
    fresh, deep = [], dataclasses.replace(MODEL.same, encoder_depth=5, decoder_depth=6)
    wide = dataclasses.replace(deep, stride=16)
    for config in (deep, wide):
        same = SAME(config, 2)
        init_autoencoder(same, audio, seed=0)
        fresh.append(same.state_dict())
    moved = restride(fresh[0], deep, wide)
    assert all(torch.allclose(moved[name], fresh[1][name], atol=1e-6) for name in moved)
    changed = [name for name in moved if not torch.equal(moved[name], fresh[0][name])]
    looking = "layers.{}.self_attn.to_qkv.weight"  # the fifth head on looked back as far as the first
    assert changed == [f"encoder.{looking}".format(4), *(f"decoder.{looking}".format(i) for i in (4, 5))]
    back = restride(moved, wide, deep)
    assert all(torch.allclose(back[name], fresh[0][name], atol=1e-6) for name in back)
    assert equal(restride(fresh[0], deep, deep), dict(fresh[0]))


def test_a_start_at_another_stride_learns(workspace: Path) -> None:
    """Go from 1024x to 4096x; running_std is measured again."""
    stage = variants_stage(workspace, *PLAIN, model=WIDER)
    began = load_autoencoder(workspace / "run" / "model")[0].state_dict()
    loss = lambda: torch.stack(list(stage.losses(0).values())).sum()  # noqa: E731
    first, last = learn(stage.model.parameters(), loss, steps=12, rate=3e-3)
    assert last < 0.93 * first, (first, last)
    assert stage.model.encode(torch.zeros(1, 8192, 2)).shape == (1, 2, 16)
    assert float(stage.model.bottleneck.running_std) != pytest.approx(float(began["bottleneck.running_std"]), rel=1e-3)


def test_a_start_of_other_sizes_is_refused(workspace: Path) -> None:
    other = dataclasses.replace(MODEL, same=dataclasses.replace(MODEL.same, latent_channels=8, decoder_depth=2))
    with pytest.raises(ConfigError, match=r"decoder_depth 1, not 2.*only the stride may differ") as caught:
        variants_stage(workspace, model=other)
    assert "latent_channels 16, not 8" in str(caught.value)


def test_some_batches_have_another_stride(workspace: Path) -> None:
    stage, frames = variants_stage(workspace, "variants.train_encoder=1.0"), []
    inner = stage.coder.decoded
    stage.coder.decoded = lambda z, step, own: (frames.append(z.shape[1]), inner(z, step, own))[1]  # type: ignore
    for step in range(4):
        assert all(torch.isfinite(value) for value in stage.losses(step).values())
        assert stage.model.config.stride == stage.model.encoder.config.stride == stage.model.decoder.config.stride == 4
    assert frames == [8, 4, 8, 4]


def test_masked_latents_are_zeros_of_the_share_that_is_asked(workspace: Path) -> None:
    coder = variants_stage(workspace, "variants.latent_mask=0.3").coder
    z = torch.ones(4, 50, 16)
    masked = coder.masked(z, 3, variants_stage(workspace).batch_slice)
    assert set(masked.unique().tolist()) == {0.0, 1.0} and 0.25 < float((masked == 0).float().mean()) < 0.35
    assert not torch.equal(masked, coder.masked(z, 4, variants_stage(workspace).batch_slice))


def test_settings_that_cannot_be_are_named(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"variants\.train_encoder is 0 without a start"):
        autoencoder_stage(workspace, "variants.train_encoder=0.0")
    with pytest.raises(ConfigError, match=r"is 10240: variants\.other_stride = 8 needs a multiple of 4096"):
        variants_stage(workspace, "crop_samples=10240")
    config = load_settings(DistillConfig, "distill-autoencoder", "tiny", ("variants.other_stride=8",))
    with pytest.raises(ConfigError, match=r"variants\.other_stride is 8: latents of a teacher have one stride"):
        DistillStage(MODEL, config, ClipSet(workspace / "clips"), workspace / "run" / "model")
