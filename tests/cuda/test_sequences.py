"""Clips of unequal lengths in one batch: every one a sequence of its own, without a mask, and the same results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
varlen = pytest.importorskip("torch.nn.attention.varlen", reason="PyTorch before 2.10")

from torch import Tensor

from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.config import DiTConfig
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_torch import attention
from sa3_torch.choices import using
from sa3_torch.cuda import sequences
from sa3_torch.dit import DiT
from sa3_torch.layers import rope
from tests.cuda.operations import Operations
from tests.support.tiny import TINY
from tests.support.twins import Twin, relative

CLOSE = 1e-6
MEMORY, FRAMES = 8, 24
LENGTHS = ((24, 3, 17), (5, 24, 24), (1, 2, 23), (24, 24, 9))


def _sequence(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
    """Result, or gradients of queries, keys and values, of one sequence (N, H, K)."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (H, N, K)
    weights = (q @ k.mT / 8).softmax(-1)
    if grad is None:
        return ((weights @ v).transpose(0, 1),)
    grad = grad.transpose(0, 1)
    above = grad @ v.mT
    logits = weights * (above - (above * weights).sum(-1, keepdim=True)) / 8
    return tuple(x.transpose(0, 1) for x in (logits @ k, logits.mT @ q, weights.mT @ grad))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """PyTorch's operation, which has a form for a CPU now, in the place of what a CPU does; shapes of its calls."""
    calls: list[tuple[int, ...]] = []

    def run(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
        parts = []
        for i in range(len(q_ends) - 1):
            rows, columns = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
            parts.append(_sequence(q[rows], k[columns], v[columns], None if grad is None else grad[rows]))
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def forward(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, *sizes: Any) -> tuple[Tensor, ...]:
        calls.append(tuple(q.shape))
        assert max(q_ends.diff()) <= sizes[0] and max(k_ends.diff()) <= sizes[1] and q_ends.dtype == torch.int32
        (out,) = run(q, k, v, q_ends, k_ends, None)
        return out, q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *given: Any) -> tuple[Tensor, ...]:
        _out, _sums, q_ends, k_ends = given[:4]
        return run(q, k, v, q_ends, k_ends, grad)

    varlen._varlen_attn.register_kernel("cpu", forward)
    varlen._varlen_attn_backward.register_kernel("cpu", backward)
    monkeypatch.setattr(sequences, "one_by_one", sequences.at_once)
    return calls


@pytest.fixture(params=["one by one", "kernel"])
def form(request: pytest.FixtureRequest) -> None:
    """Both forms, one after the other."""
    if request.param == "kernel":
        request.getfixturevalue("kernel")


def _dit(*, differential: bool, depth: int = 2) -> DiT:
    torch.manual_seed(0)
    dit = DiT(DiTConfig(width=128, depth=depth, memory_tokens=MEMORY, differential=differential), 16, 32)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit


def _inputs(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor, Conditioning[Tensor], Tensor]:
    torch.manual_seed(1)
    batch, valid = len(lengths), torch.arange(FRAMES)[None] < torch.tensor(lengths)[:, None]
    cond = Conditioning(
        context=torch.randn(batch, 5, 32),
        seconds=torch.randn(batch, 32),
        local=torch.randn(batch, FRAMES, 17),
        valid=valid,
    )
    return torch.randn(batch, FRAMES, 16), torch.rand(batch), cond, valid


def _run(dit: DiT, lengths: tuple[int, ...], way: str) -> dict[str, Tensor]:
    """Velocities of real frames and the gradients of all parameters."""
    x, t, cond, valid = _inputs(lengths)
    with using({"unequal": way}):
        velocity = dit(x, t, dit.prepare(cond))[valid]
    dit.zero_grad()
    velocity.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in dit.named_parameters() if parameter.grad is not None}
    return {"velocity": velocity.detach(), **gradients}


