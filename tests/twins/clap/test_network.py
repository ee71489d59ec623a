"""The latent CLAP of a model: both twins give the same vectors, and nothing but what is said and heard counts [T6]."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import TINY, with_clap
from tests.support.tiny_checkpoint import normal, write_checkpoint
from tests.support.twins import Twin, relative

CONFIG = with_clap(TINY["tiny-s"])
TOLERANCE = 3e-6  # relative L2; measured between the twins: 5.2e-7 (sounds), 2.0e-7 (texts)
VALID = np.arange(53)[None] < np.array([[53], [7]])  # three windows of 24 frames
TIMES = np.float32([0, 0.3])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("clap"), CONFIG)


def sounds(twin: Twin, folder: Path, z: np.ndarray, valid: np.ndarray, t: np.ndarray = TIMES) -> np.ndarray:
    clap = twin.load(folder, "clap")
    return twin.numpy(clap.embed_audio(twin.array(z), twin.array(valid), twin.array(t)))


def texts(twin: Twin, folder: Path, states: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return twin.numpy(twin.load(folder, "clap").embed_states(twin.array(states), twin.array(mask)))


def test_both_twins_give_the_same_vectors(folder: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("mlx.core")
    z, states = normal("z", (2, 53, 16)), normal("states", (2, 12, 48))
    mask = np.arange(12)[None] < np.array([[12], [5]])
    pairs = [
        [sounds(Twin(name), folder, z, VALID) for name in ("mlx", "torch")],
        [texts(Twin(name), folder, states, mask) for name in ("mlx", "torch")],
    ]
    for ours, theirs in pairs:
        assert ours.shape == (2, 16) and relative(ours, theirs) < TOLERANCE
        np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)


def test_what_is_not_valid_does_not_count(twin: Twin, folder: Path) -> None:
    """Measured: 2e-7."""
    z = normal("z", (2, 53, 16))
    wanted = sounds(twin, folder, z, VALID)
    longer = np.concatenate([np.where(VALID[..., None], z, np.float32(np.nan)), np.full((2, 30, 16), 7, np.float32)], 1)
    found = sounds(twin, folder, longer, np.pad(VALID, ((0, 0), (0, 30))))
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    alone = sounds(twin, folder, z[1:, :7], VALID[1:, :7], TIMES[1:])
    np.testing.assert_allclose(alone, wanted[1:], atol=1e-6)
    states, mask = normal("states", (1, 12, 48)), np.arange(12)[None] < 5
    cut = texts(twin, folder, states[:, :5], mask[:, :5])
    np.testing.assert_allclose(texts(twin, folder, states, mask), cut, atol=1e-6)


def test_noise_level_and_weights_count(twin: Twin, folder: Path) -> None:
    z = normal("z", (2, 53, 16))
    wanted = sounds(twin, folder, z, VALID)
    assert np.abs(sounds(twin, folder, z, VALID, TIMES[::-1]) - wanted).max() > 1e-3
    clap = twin.load(folder, "clap")
    twin.bump(clap.audio.layers[1].self_attn.to_out, "weight", 1.0)
    bumped = twin.numpy(clap.embed_audio(twin.array(z), twin.array(VALID), twin.array(TIMES)))
    assert relative(bumped, wanted) > 1e-5


def test_an_item_without_a_frame_is_refused(twin: Twin, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"item\(s\) 1 have no valid frame"):
        sounds(twin, folder, normal("z", (2, 5, 16)), np.array([[True] * 5, [False] * 5]))


def test_a_model_without_one_says_so(twin: Twin, tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path, TINY["tiny-s"])
    with pytest.raises(ValueError, match="tiny-s has no latent CLAP; 'sa3 add-clap' puts one into it"):
        twin.load(plain, "clap")
