"""Noise on the device: the bits of ``common/generation/noise.py``, without a step back to the host."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sa3_mlx.common.generation.noise import DECODER_TOKENS, INITIAL, SEED_MAX, NoiseStream, batch_noise, noise, step
from sa3_torch import philox
from tests.cuda.operations import Operations


def _drawn(seeds: list[int], indices: list[int], stream: int, frames: int, channels: int, start: int = 0) -> np.ndarray:
    """(indices, seeds, frames, channels), in one go."""
    index = torch.tensor(indices)[:, None]
    return philox.noise(
        torch.tensor(seeds), index, torch.full_like(index, stream), frames, channels, start=start
    ).numpy()


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


def test_drawing_takes_the_same_few_kernels_for_any_run() -> None:
    """One go for the start and seven steps; no copy to the device is waited for."""
    for frames, items in ((4, 1), (40, 3)):
        drawn = philox.DeviceNoise(seeds=[5] * items, device=torch.device("meta"), frames=frames, channels=256, steps=7)
        with Operations() as seen:
            assert drawn.batch(INITIAL).shape == drawn.batch(step(6)).shape == (items, frames, 256)
        assert seen.waits == 0 and seen.copies > 0
        assert 200 < seen.kernels < 300


def test_noise_of_a_run_is_that_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a run has more steps than are drawn together, and where noise of one item is drawn in parts."""
    monkeypatch.setattr(philox, "_TOGETHER", 3)
    monkeypatch.setattr(philox, "_PART", 4)
    drawn = philox.DeviceNoise(seeds=[5, 6], device=torch.device("cpu"), frames=9, channels=16, steps=7)
    for purpose in (INITIAL, *map(step, range(7)), step(0)):
        np.testing.assert_array_equal(drawn.batch(purpose).numpy(), batch_noise([5, 6], purpose, 9, 16))
    wanted = noise(6, DECODER_TOKENS, 9, 20, start=3)
    np.testing.assert_array_equal(drawn(1, DECODER_TOKENS, 9, 20, 3).numpy(), wanted)
