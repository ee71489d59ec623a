"""Noise on the device: the bits of ``common/generation/noise.py``, without a step back to the host."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sa3_mlx.common.generation.noise import DECODER_TOKENS, INITIAL, SEED_MAX, NoiseStream, noise, step
from sa3_torch import philox
from tests.cuda.operations import Operations


def _drawn(seeds: list[int], indices: list[int], stream: int, frames: int, channels: int, start: int = 0) -> np.ndarray:
    """(indices, seeds, frames, channels), in one go."""
    on_device = torch.tensor(seeds), torch.tensor(indices)[:, None]
    return philox.noise(*on_device, stream, frames, channels, start=start).numpy()


def test_words_are_the_published_philox() -> None:
    """Known answers of Philox 4x64-10 (Salmon et al. 2011): all zeros, all ones."""
    zero, ones = torch.tensor(0), torch.tensor(-1)
    for word, wanted in (
        (zero, [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]),
        (ones, [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]),
    ):
        assert [value % 2**64 for value in philox.words([word] * 4, [word] * 2).tolist()] == wanted


@pytest.mark.parametrize("purpose", [INITIAL, step(0), step(999), DECODER_TOKENS])
@pytest.mark.parametrize(("frames", "channels", "start"), [(50, 256, 0), (7, 3, 5), (9, 768, 2**33), (3, 6, 1)])
def test_normals_are_those_of_the_contract(purpose: NoiseStream, frames: int, channels: int, start: int) -> None:
    for seed in (0, 1234, SEED_MAX):
        wanted = noise(seed, purpose, frames, channels, start=start)
        found = _drawn([seed], [purpose.index], purpose.stream, frames, channels, start)
        assert found.shape == (1, 1, frames, channels) and found.dtype == np.float32
        np.testing.assert_array_equal(found[0, 0], wanted)


def test_a_whole_run_is_drawn_at_once() -> None:
    """Every step of every item; a million values, so that a last bit that differs somewhere is met."""
    found = _drawn([3, 8], [0, 1, 5, 6], 1, 500, 256)
    for k, index in enumerate((0, 1, 5, 6)):
        for row, seed in enumerate((3, 8)):
            np.testing.assert_array_equal(found[k, row], noise(seed, step(index), 500, 256))


def test_drawing_copies_nothing_after_the_first_time() -> None:
    """Constants are kept on the device; one draw of a whole run is about 250 kernels, of any length."""
    seeds, index = torch.tensor([5]), torch.arange(7)[:, None]
    philox.noise(seeds, index, 1, 4, 256)
    with Operations() as seen:
        philox.noise(seeds, index, 1, 40, 256)
    assert seen.waits == 0 and seen.met["aten._to_copy.default"] == 2  # to double and to float32, on the device
    assert 200 < seen.kernels < 300
