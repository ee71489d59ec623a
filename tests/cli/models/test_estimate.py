"""Where MLX is slow, how long a run takes is said before it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sa3_mlx import runtime
from sa3_mlx.cli import backend
from sa3_mlx.cli.estimate import RATE, duration_text, operations, slow_note
from sa3_mlx.common.generation.request import InitAudio, Item, Request
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.model.sampling import Guidance, Sampling
from tests.support.command import Run, ok, tone

SLOW = runtime.Status(fast=False, message="OpenBLAS not found: mlx is slow; apt install it")
ITEM = Item(prompt="piano note A4", seconds=4.0, seed=1)
GUIDED = Request(items=(ITEM,), sampling=Sampling(sampler="euler", steps=50, guidance=Guidance(scale=7.0)))


def test_the_demo_takes_about_a_minute_with_the_reference_blas():
    """Measured: 52 s and 64 s for 4 s of sound with 50 guided steps, on two machines."""
    assert 40 <= operations(GUIDED, PRESETS["first"]) / RATE <= 80


def test_work_grows_with_steps_guidance_batch_and_length():
    demo = PRESETS["first"]
    work = operations(GUIDED, demo)
    assert GUIDED.sampling is not None
    plain = replace(GUIDED, sampling=Sampling(sampler="euler", steps=50))
    assert work == pytest.approx(2 * operations(plain, demo), rel=0.02)
    assert operations(replace(plain, sampling=Sampling(sampler="rk4", steps=50)), demo) == pytest.approx(
        4 * operations(plain, demo), rel=0.03
    )
    assert operations(replace(GUIDED, items=(ITEM, replace(ITEM, seed=2))), demo) == pytest.approx(2 * work)
    assert operations(replace(GUIDED, items=(replace(ITEM, seconds=1.0),)), demo) < 0.5 * work
    assert operations(replace(GUIDED, init=InitAudio(audio=tone(1.0), noise_level=0.5)), demo) > work


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.1, "1 s"), (7.4, "7 s"), (52.0, "50 s"), (119.0, "120 s"), (150.0, "2 min"), (9000.0, "2 h")],
)
def test_durations_are_round(seconds: float, text: str):
    assert duration_text(seconds) == text


def test_it_is_said_once_before_the_work(run: Run, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlx.core")
    args = ("generate", "rain", "--seconds", "0.2", "--steps", "1", "--backend", "mlx", "--out")
    monkeypatch.setattr(runtime, "_STATUS", SLOW)
    monkeypatch.setattr(backend, "available", lambda name: name == "mlx")
    line = f"note: this takes about 1 s: {SLOW.message}, or pip install 'sa3[torch]'\n"
    assert ok(run(*args, "a.wav")).err.count(line) == 1
    assert "takes about" not in ok(run(*args, "b.wav", "--quiet")).err
    monkeypatch.setattr(runtime, "_STATUS", runtime.Status(fast=True, message="fine"))
    assert "takes about" not in ok(run(*args, "c.wav")).err
    assert slow_note([GUIDED], PRESETS["first"]) is None


def test_auto_is_pytorch_where_mlx_would_crawl(monkeypatch: pytest.MonkeyPatch):
    """On Linux without OpenBLAS; MLX where PyTorch is not there or OpenBLAS is."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(backend, "_NVIDIA", backend.Path("/nowhere"))
    monkeypatch.setattr(backend, "available", lambda _name: True)
    monkeypatch.setattr(runtime, "_STATUS", SLOW)
    assert backend.choose("auto") == "torch" and backend.choose("mlx") == "mlx"
    monkeypatch.setattr(backend, "available", lambda name: name == "mlx")
    assert backend.choose("auto") == "mlx"
    monkeypatch.setattr(backend, "available", lambda _name: True)
    monkeypatch.setattr(runtime, "_STATUS", runtime.Status(fast=True, message="fine"))
    assert backend.choose("auto") == "mlx"
