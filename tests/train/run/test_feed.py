"""Batches that are read ahead: the same ones, each once, and errors where they belong."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_torch.train.run.feed import BatchFeed
from sa3_torch.train.run.parallel import BatchSlice

PARTS = BatchSlice().micro_batches(2)


class Reader:
    """Count what is read, and by which thread."""

    def __init__(self) -> None:
        self.read: list[tuple[int, int]] = []
        self.threads: set[int] = set()

    def __call__(self, step: int, part: BatchSlice) -> str:
        self.read.append((step, part.rank))
        self.threads.add(threading.get_ident())
        return f"{step}.{part.rank}"


def test_each_slice_is_read_once_and_ahead_of_its_turn() -> None:
    reader = Reader()
    feed = BatchFeed(reader)
    feed.start(PARTS)
    for step in range(3):
        for part in (*PARTS, *PARTS):  # once to prepare, once for the losses
            assert feed.get(step, part) == f"{step}.{part.rank}"
    feed.stop()
    assert reader.read == [(step, rank) for step in range(len(reader.read) // 2) for rank in range(2)]
    assert len(reader.read) >= 6 and threading.get_ident() not in reader.threads


def test_only_every_so_many_steps_are_read() -> None:
    reader = Reader()
    feed = BatchFeed(reader, every=4)
    feed.start(PARTS[:1])
    for step in (0, 4, 8):
        feed.get(step, PARTS[0])
    feed.stop()
    assert [step for step, _ in reader.read] == [4 * place for place in range(len(reader.read))]


def test_without_a_start_nothing_is_read_ahead() -> None:
    reader = Reader()
    feed = BatchFeed(reader)
    assert feed.get(5, PARTS[1]) == feed.get(5, PARTS[1]) == "5.1"
    assert reader.read == [(5, 1)] and reader.threads == {threading.get_ident()}


def test_an_error_is_raised_where_its_batch_is_asked_for() -> None:
    def read(step: int, part: BatchSlice) -> int:
        if step == 1:
            raise ValueError("no such shard")
        return step + part.rank

    feed = BatchFeed(read)
    feed.start(PARTS[:1])
    assert feed.get(0, PARTS[0]) == 0
    with pytest.raises(ValueError, match="no such shard"):
        feed.get(1, PARTS[0])
    feed.stop()
