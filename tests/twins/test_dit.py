"""The diffusion transformer against the official outputs, and what must hold between its own outputs."""

from __future__ import annotations

from dataclasses import replace
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
CLOSE = 5e-6  # of ranges of frames beside prompts by themselves; measured 2e-7 .. 9e-7
FRAMES, SLOTS, CONTEXT, LATENT, WIDTH = 9, 5, 48, 16, 128


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


@pytest.fixture(params=["tiny-s", "tiny-l"])
def random_dit(twin: Twin, random_models: dict[str, Path], request: pytest.FixtureRequest) -> Any:
    """Plain and differential attention."""
    return twin.load(random_models[request.param], "dit")


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def _told(twin: Twin, *contexts: np.ndarray, shares: np.ndarray | None = None) -> Any:
    batch = len(contexts[0])
    return twin.module("dit").Conditioning(
        context=twin.array(np.concatenate(contexts, axis=1)),
        repeats=twin.array(np.tile(np.float32([1, 1, 3, 0, 1]), (batch, len(contexts)))),
        shares=None if shares is None else twin.array(shares),
        seconds=twin.array(_normal(batch, CONTEXT, seed=2)),
        local=twin.array(np.zeros((batch, 1, 1 + LATENT), np.float32)),
        valid=None,
    )


def _told_velocity(twin: Twin, dit: Any, cond: Any) -> np.ndarray:
    batch = len(cond.seconds)
    t = np.linspace(0.3, 0.9, batch, dtype=np.float32)
    return twin.numpy(dit(twin.array(_normal(batch, FRAMES, LATENT)), twin.times(t), dit.prepare(cond)))


def _shares(*rows: tuple[float, float]) -> np.ndarray:
    return np.broadcast_to(np.float32(rows)[:, None], (len(rows), MEMORY + FRAMES, 2)).copy()


def test_a_prompt_that_no_frame_is_told_changes_nothing(twin: Twin, random_dit: Any) -> None:
    first, second = (_normal(2, SLOTS, CONTEXT, seed=seed) for seed in (3, 4))
    wanted = _told_velocity(twin, random_dit, _told(twin, np.stack([first[0], second[1]])))
    found = _told_velocity(twin, random_dit, _told(twin, first, second, shares=_shares((1, 0), (0, 1))))
    assert relative(found, wanted) < CLOSE


@pytest.mark.parametrize("share", [0.5, 0.9, 1e-4])
def test_one_prompt_in_two_parts_is_one_prompt(twin: Twin, random_dit: Any, share: float) -> None:
    context = _normal(2, SLOTS, CONTEXT, seed=3)
    wanted = _told_velocity(twin, random_dit, _told(twin, context))
    found = _told_velocity(
        twin, random_dit, _told(twin, context, context, shares=_shares((share, 1 - share), (1 - share, share)))
    )
    assert relative(found, wanted) < CLOSE


@pytest.mark.parametrize("last", [False, True])
def test_ranges_of_frames_are_cross_attentions_of_their_own(twin: Twin, random_dit: Any, last: bool) -> None:
    first, second = (_normal(1, SLOTS, CONTEXT, seed=seed) for seed in (3, 4))
    shares = _shares((1, 0))
    shares[:, MEMORY + 4 :] = (0, 1)
    whole, *alone = (
        random_dit.prepare(cond).contexts[1]
        for cond in (_told(twin, first, second, shares=shares), _told(twin, first), _told(twin, second))
    )
    tokens = FRAMES if last else MEMORY + FRAMES
    x = twin.array(_normal(1, tokens, WIDTH, seed=5))
    attention = random_dit.layers[1].cross_attn
    found, *parts = (
        twin.numpy(attention(x, context.keys, context.values, context.bias_of(tokens))) for context in (whole, *alone)
    )
    change = tokens - FRAMES + 4
    assert relative(found[:, :change], parts[0][:, :change]) < CLOSE
    assert relative(found[:, change:], parts[1][:, change:]) < CLOSE


def test_both_halves_of_guidance_in_one_batch(twin: Twin, random_dit: Any) -> None:
    """The negative prompt is one for all frames."""
    first, second, away = (_normal(1, SLOTS, CONTEXT, seed=seed) for seed in (3, 4, 5))
    cond = _told(twin, first, second, shares=_shares((0.3, 0.7)))
    null = _told(twin, away, np.zeros_like(away))
    null = replace(null, repeats=twin.array(np.float32([[1, 1, 3, 0, 1, 0, 0, 0, 0, 0]])))
    module = twin.module("dit")
    x, t = _normal(1, FRAMES, LATENT), np.float32([0.4])
    both = random_dit(
        twin.array(np.concatenate([x, x])),
        twin.times(np.repeat(t, 2)),
        module.join(random_dit.prepare(cond), random_dit.prepare(null)),
    )
    for row, given in enumerate((cond, _told(twin, away))):
        assert (
            relative(
                twin.numpy(both)[row],
                twin.numpy(random_dit(twin.array(x), twin.times(t), random_dit.prepare(given)))[0],
            )
            < CLOSE
        )
