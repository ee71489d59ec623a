"""Fourier features and rotary angles agree with the official code to float32 rounding."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sa3_mlx.common.model.features import (
    FREQUENCIES,
    ROTARY_FREQUENCIES,
    fourier_features,
    rope_table,
    seconds_features,
)

TINY = ("tiny-s", "tiny-l")


def test_frequencies_are_pinned_to_the_bit():
    assert FREQUENCIES.shape == (128,) and FREQUENCIES.dtype == np.float32
    assert hashlib.sha256(FREQUENCIES.tobytes()).hexdigest()[:16] == "fd4a74b00dc14add"
    assert ROTARY_FREQUENCIES.shape == (16,) and ROTARY_FREQUENCIES.dtype == np.float32
    assert hashlib.sha256(ROTARY_FREQUENCIES.tobytes()).hexdigest()[:16] == "9cc63b858a37a16b"


def test_constants_cannot_be_changed_by_accident():
    with pytest.raises(ValueError):
        FREQUENCIES[0] = 1.0


def test_cosines_come_first_and_zero_maps_to_ones_and_zeros():
    features = fourier_features(np.zeros(3))
    assert features.shape == (3, 256) and features.dtype == np.float32
    assert (features[:, :128] == 1).all() and (features[:, 128:] == 0).all()


def test_seconds_saturate_at_both_ends():
    features = seconds_features([-3.0, 0.0, 384.0, 500.0], 384.0)
    np.testing.assert_array_equal(features[0], features[1])
    np.testing.assert_array_equal(features[2], features[3])
    assert not np.array_equal(features[0], features[2])


def test_rope_angle_is_formed_in_float32():
    cos, sin = rope_table(np.arange(7))
    assert cos.shape == sin.shape == (7, 16)
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    far = np.float32(60_001) * ROTARY_FREQUENCIES
    np.testing.assert_array_equal(rope_table([60_001])[1][0], np.sin(far.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("name", TINY)
def test_timestep_features_match_the_official_code(golden: Path, name: str):
    tensors = load_file(golden / name / "dit.safetensors")
    cases = sorted(key.split(".features")[0] for key in tensors if key.endswith(".features"))
    assert len(cases) == 7
    for case in cases:
        ours = fourier_features(tensors[f"{case}.t"])
        # measured 6e-8: the official cos and sin are float32 functions of the same float32 angle
        np.testing.assert_allclose(ours, tensors[f"{case}.features"], rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", TINY)
def test_duration_embedding_matches_the_official_code(golden: Path, name: str):
    tensors = load_file(golden / name / "cond.safetensors")
    weights = load_file(golden / name / "weights.safetensors")
    prefix = "conditioner.conditioners.seconds_total.embedder.embedding.1."
    features = seconds_features(tensors["seconds_total.seconds"], 384.0)  # (9, 256)
    ours = features @ weights[prefix + "weight"].T + weights[prefix + "bias"]
    np.testing.assert_allclose(ours[:, None], tensors["seconds_total.out"], rtol=0, atol=1e-6)


def test_rotary_frequencies_equal_every_stored_buffer(golden: Path):
    for name in TINY:
        buffers = {k: v for k, v in load_file(golden / name / "weights.safetensors").items() if k.endswith("inv_freq")}
        assert buffers
        for value in buffers.values():
            np.testing.assert_array_equal(value, ROTARY_FREQUENCIES)


def test_frequencies_equal_the_published_table(golden: Path):
    table = golden.parent / "spec" / "fourier_frequencies.json"
    if not table.is_file():
        pytest.skip("the frequency table is not beside the goldens")
    bits = json.loads(table.read_text())["float32_bits"]
    np.testing.assert_array_equal(FREQUENCIES.view(np.uint32), np.array(bits, dtype=np.uint32))
