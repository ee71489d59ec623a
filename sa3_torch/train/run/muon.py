"""Muon for the matrices of a network, AdamW for the rest [T4.7].

A step along the momentum of a matrix, made orthogonal: all directions move equally far. Embeddings, biases, norms,
first and last projections are no maps between hidden states and stay with AdamW. Matrices that hold several maps
(queries, keys and values; value and gate) are cut into nearly square blocks first, each orthogonal by itself.

Source: Keller Jordan's Muon, whose rates this has: the update of a matrix (rows, columns) is
sqrt(max(1, rows / columns)) long in every direction. torch.optim.Muon does the same without blocks and in bf16 only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the Newton-Schulz polynomial
ITERATIONS = 5
EPSILON = 1e-7
# The ends of names. First and last projections, and what reads numbers instead of states.
EDGES = ("preprocess", "project_in", "project_out", "postprocess", "mapping", "seconds_embed", "last")
# Several maps in one matrix, on top of each other -> of how many rows the maps are: columns, or a half (value, gate).
FUSED = {
    "to_qkv": "square",
    "to_kv": "square",
    "to_q": "square",
    "to_modulation.fc2": "square",
    "proj_in": "halves",
    "ff_in": "halves",
}


def orthogonal(matrix: Tensor) -> Tensor:
    """Nearly the closest matrix with orthogonal rows or columns: (M, N) fp32 -> same. Singular values become 0.7..1.2,
    tiny ones less. In bf16 on a GPU, where that is much faster, in fp32 on a CPU.
    """
    a, b, c = COEFFICIENTS
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp_min(EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).float()


def muon_matrices(network: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """What Muon trains of a network: name -> parameter and the number of blocks that it is cut into."""
    found: dict[str, tuple[Tensor, int]] = {}
    for path, module in network.named_modules():
        if not isinstance(module, nn.Linear) or path.rpartition(".")[2] in EDGES:
            continue
        for name, parameter in module.named_parameters(path):
            if parameter.dim() == 2 and parameter.requires_grad:
                found[name] = (parameter, _blocks(path, *parameter.shape))
    return found


def _blocks(path: str, rows: int, columns: int) -> int:
    kind = next((kind for name, kind in FUSED.items() if f".{path}".endswith(f".{name}")), None)
    if kind is None:
        return 1
    parts = 1 if kind == "square" else 2
    count = parts * max(1, round(rows / parts / columns))
    return count if rows % count == 0 else parts


class MuonAdamW(torch.optim.Optimizer):
    """``matrices`` are trained by Muon, ``others`` by AdamW; ``rate_ratio`` is the rate of Muon by that of AdamW.

    Sharded matrices (FSDP2) are gathered, made orthogonal by every process, and each keeps its rows. The only state of
    a matrix is its first moment. Schedules set the ``lr`` of a group of parameters times its ``rate_ratio``.
    """

    def __init__(
        self,
        matrices: Iterable[tuple[Tensor, int]],
        others: Iterable[Tensor],
        *,
        learning_rate: float,
        rate_ratio: float,
        momentum: float,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        matrices = list(matrices)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.blocks = dict(matrices)
        self.adamw = torch.optim.AdamW(others, lr=learning_rate, betas=betas, weight_decay=weight_decay)
        groups = [{"params": [matrix for matrix, _ in matrices], "lr": learning_rate * rate_ratio}]
        super().__init__(groups, {})
        self.param_groups[0]["rate_ratio"] = rate_ratio
        for parameter in self.blocks:
            self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
        self.param_groups += self.adamw.param_groups  # the same dictionaries, and one state for both
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        rate = self.param_groups[0]["lr"]
        for parameter, blocks in self.blocks.items():
            if parameter.grad is None:
                continue
            average = self.state[parameter]["momentum"]
            average.lerp_(parameter.grad, 1 - self.momentum)
            update = _orthogonal_blocks(parameter.grad.lerp(average, self.momentum), blocks)  # Nesterov
            parameter.mul_(1 - rate * self.weight_decay).add_(update, alpha=-rate)
        self.adamw.step(closure)


def _orthogonal_blocks(update: Tensor, blocks: int) -> Tensor:
    """The update of a matrix: (M, N) -> (M, N), sharded as it was."""
    if isinstance(update, DTensor):
        whole = _orthogonal_blocks(update.full_tensor(), blocks)
        return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
    parts = update.chunk(blocks)
    scale = math.sqrt(max(1.0, parts[0].shape[0] / parts[0].shape[1]))
    return scale * torch.cat([orthogonal(part) for part in parts])
