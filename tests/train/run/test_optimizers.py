"""Optimisers: one kernel for all parameters on a GPU, from a state that a checkpoint can be read into."""

from __future__ import annotations

from unittest.mock import patch

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sa3_torch.train.run import optimizers
from sa3_torch.train.run.optimizers import Group, OptimizerConfig, fits_fused, make_optimizer

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
