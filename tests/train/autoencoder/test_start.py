"""Test the start of an autoencoder with another one, also at another stride."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.schema import ConfigError
from sa3_torch.same import SAME
from sa3_torch.train.autoencoder.start import restride
from sa3_torch.train.data.encode.pre_encode import load_autoencoder
from sa3_torch.train.networks.init import init_autoencoder
from tests.support.learning import learn
from tests.support.stages import MODEL, autoencoder_stage, started_stage

WIDER = dataclasses.replace(MODEL, same=dataclasses.replace(MODEL.same, stride=16))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_start_keeps_weights_and_running_std(workspace: Path) -> None:
    stage = started_stage(workspace)
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
    stage = started_stage(workspace, model=WIDER)
    began = load_autoencoder(workspace / "run" / "model")[0].state_dict()
    loss = lambda: torch.stack(list(stage.losses(0).values())).sum()  # noqa: E731
    first, last = learn(stage.model.parameters(), loss, steps=12, rate=3e-3)
    assert last < 0.93 * first, (first, last)
    assert stage.model.encode(torch.zeros(1, 8192, 2)).shape == (1, 2, 16)
    assert float(stage.model.bottleneck.running_std) != pytest.approx(float(began["bottleneck.running_std"]), rel=1e-3)


def test_a_start_of_other_sizes_is_refused(workspace: Path) -> None:
    other = dataclasses.replace(MODEL, same=dataclasses.replace(MODEL.same, latent_channels=8, decoder_depth=2))
    with pytest.raises(ConfigError, match=r"decoder_depth 1, not 2.*only the stride may differ") as caught:
        started_stage(workspace, model=other)
    assert "latent_channels 16, not 8" in str(caught.value)


def test_the_decoder_alone_goes_on_and_latents_stay(workspace: Path) -> None:
    frozen = ("train_encoder=false", "softnorm_weight=0.0")
    stage = started_stage(workspace, *frozen)
    began = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    loss = lambda: torch.stack(list(stage.losses(0).values())).sum()  # noqa: E731
    trained = [each for each in stage.groups["generator"].network.parameters() if each.requires_grad]
    first, last = learn(trained, loss, steps=6, rate=1e-3)
    assert last < first, (first, last)
    changed = {name for name, tensor in stage.model.state_dict().items() if not torch.equal(tensor, began[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    with pytest.raises(ConfigError, match="nothing can shape the latents; choose softnorm_weight=0"):
        started_stage(workspace, frozen[0], "softnorm_weight=0.1")
    with pytest.raises(ConfigError, match="give --start"):
        autoencoder_stage(workspace, *frozen)
