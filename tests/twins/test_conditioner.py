"""Learned padding, duration token and the inputs of the diffusion transformer against the official outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.twins import TINY, Cases, Twin, load_cases, relative

ABSOLUTE = 1e-6  # measured 2.4e-7


@pytest.fixture(params=TINY)
def model(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def cond(golden_or_kept: Path, model: str) -> Cases:
    return load_cases(golden_or_kept, model, "cond")


def test_padding_is_the_learned_vector(twin: Twin, checkpoints: dict[str, Path], model: str, cond: Cases) -> None:
    """[B4]"""
    conditioner = twin.load(checkpoints[model], "conditioner")
    mask = cond["prompt.mask"].astype(bool)
    out = twin.numpy(conditioner.embed_prompt(twin.array(cond["prompt.hidden"]), twin.array(mask)))
    np.testing.assert_array_equal(out, cond["prompt.out"])


def test_durations_saturate_at_both_ends(twin: Twin, checkpoints: dict[str, Path], model: str, cond: Cases) -> None:
    """[B5]: 0, 384 and beyond both ends among the nine values."""
    conditioner = twin.load(checkpoints[model], "conditioner")
    out = twin.numpy(conditioner.embed_seconds(cond["seconds_total.seconds"]))
    np.testing.assert_allclose(out, cond["seconds_total.out"][:, 0], rtol=0, atol=ABSOLUTE)


def test_the_longest_duration_is_configured(twin: Twin) -> None:
    """[B5]: other checkpoints of the family saturate elsewhere."""
    conditioner = twin.module("conditioner").Conditioner(16, 47.5)
    found = twin.numpy(conditioner.embed_seconds(np.array([23.75, 47.5, 100.0])))
    conditioner.seconds_max = 384.0
    np.testing.assert_array_equal(found, twin.numpy(conditioner.embed_seconds(np.array([192.0, 384.0, 384.0]))))


def test_the_duration_is_the_last_token_and_the_global_vector(
    twin: Twin, checkpoints: dict[str, Path], model: str, cond: Cases
) -> None:
    """[B6]: context = [text tokens, duration token], global = the duration vector."""
    conditioner = twin.load(checkpoints[model], "conditioner")
    hidden, mask = cond["prompt.hidden"], cond["prompt.mask"].astype(bool)
    seconds = cond["seconds_total.seconds"][1 : 1 + len(hidden)]
    context, duration = conditioner(twin.array(hidden), twin.array(mask), seconds)
    assert context.shape == (3, 13, 48)
    assert duration.shape == (3, 48)
    wanted = np.concatenate([cond["prompt.out"], cond["seconds_total.out"][1 : 1 + len(hidden)]], axis=1)
    np.testing.assert_allclose(twin.numpy(context), wanted, rtol=0, atol=ABSOLUTE)
    np.testing.assert_array_equal(twin.numpy(duration), twin.numpy(context)[:, -1])


def test_the_reference_assembles_its_inputs_in_the_same_order(cond: Cases) -> None:
    """[B6, B7]: context [text, duration], local [mask, masked latents]; this is what ``Conditioning`` takes."""
    cross = np.concatenate([cond["inputs.prompt"], cond["inputs.seconds"]], axis=1)
    np.testing.assert_array_equal(cond["inputs.cross_attn_cond"], cross)
    np.testing.assert_array_equal(cond["inputs.global_cond"], cond["inputs.seconds"][:, 0])
    local = np.concatenate([cond["inputs.inpaint_mask"], cond["inputs.inpaint_masked_input"]], axis=1)
    np.testing.assert_array_equal(cond["inputs.local_add_cond"], local)


def test_one_changed_weight_is_noticed(twin: Twin, checkpoints: dict[str, Path], model: str, cond: Cases) -> None:
    conditioner = twin.load(checkpoints[model], "conditioner")
    twin.bump(conditioner.seconds_embed, "weight", 0.01)
    out = twin.numpy(conditioner.embed_seconds(cond["seconds_total.seconds"]))
    assert relative(out, cond["seconds_total.out"][:, 0]) > 1e-5