def _equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    size = max(value.norm() for name, value in wanted.items() if name != "velocity")
    for name, value in wanted.items():
        scale = value.norm() if name == "velocity" else size
        assert (found[name] - value).norm() < CLOSE * scale, name  # measured up to 3e-7


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("differential", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_apart_is_the_same_as_masked(differential: bool, lengths: tuple[int, ...]) -> None:
    """Gradients too. An item that fills the batch has padding of length 0."""
    dit = _dit(differential=differential)
    _equal(_run(dit, lengths, "apart"), _run(dit, lengths, "masked"))


@pytest.mark.usefixtures("form")
def test_blocks_that_are_computed_again_are_the_same() -> None:
    from sa3_torch.train.run.blocks import work_by_blocks

    wanted = _run(_dit(differential=True), LENGTHS[0], "masked")
    dit = _dit(differential=True)
    work_by_blocks(dit, compiled=False, checkpointed=True)
    _equal(_run(dit, LENGTHS[0], "apart"), wanted)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_blocks_serve_all_lengths(
    kernel: list[tuple[int, ...]], checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph of a block and one of the last one for every combination of lengths, forward and backward."""
    from sa3_torch.train.run.blocks import work_by_blocks

    made: list[Any] = []

    def backend(module: Any, inputs: Any) -> Callable[..., Any]:
        made.append(len(inputs))
        return module.forward  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    torch._dynamo.reset()
    dit, plain = _dit(differential=True, depth=3), _dit(differential=True, depth=3)
    work_by_blocks(dit, compiled=True, checkpointed=checkpointed)
    for lengths in LENGTHS:
        _equal(_run(dit, lengths, "apart"), _run(plain, lengths, "masked"))
    torch._dynamo.reset()
    assert len(made) == 2 and kernel


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_batch_of_unequal_requests(
    random_models: dict[str, Path], model: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = sequences.attend
    monkeypatch.setattr(sequences, "attend", lambda q, *given: (calls.append(len(q)), real(q, *given))[1])
    pipeline = Twin("torch").pipeline(random_models[model])
    request = Request(
        items=tuple(Item(prompt=text, seconds=seconds, seed=1) for text, seconds in (("kick", 1.7), ("hat", 4.1))),
        sampling=Sampling(sampler="pingpong", steps=3, guidance=Guidance(scale=scale)),
    )
    wanted = pipeline.generate(request)
    assert not calls
    with using({"unequal": "apart"}):
        found = pipeline.generate(request)
    assert calls
    for a, b, frames in zip(found.latents, wanted.latents, (20, 50), strict=True):
        assert relative(a[:frames], b[:frames]) < 5e-6


def test_nothing_is_copied_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device meta, as on a GPU: heads lie as the kernel takes them, and no length comes to the host."""
    monkeypatch.setattr(sequences, "ready", lambda _like: True)
    _x, _t, _cond, valid = _inputs(LENGTHS[0])
    real, x = torch.nn.functional.pad(valid, (MEMORY, 0), value=True).to("meta"), torch.empty(3, 32, 128, device="meta")
    attend = _dit(differential=True).to("meta").requires_grad_(False).layers[0].get_submodule("self_attn")
    assert isinstance(attend, attention.SelfAttention)
    table = rope(0, 32, x.device)
    with using({"unequal": "apart"}), Operations() as seen:
        attend_real = attention.attend_to(real, x)
        known = seen.kernels
        attend(x, table, attend_real)
        attend.at(x, slice(MEMORY, None), table, attend_real)
    assert seen.waits == 0 and seen.met["torch_attn._varlen_attn.default"] == 4 and known == 6
    assert not any("clone" in name or "index" in name for name in seen.met)


def test_a_gpu_that_has_no_such_kernel_masks() -> None:
    real = torch.ones(2, 9, dtype=torch.bool)
    with using({"unequal": "apart"}):
        assert attention.attend_to(real, torch.zeros(1)).func is attention._attend_apart  # type: ignore[attr-defined]
        for like in (torch.zeros(1, device="meta"), torch.zeros(1, device="meta", dtype=torch.float16)):
            assert attention.attend_to(real, like).func is attention.attend  # type: ignore[attr-defined]
    assert attention.attend_to(None, torch.zeros(1)) is attention.attend
