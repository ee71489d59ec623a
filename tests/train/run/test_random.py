"""Random numbers of the items of a batch: by counter, the same for any rows of it that are asked for."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_torch.train.run.random import Purpose, item_noise, item_uniforms, philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    """The known answers of its authors, of numbers and of tensors, whose products overflow."""
    assert philox(counter, key) == words
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox(tensors, key)) == words  # type: ignore[arg-type]


def draw(rows: slice, seed: int = 3, purpose: Purpose = Purpose.TRAINING_NOISE, step: int = 7) -> torch.Tensor:
    return item_noise(rows, (5, 3), seed, purpose, step)


def test_items_have_the_same_numbers_in_every_part_of_a_batch() -> None:
    whole = draw(slice(0, 8))
    for rows in (slice(0, 1), slice(2, 5), slice(7, 8), slice(3, 3)):
        assert torch.equal(draw(rows), whole[rows])
    u = item_uniforms(slice(0, 8), 6, 3, Purpose.FLOW_DRAWS, 7)
    assert torch.equal(item_uniforms(slice(4, 6), 6, 3, Purpose.FLOW_DRAWS, 7), u[4:6])
    assert float(u.min()) >= 0 and float(u.max()) < 1


def test_large_items_are_those_of_small_parts() -> None:
    """More numbers than are worked on at once."""
    shape = (1 << 9, 1 << 9)
    whole = item_noise(slice(0, 3), shape, 0, Purpose.TRAINING_NOISE, 0)
    assert torch.equal(item_noise(slice(2, 3), shape, 0, Purpose.TRAINING_NOISE, 0)[0], whole[2])


def test_seed_purpose_step_and_item_all_matter() -> None:
    rows = slice(0, 4)
    drawn = [
        draw(rows),
        draw(rows, seed=4),
        draw(rows, seed=3 + (1 << 33)),
        draw(rows, purpose=Purpose.CODER_NOISE),
        draw(rows, step=8),
        draw(rows, step=7 + (1 << 32)),
        draw(slice(4, 8)),
    ]
    values = torch.cat([each.flatten() for each in drawn])
    assert len(values.unique()) == len(values)


def test_noise_is_standard_normal_and_independent_between_items() -> None:
    stats = pytest.importorskip("scipy.stats")
    x = item_noise(slice(0, 50), (400,), 1, Purpose.TRAINING_NOISE, 2).double()
    assert x.dtype == torch.float64 and stats.kstest(x.flatten().numpy(), "norm").statistic < 1.36 / (50 * 400) ** 0.5
    assert float((torch.corrcoef(x) - torch.eye(50)).abs().max()) < 0.25
