"""Presets for GPUs fit them, by a count of their steps without values."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from benchmarks.speed.full_scale import FULL_SCALE, FullScale
from benchmarks.speed.plans import plan_of
from sa3_torch.train.run.settings import PRESETS


def test_every_preset_for_gpus_is_planned() -> None:
    named = {path for path in PRESETS.glob("*/*.toml") if "[machine]" in path.read_text()}
    planned = {PRESETS / case.stage / f"{case.preset}.toml" for case in FULL_SCALE}
    assert named and named <= planned and all(path.is_file() for path in planned)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL_SCALE, ids=lambda case: case.name)
def test_a_preset_fits_its_gpu(case: FullScale) -> None:
    plan_of(case).check()


@pytest.mark.slow
def test_a_preset_that_does_not_fit_is_refused() -> None:
    case = next(case for case in FULL_SCALE if case.name == "pretrain medium")
    with pytest.raises(ValueError, match="memory: a process of pretrain needs"):
        plan_of(case, "train.accumulate=1", "train.checkpoint_blocks=false").check()
