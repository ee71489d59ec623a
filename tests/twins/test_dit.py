"""The diffusion transformer against the official outputs, and what must hold between its own outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.twins import TINY, Cases, Twin, load_cases, relative

REFERENCE = 1e-5  # measured 4.9e-7 .. 1.5e-6 (len1 of tiny-l), both twins
FORWARD = ("plain", "nolocal", "local", "odd_b3", "t0", "len1", "long")
TIMES = ("1.0", "0.9991", "0.73", "0.5", "0.0831", "0.002", "0.0")
MEMORY = 8  # memory tokens of both models
TAPPED = ("plain", "local", "odd_b3")


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cases(golden_or_kept: Path, model: str) -> Cases:
    return load_cases(golden_or_kept, model, "dit")


def _conditioning(twin: Twin, cases: Cases, case: str, *, valid: bool = False) -> Any:
    local = twin.array(cases.channels_last(f"{case}.local")) if f"{case}.local" in cases else None
    return twin.module("dit").Conditioning(
        context=twin.array(cases[f"{case}.cross"]),
        seconds=twin.array(cases[f"{case}.glob"]),
        local=local,
        valid=twin.array(cases[f"{case}.padding_mask"].astype(bool)) if valid else None,
    )


def _velocity(twin: Twin, dit: Any, cases: Cases, case: str, *, valid: bool = False) -> np.ndarray:
    prepared = dit.prepare(_conditioning(twin, cases, case, valid=valid))
    x = twin.array(cases.channels_last(f"{case}.x"))
    return twin.numpy(dit(x, twin.times(cases[f"{case}.t"]), prepared))


@pytest.mark.parametrize("case", FORWARD)
def test_velocity_equals_the_reference(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases, case: str
) -> None:
    """[B7] to [B15], [B17]: no local input, batch of three times, t = 0 and 1, one frame and 200 frames."""
    dit = twin.load(checkpoints[model], "dit")
    assert relative(_velocity(twin, dit, cases, case), cases.channels_last(f"{case}.out")) < REFERENCE


@pytest.mark.parametrize("case", TAPPED)
def test_taps_equal_the_reference(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases, case: str
) -> None:
    """[B8] to [B10]: every stage on the way, memory tokens included, which the last block leaves out."""
    dit = twin.load(checkpoints[model], "dit")
    block = dit.layers[0]
    taps = {
        "context": twin.tap(dit, "to_cond_embed"),
        "adaln": twin.tap(dit, "to_modulation"),
        "project_in": twin.tap(dit, "project_in"),
        "transformer_out": twin.tap(dit, "project_out"),
        "block0_self_attn": twin.tap(block, "self_attn"),
        "block0_cross_attn": twin.tap(block, "cross_attn"),
        "block0_ff": twin.tap(block, "ff"),
        "block0": twin.tap(dit.layers, "0"),
        "block1": twin.tap(dit.layers, "1"),
    }
    _velocity(twin, dit, cases, case)
    wanted = {name: cases[f"{case}.{name}"] for name in taps}
    wanted["block1"] = wanted["block1"][:, MEMORY:]
    errors = {name: relative(tap[0], wanted[name]) for name, tap in taps.items()}
    assert max(errors.values()) < REFERENCE, errors


@pytest.mark.parametrize("t", TIMES)
def test_timestep_features_equal_the_reference(twin: Twin, cases: Cases, t: str) -> None:
    """[B5, B8], the precision trap: absolute 1e-6 at angles up to 62832 rad."""
    features = twin.module("dit").timestep_features(twin.times(cases[f"timestep_{t}.t"]))
    np.testing.assert_allclose(twin.numpy(features), cases[f"timestep_{t}.features"], rtol=0, atol=3e-7)  # 6e-8


@pytest.mark.parametrize("t", TIMES)
def test_timestep_embedding_equals_the_reference(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases, t: str
) -> None:
    """[B8]"""
    dit = twin.load(checkpoints[model], "dit")
    features = twin.array(cases[f"timestep_{t}.features"])
    assert relative(twin.numpy(dit.to_timestep_embed(features)), cases[f"timestep_{t}.embed"]) < REFERENCE


def test_padded_keys_are_removed_from_self_attention(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases
) -> None:
    """[B16, A15.1]: the rule of the GPU path; the CPU rule, which only zeroes V, is deliberately not matched."""
    dit = twin.load(checkpoints[model], "dit")
    mask = cases["pad.padding_mask"].astype(bool)
    velocity = _velocity(twin, dit, cases, "pad", valid=True)[mask]
    assert relative(velocity, cases.channels_last("pad.out_true_mask")[mask]) < REFERENCE
    assert relative(velocity, cases.channels_last("pad.out")[mask]) > 0.05


def test_a_padded_item_equals_the_item_alone(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases
) -> None:
    """[B16, A15.2]: item 1 of the padded batch, 11 frames, computed without batch and padding."""
    dit = twin.load(checkpoints[model], "dit")
    together = _velocity(twin, dit, cases, "pad", valid=True)[1, :11]
    alone = Cases({name: values[1:2] for name, values in cases.tensors.items() if name.startswith("pad.")})
    cut = {name: values[..., :11] for name, values in alone.tensors.items() if name in ("pad.x", "pad.local")}
    velocity = _velocity(twin, dit, Cases(alone.tensors | cut), "pad")[0]
    assert relative(together, velocity) < REFERENCE


def test_local_zeros_matter(twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases) -> None:
    """[B7]: text-to-audio passes zeros, and leaving them out is another model."""
    dit = twin.load(checkpoints[model], "dit")
    left_out = Cases({name: values for name, values in cases.tensors.items() if name != "plain.local"})
    assert not cases["plain.local"].any()
    assert relative(_velocity(twin, dit, left_out, "plain"), cases.channels_last("plain.out")) > 0.01


def test_one_local_frame_stands_for_all(twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases) -> None:
    """(B, 1, 1 + C) is the cheap form of a local input that is equal in all frames."""
    dit = twin.load(checkpoints[model], "dit")
    one = Cases(cases.tensors | {"plain.local": cases["plain.local"][..., :1]})
    assert relative(_velocity(twin, dit, one, "plain"), cases.channels_last("plain.out")) < REFERENCE


def test_one_changed_weight_is_noticed(twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases) -> None:
    dit = twin.load(checkpoints[model], "dit")
    twin.bump(dit.layers[1].cross_attn.to_q, "weight", 0.5)
    assert relative(_velocity(twin, dit, cases, "local"), cases.channels_last("local.out")) > 10 * REFERENCE


def test_half_precision_stays_near(twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases) -> None:
    """bf16 weights and latents: features of t and norms are computed in fp32."""
    dit = twin.load(checkpoints[model], "dit", "bfloat16")
    kind = twin.dtype("bfloat16")
    cond = _conditioning(twin, cases, "local")
    cast = {name: getattr(cond, name) for name in ("context", "seconds", "local")}
    cast = {name: array.to(kind) if twin.name == "torch" else array.astype(kind) for name, array in cast.items()}
    x = twin.array(cases.channels_last("local.x"))
    x = x.to(kind) if twin.name == "torch" else x.astype(kind)
    prepared = dit.prepare(twin.module("dit").Conditioning(valid=None, **cast))
    out = dit(x, twin.times(cases["local.t"]), prepared)
    assert out.dtype == kind
    assert relative(twin.numpy(out), cases.channels_last("local.out")) < 5e-2  # measured 1.4e-2
