"""Samplers against the official runs: teacher-forced, replayed, and free.

Random networks amplify rounding from step to step, so the network is compared at the stored states and the sampler
with the stored velocities; the free run comes last, with a looser tolerance.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.model.sampling import Guidance
from tests.support.twins import TINY, Cases, Twin, load_cases, relative

CALL = 1.5e-5  # measured 3.0e-6 (guided), 1.1e-6 else, both twins
REPLAY = 2e-6  # measured 1.5e-7
FREE = 2e-5  # measured 3.6e-6 (guided), 1.6e-6 else
SCHEDULES = ("", "_lin", "_smax0.6", "_perelem")
CASES = [
    name + schedule
    for name in ("euler", "pingpong", "dpmpp", "rk4")
    for schedule in SCHEDULES
    if name + schedule != "rk4_perelem"
] + ["euler_cfg7"]


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cases(golden_or_kept: Path, model: str) -> Cases:
    return load_cases(golden_or_kept, model, "samplers")


def _sampler(twin: Twin, case: str) -> Callable[..., Any]:
    return twin.module("samplers").SAMPLERS[case.split("_")[0]]


def _sigmas(cases: Cases, case: str) -> np.ndarray:
    """One row per item, whatever the official run was given."""
    sigmas = cases[f"{case}.sigmas"]
    return np.array(np.broadcast_to(sigmas, (len(cases[f"{case}.x0"]), sigmas.shape[-1])))


def _noise(twin: Twin, cases: Cases, case: str) -> Callable[[int], Any]:
    return lambda k: twin.array(cases.channels_last(f"{case}.noise{k}"))


def _velocity(twin: Twin, dit: Any, cases: Cases, case: str) -> Callable[..., Any]:
    batch = len(cases[f"{case}.x0"])
    cond = twin.module("dit").Conditioning(
        context=twin.array(cases[f"{case}.cross"]),
        seconds=twin.array(cases[f"{case}.glob"]),
        local=twin.array(np.zeros((batch, 1, 17), np.float32)),
        valid=None,
    )
    guidance = twin.module("guidance")
    return guidance.GuidedVelocity(
        dit=dit,
        cond=dit.prepare(cond),
        null=dit.prepare(cond.unconditional()),
        guidance=Guidance(scale=7.0 if case == "euler_cfg7" else 1.0),
    )


@pytest.mark.parametrize("case", CASES)
def test_velocity_at_the_stored_states(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases, case: str
) -> None:
    """Teacher-forced: the network at every stored state and time."""
    velocity = _velocity(twin, twin.load(checkpoints[model], "dit"), cases, case)
    per_step = 4 if case.startswith("rk4") else 1
    for step in range(_sigmas(cases, case).shape[1] - 1):
        x, t = cases.channels_last(f"{case}.step{step}_x"), cases[f"{case}.call{step * per_step}_t"]
        found = twin.numpy(velocity(twin.array(x), t))
        assert relative(found, cases.channels_last(f"{case}.call{step * per_step}_v")) < CALL


@pytest.mark.parametrize("case", CASES)
def test_stored_velocities_give_the_stored_states(twin: Twin, cases: Cases, case: str) -> None:
    """[B27] euler and pingpong, [B28] dpmpp, [B29] rk4: states, estimates, times of the calls and the end."""
    calls: list[np.ndarray] = []

    def velocity(_x: Any, t: np.ndarray) -> Any:
        calls.append(t)
        return twin.array(cases.channels_last(f"{case}.call{len(calls) - 1}_v"))

    sigmas, x = _sigmas(cases, case), twin.array(cases.channels_last(f"{case}.x0"))
    for step in _sampler(twin, case)(velocity, x, sigmas, _noise(twin, cases, case)):
        assert relative(twin.numpy(x), cases.channels_last(f"{case}.step{step.index}_x")) < REPLAY
        denoised = cases.channels_last(f"{case}.step{step.index}_denoised")
        assert relative(twin.numpy(step.denoised), denoised) < REPLAY
        x = step.x
    assert relative(twin.numpy(x), cases.channels_last(f"{case}.out")) < REPLAY
    wanted = [cases[f"{case}.call{i}_t"] for i in range(len(calls))]
    np.testing.assert_allclose(np.stack(calls), np.stack(wanted), rtol=0, atol=1e-6)
    assert f"{case}.call{len(calls)}_t" not in cases


@pytest.mark.parametrize("case", CASES)
def test_a_free_run_ends_where_the_reference_does(
    twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases, case: str
) -> None:
    velocity = _velocity(twin, twin.load(checkpoints[model], "dit"), cases, case)
    x = twin.array(cases.channels_last(f"{case}.x0"))
    for step in _sampler(twin, case)(velocity, x, _sigmas(cases, case), _noise(twin, cases, case)):
        x = step.x
    assert relative(twin.numpy(x), cases.channels_last(f"{case}.out")) < FREE


def test_rk4_works_with_a_schedule_per_item(twin: Twin, checkpoints: dict[str, Path], model: str, cases: Cases) -> None:
    """[B29, A15.7]: given (B, steps + 1) the official rk4 returns the initial noise; ours samples."""
    case = "rk4_2d_B1_quirk"
    x0, sigmas = cases.channels_last(f"{case}.x0"), cases[f"{case}.sigmas"]
    np.testing.assert_array_equal(cases.channels_last(f"{case}.out"), x0)
    velocity = _velocity(twin, twin.load(checkpoints[model], "dit"), cases, case)
    *_, last = _sampler(twin, "rk4")(velocity, twin.array(x0), sigmas, _noise(twin, cases, case))
    assert relative(twin.numpy(last.x), x0) > 0.1


@pytest.mark.parametrize("name", ["euler", "pingpong", "dpmpp", "rk4"])
def test_every_sampler_reaches_the_end_of_a_straight_path(twin: Twin, name: str) -> None:
    """x_t = (1 - t) z + t eps, on which every solver is exact; each item starts at the first time of its own row."""
    z, eps = (np.random.default_rng(seed).standard_normal((2, 7, 5), np.float32) for seed in (5, 6))
    sigmas = np.float32([[1, 0.7, 0.4, 0.1, 0], [0.9, 0.8, 0.5, 0.3, 0]])
    start = sigmas[:, :1, None]
    x, v = twin.array((1 - start) * z + start * eps), twin.array(eps - z)
    steps = list(_sampler(twin, name)(lambda _x, _t: v, x, sigmas, lambda _k: twin.array(eps)))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    np.testing.assert_allclose(twin.numpy(steps[-1].x), z, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["euler", "pingpong", "dpmpp", "rk4"])
def test_nothing_is_computed_before_it_is_asked_for(twin: Twin, name: str) -> None:
    """A caller that stops after one step has paid for one step."""
    calls: list[int] = []

    def velocity(x: Any, _t: np.ndarray) -> Any:
        calls.append(1)
        return x

    ones = twin.array(np.ones((1, 3, 2), np.float32))
    run = _sampler(twin, name)(velocity, ones, np.float32([[1, 0.5, 0]]), lambda _k: ones)
    assert not calls
    next(run)
    assert len(calls) == (4 if name == "rk4" else 1)


def test_pingpong_draws_no_noise_in_its_last_step(twin: Twin) -> None:
    """[B27]: the official code draws it and multiplies it by 0; with noise from outside that is left out."""
    drawn: list[int] = []

    def noise(k: int) -> Any:
        drawn.append(k)
        return ones

    ones = twin.array(np.ones((1, 3, 2), np.float32))
    list(_sampler(twin, "pingpong")(lambda x, _t: x, ones, np.float32([[1, 0.5, 0.2, 0]]), noise))
    assert drawn == [0, 1]


def test_registries_of_both_twins_and_the_request_agree() -> None:
    from sa3_mlx.common.model.sampling import SAMPLER_NAMES

    pytest.importorskip("torch")
    pytest.importorskip("mlx.core")
    for name in ("mlx", "torch"):
        assert tuple(Twin(name).module("samplers").SAMPLERS) == SAMPLER_NAMES
