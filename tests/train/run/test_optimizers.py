"""Optimisers: one kernel for all parameters on a GPU, a state that a checkpoint can be read into, and Muon."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sa3_torch.train.run import optimizers
from sa3_torch.train.run.optimizers import (
    Group,
    OptimizerConfig,
    fits_fused,
    make_optimizer,
    optimizer_tensors,
    orthogonalised,
)

CONFIG = OptimizerConfig(
    learning_rate=1e-2,
    schedule="cosine",
    final_learning_rate=1e-3,
    inverse_gamma=0.0,
    warmup_steps=0,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.1,
    clip_norm=1.0,
)


def test_one_kernel_updates_what_is_on_a_gpu() -> None:
    """Devices without values: no GPU is needed."""
    with FakeTensorMode():
        here, there = torch.empty(2), torch.empty(2, device="cuda")
    assert fits_fused([there, there])
    assert not fits_fused([here]) and not fits_fused([there, here]) and not fits_fused([])
    assert make_optimizer(Group(network=nn.Linear(2, 2), optimizer=CONFIG)).param_groups[0]["fused"] is None


def test_the_fused_kernel_takes_the_first_state_and_computes_the_same() -> None:
    """It exists on a CPU, too. Measured: equal to 1e-7."""
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        network = nn.Linear(8, 8)
        with patch.object(optimizers, "fits_fused", return_value=fused):
            optimizer = make_optimizer(Group(network=network, optimizer=CONFIG))
        assert bool(optimizer.param_groups[0]["fused"]) == fused
        for step in range(3):
            optimizer.zero_grad()
            network(torch.full((4, 8), step + 1.0)).square().sum().backward()
            optimizer.step()
        assert all(float(state["step"]) == 3 for state in optimizer.state.values())
        found.append([parameter.detach() for parameter in network.parameters()])
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 256, 64), (1, 64, 256)])
def test_orthogonalised_matrices_keep_directions_and_lose_sizes(shape: tuple[int, ...]) -> None:
    """Of singular values from 1 to 0.01 the small ones come out as large; measured: 0.68 to 1.20, off by 0.017."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    sizes = torch.logspace(0, -2, u.shape[2])
    found = orthogonalised(u * sizes @ vh).float()
    along = (u.mT @ found @ vh.mT).diagonal(dim1=1, dim2=2)
    assert float(along.min()) > 0.6 and float(along.max()) < 1.25
    torch.testing.assert_close(found, u * along[:, None] @ vh, atol=0.05, rtol=0)


def test_muon_steps_matrices_of_blocks_and_adamw_all_else() -> None:
    """The change of a matrix has an RMS of 0.2 of the rate, or a little less: measured 0.16."""
    changed = {}
    for kind in ("adamw", "muon"):
        torch.manual_seed(0)
        block = nn.ModuleDict({"to_qkv": nn.Linear(64, 192), "proj": nn.Linear(64, 128)})
        network = nn.ModuleDict({"start": nn.Linear(64, 64), "layers": nn.ModuleList([block])})
        before = {name: value.detach().clone() for name, value in network.named_parameters()}
        optimizer = make_optimizer(Group(network=network, optimizer=dataclasses.replace(CONFIG, kind=kind)))
        x = torch.randn(256, 64) * torch.logspace(0, -1, 64)  # some directions are hardly there
        sum(layer(network["start"](x)).square().sum() for layer in block.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        changed[kind] = {name: value.detach() - before[name] for name, value in network.named_parameters()}
    for name, change in changed["muon"].items():
        matrix = name.startswith("layers.") and name.endswith("weight")
        assert torch.equal(change, changed["adamw"][name]) != matrix, name
        if matrix:
            decayed = change + CONFIG.learning_rate * CONFIG.weight_decay * before[name]
            assert float(decayed.square().mean().sqrt()) == pytest.approx(0.18 * CONFIG.learning_rate, rel=0.2), name
    thirds = changed["muon"]["layers.0.to_qkv.weight"].chunk(3)
    sizes = [torch.linalg.svdvals(third) for third in thirds]
    assert all(float(size.max() / size.median()) < 1.6 for size in sizes)


def test_the_state_of_muon_is_there_from_the_start_and_half_as_large() -> None:
    network = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])})
    optimizer = make_optimizer(Group(network=network, optimizer=dataclasses.replace(CONFIG, kind="muon")))
    tensors = optimizer_tensors(network, optimizer)
    assert set(tensors) == {f"layers.0.bias/{key}" for key in ("step", "exp_avg", "exp_avg_sq")} | {
        "layers.0.weight/momentum"
    }
    network["layers"][0].weight.grad = torch.ones(8, 8)
    optimizer.step()
    assert float(tensors["layers.0.weight/momentum"].abs().min()) > 0
