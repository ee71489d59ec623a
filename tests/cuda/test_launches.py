"""How much a block launches, and that what was put together computes the same."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor

from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.model.config import DiTConfig
from sa3_torch import attention
from sa3_torch.dit import DiT, LocalInput
from sa3_torch.layers import RMSNorm, rotate, split_modulation
from tests.cuda.operations import Operations

MEMORY, FRAMES = 8, 24


def _dit(*, differential: bool) -> DiT:
    torch.manual_seed(0)
    dit = DiT(DiTConfig(width=128, depth=2, memory_tokens=MEMORY, differential=differential), 16, 32)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dit


@pytest.fixture
def one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms and attention are one operation, as on CUDA, where a norm first copies what lies apart."""

    def norm(x: Tensor, *_given: Any) -> Tensor:
        return torch.exp(x.contiguous())

    def attend(q: Tensor, _k: Tensor, _v: Tensor, **_given: Any) -> Tensor:
        return torch.exp(q)

    monkeypatch.setattr(F, "rms_norm", norm)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)


@pytest.mark.usefixtures("one_each")
@pytest.mark.parametrize(("differential", "most"), [(False, (42, 43)), (True, (46, 49))])
def test_operations_of_a_block_in_16_bits(differential: bool, most: tuple[int, int]) -> None:
    """Of any block and of the last one; 75 and 78, 79 and 84 before norms in 16 bits, fewer in modulation and rotation,
    and local terms added in their place."""
    dit = _dit(differential=differential).half().requires_grad_(False).to("meta")

    def given(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float16, device="meta")

    cond = Conditioning(context=given(1, 5, 32), seconds=given(1, 32), local=given(1, FRAMES, 17), valid=None)
    prepared = dit.prepare(cond)
    (h, sequence), modulation = dit.begin(given(1, FRAMES, 16), prepared), given(1, 6 * 128)
    for last, wanted in zip((False, True), most, strict=True):
        with Operations() as seen:
            dit.layers[1](h, modulation, prepared.contexts[1], prepared.local[1], sequence, last)
        assert seen.kernels == wanted


def test_both_maps_read_the_values_where_they_lie() -> None:
    """Results and gradients are those of maps side by side with the values copied."""
    torch.manual_seed(0)
    heads = torch.randn(2, 20, 10, 64, requires_grad=True)  # 2 of q, k, v, q', k'
    q, k, v = (x.transpose(1, 2) for x in (heads[:, :, :4], heads[:, :, 4:8], heads[:, :, 8:]))
    first, second = F.scaled_dot_product_attention(q, k, torch.cat([v, v], 1)).chunk(2, 1)
    wanted = (first - second).transpose(1, 2).flatten(2)
    found = attention.attend(q, k, v)
    pair = [torch.autograd.grad(out.square().sum(), heads, retain_graph=True)[0] for out in (found, wanted)]
    for a, b in ((found, wanted), pair):
        assert (a - b).norm() < 1e-6 * b.norm()  # measured 0 and 1e-7
    with Operations() as seen:
        attention.attend(*(x.detach().to("meta") for x in (q, k, v)))
    assert not seen.met["aten.cat.default"]


def test_norms_in_16_bits_sum_in_fp32() -> None:
    """The bits of an fp32 norm, rounded once."""
    norm, x = RMSNorm(64, 1e-6), 100 * torch.randn(7, 64)
    torch.nn.init.normal_(norm.gamma)
    for dtype in (torch.float16, torch.bfloat16):
        wide = F.rms_norm(x.to(dtype).float(), (64,), norm.gamma.to(dtype).float(), 1e-6)
        found = RMSNorm(64, 1e-6).to(dtype)
        found.gamma.data = norm.gamma.detach().to(dtype)
        assert torch.equal(found(x.to(dtype)), wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rotations_are_fp32(dtype: torch.dtype) -> None:
    """On a GPU tokens lie before heads in memory; the values are those of a CPU."""
    x = torch.randn(2, 3, 9, 64).to(dtype)
    angles = 1000 * torch.rand(9, 16)
    cos, sin = angles.cos(), angles.sin()
    a, b, rest = (part.float() for part in x.split([16, 16, 32], dim=-1))
    wanted = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
    found = rotate(x, (cos, sin))
    assert found.dtype == dtype and found.is_contiguous()
    assert (found.float() - wanted).norm() < (1e-6 if dtype == torch.float32 else 1e-3) * wanted.norm()
    there = rotate(x.to("meta"), (cos.to("meta"), sin.to("meta")))
    assert there.shape == x.shape and there.transpose(1, 2).is_contiguous() and there.dtype == dtype


def test_modulation_in_few_operations_has_the_same_bits() -> None:
    values = torch.randn(3, 6 * 8)
    scale_a, shift_a, gate_a, scale_f, shift_f, gate_f = values[:, None].chunk(6, dim=-1)
    wanted = ((1 + scale_a, 1 + scale_f), (shift_a, shift_f), (torch.sigmoid(1 - gate_a), torch.sigmoid(1 - gate_f)))
    for made, parts in zip(split_modulation(values), wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(made, parts, strict=True))


@pytest.mark.parametrize("last", [False, True])
def test_the_gradient_through_a_local_term(last: bool) -> None:
    """The term is added in place: the slope along a direction is that of the gradient."""
    dit = _dit(differential=False)
    cond = Conditioning(context=torch.randn(2, 5, 32), seconds=torch.randn(2, 32), local=None, valid=None)
    prepared, x = dit.prepare(cond), torch.randn(2, FRAMES, 16)
    h, sequence = dit.begin(x, prepared)
    local, along, weight = (torch.randn(2, FRAMES, width) for width in (17, 17, 128))

    def value(local: Tensor) -> Tensor:
        out = dit.layers[1](h, torch.zeros(2, 6 * 128), prepared.contexts[1], LocalInput(local), sequence, last)
        return (out[:, -FRAMES:] * weight).sum()

    (gradient,) = torch.autograd.grad(value(local.requires_grad_()), local)
    slope = (value(local + 1e-2 * along) - value(local - 1e-2 * along)) / 2e-2
    assert abs(float((gradient * along).sum().detach() / slope.detach()) - 1) < 1e-3
