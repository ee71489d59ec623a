"""The text encoder against the official outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.twins import Cases, Twin, load_cases, relative

REFERENCE = 1e-5  # measured 4.7e-7 in both twins


@pytest.fixture
def text(golden: Path) -> Cases:
    return load_cases(golden, "tiny-s", "text")


def _run(twin: Twin, encoder, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return twin.numpy(encoder(twin.array(ids), twin.array(mask.astype(bool))))


def test_hidden_states_equal_the_reference(twin: Twin, checkpoints: dict[str, Path], text: Cases) -> None:
    """[B2]: one prompt is too long, one has an unknown word; padded rows are compared too."""
    encoder = twin.load(checkpoints["tiny-s"], "text_encoder")
    hidden = _run(twin, encoder, text["t5gemma.input_ids"], text["t5gemma.attention_mask"])
    assert relative(hidden, text["t5gemma.last_hidden_state"]) < REFERENCE


def test_one_changed_weight_is_noticed(twin: Twin, checkpoints: dict[str, Path], text: Cases) -> None:
    encoder = twin.load(checkpoints["tiny-s"], "text_encoder")
    twin.bump(encoder.layers[1].self_attn.k_proj, "weight", 0.5)
    hidden = _run(twin, encoder, text["t5gemma.input_ids"], text["t5gemma.attention_mask"])
    assert relative(hidden, text["t5gemma.last_hidden_state"]) > 10 * REFERENCE


def test_padded_keys_are_masked(twin: Twin, checkpoints: dict[str, Path], text: Cases) -> None:
    """[B2]: what stands at padded positions does not reach real tokens."""
    encoder = twin.load(checkpoints["tiny-s"], "text_encoder")
    ids, mask = text["t5gemma.input_ids"], text["t5gemma.attention_mask"].astype(bool)
    other = np.where(mask, ids, 7)
    assert relative(_run(twin, encoder, other, mask)[mask], _run(twin, encoder, ids, mask)[mask]) < 1e-6


def test_real_tokens_alone_give_the_same_states(twin: Twin, checkpoints: dict[str, Path], text: Cases) -> None:
    encoder = twin.load(checkpoints["tiny-s"], "text_encoder")
    ids, mask = text["t5gemma.input_ids"][:1], text["t5gemma.attention_mask"][:1].astype(bool)
    count = int(mask.sum())
    short = _run(twin, encoder, ids[:, :count], mask[:, :count])
    assert relative(short, text["t5gemma.last_hidden_state"][:1, :count]) < REFERENCE


def test_an_empty_prompt_gives_finite_states(twin: Twin, checkpoints: dict[str, Path]) -> None:
    """[B1]: its mask is all zero; the conditioner replaces every row."""
    encoder = twin.load(checkpoints["tiny-s"], "text_encoder")
    hidden = _run(twin, encoder, np.zeros((2, 12), np.int32), np.zeros((2, 12), bool))
    assert np.isfinite(hidden).all()


def test_bfloat16_weights_compute_in_bfloat16(twin: Twin, checkpoints: dict[str, Path], text: Cases) -> None:
    """[B3]: the official run is bf16; the goldens are fp32, which it meets within bf16's reach."""
    encoder = twin.load(checkpoints["tiny-s"], "text_encoder", "bfloat16")
    ids, mask = text["t5gemma.input_ids"], text["t5gemma.attention_mask"].astype(bool)
    out = encoder(twin.array(ids), twin.array(mask))
    assert out.dtype == twin.dtype("bfloat16")
    difference = relative(twin.numpy(out)[mask], text["t5gemma.last_hidden_state"][mask])
    assert 1e-3 < difference < 6e-2  # measured 1.4e-2
