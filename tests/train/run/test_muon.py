"""Muon and AdamW in one optimiser [T4.7]."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from torch import nn

from sa3_mlx.common.schema import ConfigError
from sa3_torch.dit import DiT
from sa3_torch.train.flow.model import diffusion_of, new_model
from sa3_torch.train.run.muon import muon_matrices, orthogonal
from sa3_torch.train.run.optimizers import (
    Group,
    MuonConfig,
    OptimizerConfig,
    make_optimizer,
    optimizer_tensors,
    set_rate,
)
from tests.support.stages import MODEL, pretrain_stage, trainer_of

RATE = 5e-4
HYBRID = OptimizerConfig(
    learning_rate=RATE,
    schedule="cosine",
    final_learning_rate=1e-5,
    inverse_gamma=0.0,
    warmup_steps=1,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.02,
    clip_norm=1.0,
    muon=MuonConfig(learning_rate=4 * RATE, momentum=0.95),
)
MUON = "optimizer.muon={learning_rate=2e-3, momentum=0.95}"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_orthogonal_keeps_directions_and_evens_their_lengths(shape: tuple[int, int]) -> None:
    """Measured: singular values 0.68 to 1.13."""
    matrix = normal(*shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonal(matrix)
    values = torch.linalg.svdvals(found)
    assert float(values.min()) > 0.5 and float(values.max()) < 1.3
    inner = u.T @ found @ v.T  # diagonal: the same directions
    assert float((inner - inner.diag().diag()).abs().max()) < 1e-3
    torch.testing.assert_close(orthogonal(100 * matrix), found)  # however long the gradient is
    assert not orthogonal(torch.zeros(shape)).any()


def test_maps_between_states_are_trained_by_muon_in_square_blocks() -> None:
    differential = dataclasses.replace(diffusion_of(MODEL).dit, differential=True)
    model = new_model(MODEL)
    blocks = {name: count for name, (_, count) in muon_matrices(model).items()}
    assert {name for name in blocks if name.startswith("text_encoder.layers.0.self_attn")}
    expected = {
        "self_attn.to_qkv": 3,
        "self_attn.to_out": 1,
        "cross_attn.to_q": 1,
        "cross_attn.to_kv": 2,
        "ff.proj_in": 8,
        "ff.proj_out": 1,
        "local_embed.fc1": 1,
        "local_embed.fc2": 1,
        "cross_attn.to_out": 1,
    }
    first = "dit.layers.0."
    assert {name.removeprefix(first): n for name, n in blocks.items() if name.startswith(first)} == {
        f"{name}.weight": count for name, count in expected.items()
    }
    assert blocks["dit.to_modulation.fc2.weight"] == 6
    for name in ("dit.project_in", "dit.preprocess", "conditioner.seconds_embed", "text_encoder.embed_tokens"):
        assert f"{name}.weight" not in blocks
    assert "dit.memory_tokens" not in blocks and not any(name.endswith("bias") for name in blocks)
    five = muon_matrices(DiT(differential, 16, 48))
    assert [five[f"layers.0.{name}.weight"][1] for name in ("self_attn.to_qkv", "cross_attn.to_q")] == [5, 2]


class Two(nn.Module):
    """A square map, queries and keys in one, an embedding and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(12, 20)
        self.to_kv = nn.Linear(12, 24, bias=False)
        self.embed_tokens = nn.Embedding(5, 12)
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=seed)


def updated(network: Two, steps: int, config: OptimizerConfig = HYBRID) -> Two:
    optimizer = make_optimizer(Group(network=network, optimizer=config))
    for step in range(steps):
        for number, parameter in enumerate(network.parameters()):
            parameter.grad = normal(*parameter.shape, seed=10 * step + number + 7)
        set_rate(optimizer, RATE)
        optimizer.step()
    return network


def test_muon_is_that_of_torch_and_the_rest_adamw() -> None:
    """torch computes in bf16. Measured: relative L2 of the way 9e-3; AdamW exactly."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has no Muon")
    ours, theirs, start = updated(Two(), 3), Two(), Two()
    adamw = updated(Two(), 3, dataclasses.replace(HYBRID, muon=None))
    matrices = [theirs.plain.weight]
    optimizer = torch.optim.Muon(matrices, lr=4 * RATE, momentum=0.95, weight_decay=0.02)
    for step in range(3):
        for number, parameter in enumerate(theirs.parameters()):
            parameter.grad = normal(*parameter.shape, seed=10 * step + number + 7)
        optimizer.step()
    way, reference = (net.plain.weight.detach() - start.plain.weight.detach() for net in (ours, theirs))
    assert float((way - reference).norm() / reference.norm()) < 4e-2
    assert float(reference.norm()) == pytest.approx(3 * 4 * RATE * math.sqrt(12 * 20 / 12), rel=0.5)
    for name in ("plain.bias", "embed_tokens.weight"):
        assert torch.equal(ours.get_parameter(name), adamw.get_parameter(name))


def test_fused_maps_move_as_if_they_were_alone() -> None:
    """Each half of to_kv is orthogonal by itself, however small its gradient beside the other's."""
    network, start = Two(), Two()
    optimizer = make_optimizer(Group(network=network, optimizer=dataclasses.replace(HYBRID, weight_decay=0.0)))
    gradient = normal(24, 12)
    gradient[12:] *= 1e-3
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    network.to_kv.weight.grad = gradient
    set_rate(optimizer, RATE)
    optimizer.step()
    way = (start.to_kv.weight - network.to_kv.weight).detach() / (4 * RATE)
    for part, source in zip(way.chunk(2), gradient.chunk(2), strict=True):
        torch.testing.assert_close(part, orthogonal(source), rtol=1e-3, atol=1e-3)


def test_state_is_named_and_starts_at_zero() -> None:
    network = Two()
    tensors = optimizer_tensors(network, make_optimizer(Group(network=network, optimizer=HYBRID)))
    keys = ("step", "exp_avg", "exp_avg_sq")
    adam = {f"{name}/{key}" for name in ("plain.bias", "embed_tokens.weight") for key in keys}
    assert set(tensors) == {"plain.weight/momentum", "to_kv.weight/momentum", *adam}
    assert not any(tensor.any() for tensor in tensors.values())


def test_muon_without_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match="this network has no matrix between hidden states"):
        make_optimizer(Group(network=nn.Embedding(3, 4), optimizer=HYBRID))
    with pytest.raises(ConfigError, match="momentum is 1"):
        MuonConfig(learning_rate=1e-3, momentum=1.0)


def test_the_rate_of_muon_follows_the_schedule(workspace: Path, tmp_path: Path) -> None:
    trainer = trainer_of(pretrain_stage(workspace, "train.steps=4", MUON), tmp_path)
    assert trainer.run()
    muon, adamw = trainer.optimizers["diffusion"].param_groups
    assert adamw["lr"] == pytest.approx(trainer.shown["lr/diffusion"])
    assert muon["lr"] / adamw["lr"] == pytest.approx(2e-3 / 1.2e-3)
