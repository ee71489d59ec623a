"""Guidance against the official outputs. Every case is one call of the network on shared inputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.model.sampling import Guidance
from tests.support.twins import TINY, Cases, Twin, load_cases, relative

REFERENCE = 1e-5  # measured 1.8e-6 (neg_mask of tiny-s), both twins

CASES = {
    "cfg1": Guidance(scale=1.0),
    "cfg7_apg0": Guidance(scale=7.0, apg=0.0),
    "cfg7_apg1": Guidance(scale=7.0),
    "cfg3_apg05": Guidance(scale=3.0, apg=0.5),
    "cfg0": Guidance(scale=0.0, apg=0.0),
    "cfg5_phi": Guidance(scale=5.0, rescale=0.7),
    "cfg5_thr": Guidance(scale=5.0, apg=0.0, norm_threshold=2.0),
    "cfg5_interval_out": Guidance(scale=5.0, interval=(0.0, 0.5)),
    "cfg5_interval_in": Guidance(scale=5.0, interval=(0.5, 1.0)),
    "neg": Guidance(scale=5.0),
    "neg_mask": Guidance(scale=5.0),
}
PADDED = {"pad_apg1": Guidance(scale=5.0), "pad_thr_apg05": Guidance(scale=5.0, apg=0.5, norm_threshold=2.0)}


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cases(golden_or_kept: Path, model: str) -> Cases:
    return load_cases(golden_or_kept, model, "guidance")


def _conditioning(twin: Twin, cases: Cases, *, padded: bool = False) -> Any:
    return twin.module("dit").Conditioning(
        context=twin.array(cases["inputs.cross"]),
        seconds=twin.array(cases["inputs.glob"]),
        local=twin.array(cases.channels_last("inputs.local")),
        valid=twin.array(cases["inputs.padding_mask"].astype(bool)) if padded else None,
    )


def _other(twin: Twin, cases: Cases, cond: Any, case: str) -> Any:
    """The unconditional input, or the negative prompt of the case: its tokens without the duration token."""
    guidance = twin.module("guidance")
    if not case.startswith("neg"):
        return cond.unconditional()
    negative = cases["inputs.neg"]
    mask = cases["inputs.neg_mask"].astype(bool) if case == "neg_mask" else np.ones(negative.shape[:2], bool)
    given = type(cond)(
        context=twin.array(negative), seconds=cond.seconds, local=cond.local, valid=cond.valid
    )  # the negative prompt's own duration token stays [B19]
    return guidance.negative(given, twin.array(negative[:, :-1]), twin.array(mask[:, :-1]))


def _guided(twin: Twin, dit: Any, cases: Cases, case: str, settings: Guidance, *, padded: bool = False) -> np.ndarray:
    cond = _conditioning(twin, cases, padded=padded)
    velocity = twin.module("guidance").GuidedVelocity(
        dit=dit, cond=dit.prepare(cond), null=dit.prepare(_other(twin, cases, cond, case)), guidance=settings
    )
    return twin.numpy(velocity(twin.array(cases.channels_last("inputs.x")), cases["inputs.t"]))


@pytest.mark.parametrize("case", CASES)
def test_guided_velocity_equals_the_reference(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases, case: str
) -> None:
    """[B18] when, [B19] unconditional and negative input, [B20] combination, [B21] rescale."""
    dit = twin.load(checkpoints[model], "dit")
    velocity = _guided(twin, dit, cases, case, CASES[case])
    assert relative(velocity, cases.channels_last(f"{case}.out")) < REFERENCE


@pytest.mark.parametrize("case", PADDED)
def test_guidance_uses_valid_frames_only(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases, case: str
) -> None:
    """[B20] with true masking [A15.1]; the CPU rule of padding [B16] is deliberately not matched."""
    dit = twin.load(checkpoints[model], "dit")
    mask = cases["inputs.padding_mask"].astype(bool)
    velocity = _guided(twin, dit, cases, case, PADDED[case], padded=True)[mask]
    assert relative(velocity, cases.channels_last(f"{case}.out_true_mask")[mask]) < REFERENCE
    assert relative(velocity, cases.channels_last(f"{case}.out")[mask]) > 0.01


@pytest.mark.parametrize("case", ["apg_none", "apg_mask"])
def test_projection_equals_the_reference(twin: Twin, cases: Cases, case: str) -> None:
    """[B20]: parallel and orthogonal parts, over all frames or the valid ones."""
    valid = twin.array(cases["inputs.padding_mask"].astype(bool)) if case == "apg_mask" else None
    difference, reference = (twin.array(cases.channels_last(f"{case}.{name}")) for name in ("v0", "v1"))
    found = twin.module("guidance").project(difference, reference, valid)
    for part, name in zip(found, ("parallel", "orthogonal"), strict=True):
        assert relative(twin.numpy(part), cases.channels_last(f"{case}.{name}")) < 3.5e-6  # measured 6.9e-7


def test_scale_one_is_the_conditional_velocity(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases
) -> None:
    """[B18]: bit-equal, and so is any scale outside the interval."""
    dit = twin.load(checkpoints[model], "dit")
    prepared = dit.prepare(_conditioning(twin, cases))
    x, t = twin.array(cases.channels_last("inputs.x")), cases["inputs.t"]
    conditional = twin.numpy(dit(x, twin.times(t), prepared))
    for case in ("cfg1", "cfg5_interval_out"):
        np.testing.assert_array_equal(_guided(twin, dit, cases, case, CASES[case]), conditional)


def test_every_item_decides_about_the_interval(twin: Twin, checkpoints: dict[str, Path], cases: Cases) -> None:
    """[B18, A15.2]: items of a batch may be at different times, and only those inside are guided."""
    dit = twin.load(checkpoints["tiny-s"], "dit")
    cond = _conditioning(twin, cases)
    settings = Guidance(scale=5.0, interval=(0.5, 1.0))
    null = dit.prepare(cond.unconditional())
    velocity = twin.module("guidance").GuidedVelocity(dit=dit, cond=dit.prepare(cond), null=null, guidance=settings)
    x = twin.array(cases.channels_last("inputs.x"))
    for inside, t in enumerate((np.float32([0.8, 0.2]), np.float32([0.2, 0.8]))):
        plain, found = twin.numpy(dit(x, twin.times(t), velocity.cond)), twin.numpy(velocity(x, t))
        assert relative(found[inside], plain[inside]) > 0.1
        assert relative(found[1 - inside], plain[1 - inside]) < 2.5e-6  # measured 4.5e-7, of a batch twice as large


def test_the_unconditional_context_is_exactly_zero(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases
) -> None:
    """[B19]: no bias anywhere, so cross-attention adds exactly nothing."""
    dit = twin.load(checkpoints[model], "dit")
    cond = _conditioning(twin, cases)
    zeros = dit.prepare(replace(cond, context=twin.array(np.zeros_like(cases["inputs.cross"]))))
    x = twin.array(np.random.default_rng(0).standard_normal((2, 21, 128), np.float32))
    for layer, context in zip(dit.layers, zeros.contexts, strict=True):
        assert not twin.numpy(layer.cross_attn(x, context.keys, context.values)).any()
    nothing = dit.prepare(cond.unconditional())
    assert nothing.contexts == (None, None)
    x, t = twin.array(cases.channels_last("inputs.x")), twin.times(cases["inputs.t"])
    np.testing.assert_array_equal(twin.numpy(dit(x, t, nothing)), twin.numpy(dit(x, t, zeros)))


def test_one_changed_weight_is_noticed(twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases) -> None:
    dit = twin.load(checkpoints[model], "dit")
    twin.bump(dit.layers[0].cross_attn.to_kv, "weight", 0.5)
    velocity = _guided(twin, dit, cases, "cfg7_apg1", CASES["cfg7_apg1"])
    assert relative(velocity, cases.channels_last("cfg7_apg1.out")) > 2 * REFERENCE
