"""Fewer shapes and no mask: contexts of few lengths, clips without the frames that mean nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor

from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.generation.events import Stepped
from sa3_mlx.common.generation.request import Inpaint, Item, Request
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.text.tokenizer import collapse_padding
from sa3_torch import attention, dit
from sa3_torch.choices import using
from sa3_torch.lora import GatedVelocity
from tests.support.tiny import TINY
from tests.support.twins import Twin, relative

from .counted import CountedPipeline

CLOSE = 5e-6
ONE = Request(items=(Item(prompt="low kick", seconds=1.7, seed=1),), sampling=Sampling(sampler="pingpong", steps=3))
MANY = Request(
    items=tuple(Item(prompt=text, seconds=1.7, seed=1) for text in ("kick", "low kick " * 5)),
    sampling=Sampling(sampler="euler", steps=3, guidance=Guidance(scale=3)),
)


@pytest.fixture(params=TINY)
def pipeline(random_models: dict[str, Path], request: pytest.FixtureRequest) -> Any:
    return Twin("torch").pipeline(random_models[request.param])


def test_contexts_have_few_lengths() -> None:
    """In 16 bits too; a prompt that fills all slots has the last one."""
    lengths = set()
    for count in range(257):
        mask = np.arange(256)[None] < count
        for dtype in ("float32", "float16"):
            own, wanted = collapse_padding(mask, dtype)
            slots, repeats = collapse_padding(mask, dtype, (32, 64, 128, 257))
            lengths.add(repeats.shape[1])
            assert slots >= own and repeats.shape[1] == slots + 1
            np.testing.assert_array_equal(repeats[:, :own], wanted[:, :own])
            assert repeats[0, -1] == 1 and not repeats[:, own:-1].any()
    assert lengths == {32, 64, 128, 257}


@pytest.mark.parametrize("request_", [ONE, MANY], ids=["one", "batch with guidance"])
def test_fillers_weigh_nothing(pipeline: Any, request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 slots of text in these models, so that 8 is a length to fill up to; also the text encoder gets it."""
    usual = pipeline.generate(request_)
    seen: list[int] = []
    real = dit.CrossAttention.prepare
    monkeypatch.setattr(dit.CrossAttention, "prepare", lambda self, c: (seen.append(c.shape[1]), real(self, c))[1])
    monkeypatch.setattr(type(pipeline), "context_sizes", (9, 13))
    found = pipeline.generate(request_)
    assert set(seen) == {9 if request_ is ONE else 13}
    for a, b in zip(found.latents, usual.latents, strict=True):
        assert relative(a, b) < CLOSE  # measured up to 6e-7


def test_buckets_are_a_choice(pipeline: Any) -> None:
    assert pipeline.context_sizes == ()
    with using({"context": "buckets"}):
        assert pipeline.context_sizes == (32, 64, 128, 257)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kept", [False, True])
def test_a_clip_without_the_frames_that_mean_nothing(
    pipeline: Any, scale: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = np.random.default_rng(2).uniform(-0.5, 0.5, (13600, 2)).astype(np.float32)
    request = replace(
        ONE,
        sampling=replace(ONE.sampling, guidance=Guidance(scale=scale)),
        inpaint=Inpaint(audio=sound, regions=((0.3, 0.9),)) if kept else None,
    )
    masks: list[bool] = []
    real = attention.attend

    def watched(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        masks.append(mask is not None and mask.dtype == torch.bool)  # a bias is that of the context
        return real(q, k, v, mask)

    monkeypatch.setattr(attention, "attend", watched)
    wanted = pipeline.generate(request)
    assert any(masks)
    masks.clear()
    with using({"padding": "cut"}):
        events = list(pipeline.stream(request))
    assert not any(masks)
    found = events[-1].generation
    steps = [event.denoised for event in events if isinstance(event, Stepped)]
    assert {tuple(made.shape) for made in steps} == {(1, len(events[3].denoised[0]), 16)}
    assert relative(found.latents[0], wanted.latents[0]) < CLOSE  # measured up to 1e-6
    assert relative(found.audio[0], wanted.audio[0]) < 1e-4


@pytest.mark.parametrize(("stored", "wanted"), [("F16", torch.float32), ("BF16", torch.bfloat16)])
def test_a_text_encoder_stored_in_fp16_runs_in_fp32_on_a_gpu(
    random_models: dict[str, Path], tmp_path: Path, stored: str, wanted: torch.dtype
) -> None:
    """Its activations overflow fp16. Before, the type of the file was kept: F16 gave float16."""
    folder = shutil.copytree(random_models["tiny-s"], tmp_path / "model")
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        entries = [
            array_entry(name, file.read(name), stored if name.startswith("text_encoder.") else "F32")
            for name in file.names()
        ]
        metadata = file.metadata
    write_tensors(folder / WEIGHTS_FILE, entries, metadata)
    encoder = CountedPipeline.opened(folder).load_part("text_encoder")
    assert {parameter.dtype for parameter in encoder.parameters()} == {wanted}
    assert encoder(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool, device="meta")).dtype == wanted


def test_velocities_that_share_one_memory_do_not_mix() -> None:
    """As graphs of kernels may: adapters that are on at other times in one batch."""

    class Applied:
        def __init__(self, last: float) -> None:
            self.last = last

        def on(self, time: float) -> bool:
            return time <= self.last

    memory = torch.zeros(2, 3, 4)

    def make(on: tuple[Any, ...]) -> Any:
        return lambda _x, _t: memory.fill_(len(on))

    gated = GatedVelocity([Applied(1.0), Applied(0.5)], make)  # type: ignore[list-item]
    made = gated(torch.zeros(2, 3, 4), np.float32([0.9, 0.2]))
    assert made[0].unique().tolist() == [1.0] and made[1].unique().tolist() == [2.0]
