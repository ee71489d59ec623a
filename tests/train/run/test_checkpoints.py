"""Checkpoints of runs hold no pickle; those of earlier versions, which do, are read after an explicit word."""

from __future__ import annotations

import errno
import json
import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from threading import Event, Semaphore, Thread

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
import torch.distributed.checkpoint as dcp

from sa3_mlx.common.files.atomic import locked
from sa3_torch.train.run import parallel
from sa3_torch.train.run.checkpoint_index import INDEX_FILE, PICKLED
from sa3_torch.train.run.checkpoints import Checkpoints, RunProgress, _checksums, copied
from sa3_torch.train.run.parallel import BatchSlice

PROGRESS = {"updates": {"a": 1}, "bad_steps": {"a": 0}, "precision": "fp32", "revision": None}


def save(folder: Path, step: int, value: float) -> Path:
    """Write a checkpoint; return its folder."""
    checkpoints = Checkpoints(folder, 0)
    checkpoints.save(tables(value), progress_of(step))
    checkpoints.wait()
    return checkpoints.path(step)


def progress_of(step: int) -> RunProgress:
    return RunProgress.from_dict(deepcopy({"step": step, **PROGRESS, "checksums": {}}))


def tables(value: float) -> dict[str, dict[str, torch.Tensor]]:
    """Make tensors of several types and shapes, one of them without a number."""
    return {
        "weights/a": {"layer.weight": torch.full((3, 2), value), "count": torch.tensor(int(value))},
        "ema": {"half": torch.full((4,), value, dtype=torch.bfloat16), "none": torch.zeros(0)},
    }


def write_as_before(folder: Path, step: int, value: float) -> Path:
    """Write a checkpoint as earlier versions did, with the library's own index."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    path.mkdir(parents=True)
    with warnings.catch_warnings(action="ignore"):
        dcp.save(tables(value), checkpoint_id=path, no_dist=True)
    (path / "progress.json").write_text(json.dumps({"step": step, **PROGRESS, "checksums": _checksums(path)}))
    return path


class Boom:
    """Leave a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.mkdir, (self.mark,)


def test_a_checkpoint_comes_back_and_holds_no_pickle(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, 2.0)
    assert not (folder / PICKLED).exists() and (folder / INDEX_FILE).is_file()
    found = tables(0.0)
    progress, remarks = Checkpoints(tmp_path, 0).load(found)
    assert progress is not None and not remarks
    assert progress.to_dict() == {"step": 3, **PROGRESS, "checksums": _checksums(folder)}
    for table, expected in tables(2.0).items():
        for name, tensor in expected.items():
            assert torch.equal(found[table][name], tensor)


def test_a_pickle_beside_the_index_is_not_read(tmp_path: Path) -> None:
    (save(tmp_path, 3, 2.0) / PICKLED).write_bytes(pickle.dumps(Boom(tmp_path / "mark")))
    progress, _ = Checkpoints(tmp_path, 0).load(tables(0.0))
    assert progress is not None and not (tmp_path / "mark").exists()


def test_a_checkpoint_of_an_earlier_version_needs_a_word(tmp_path: Path) -> None:
    path = write_as_before(tmp_path, 4, 5.0)
    with pytest.raises(ValueError, match="can run code when it is read; add --trust-run"):
        Checkpoints(tmp_path, 0).load(tables(0.0))
    found = tables(0.0)
    progress, _ = Checkpoints(tmp_path, 0, trusted=True).load(found)
    assert progress is not None and progress.step == 4 and progress.updates == {"a": 1}
    assert float(found["weights/a"]["layer.weight"][0, 0]) == 5.0
    (path / PICKLED).write_bytes(pickle.dumps(Boom(tmp_path / "mark")))
    (path / "progress.json").write_text(json.dumps({"step": 4, **PROGRESS, "checksums": _checksums(path)}))
    with pytest.raises(ValueError, match="--trust-run"):
        Checkpoints(tmp_path, 0).load(tables(0.0))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(format="other"),
        lambda index: index.pop("stored"),
        lambda index: index["stored"][0].update(file="../../elsewhere"),
        lambda index: index["tensors"]["ema.half"].update(dtype="load"),
        lambda index: index["tensors"]["ema.half"].update(size=[10**9]),
        lambda index: index["tensors"]["ema.half"].update(size=[-1]),
        lambda index: index["tensors"]["ema.half"].update(chunks=5),
        lambda index: index["tensors"].update({"ema.half": []}),
        lambda index: index.update(tensors=[1]),
        lambda index: index["stored"].append({}),
        lambda index: index["stored"][0].update(start=10**30),
        lambda index: index["paths"].update({"ema.half": 5}),
    ],
)
def test_a_damaged_index_is_left_out(change: object, tmp_path: Path) -> None:
    """A checkpoint whose checksums were made to fit is refused by what it says."""
    folder = save(tmp_path, 3, 2.0)
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)  # type: ignore[operator]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    progress = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps({**progress, "checksums": _checksums(folder)}))
    with pytest.raises(ValueError, match=r"damaged \((.*index\.json|its tensors are not those of this run)") as caught:
        Checkpoints(tmp_path, 0).load(tables(0.0))
    assert "\n" not in str(caught.value)


def test_a_folder_is_locked_for_one_process(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OSError, match="another process works in this folder"), locked(tmp_path):
        pass


@pytest.mark.parametrize(
    "change",
    [
        lambda progress: progress.pop("updates"),
        lambda progress: progress.update(bad_steps=[1] * 10_000),
        lambda progress: progress.update(bad_steps={"b": 0}),
        lambda progress: progress.update(updates={"b": 1}, bad_steps={"b": 0}),
        lambda progress: progress.update(updates={"a": "many"}),
        lambda progress: progress.update(step=4),
        lambda progress: progress.update(precision="fp8"),
        lambda progress: progress.update(colour=1),
    ],
)
def test_progress_that_is_not_of_a_run_is_damage(tmp_path: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = save(tmp_path, 3, 2.0) / "progress.json"
    progress = json.loads(path.read_text())
    change(progress)
    path.write_text(json.dumps(progress))
    with pytest.raises(ValueError, match=r"progress\.json") as caught:
        Checkpoints(tmp_path, 0).load(tables(0.0))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("checksums", [[5], [[]], "index.json", 3, None, {}, {"index.json": -1}, {"index.json": "x"}])
def test_checksums_that_cannot_be_are_damage(tmp_path: Path, checksums: object) -> None:
    """Of any shape, and those that leave a file of the checkpoint out."""
    path = save(tmp_path, 3, 2.0) / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"checksums": checksums}))
    with pytest.raises(ValueError, match=r"step-00000003: damaged \(.*(checksums|changed)") as caught:
        Checkpoints(tmp_path, 0).load(tables(0.0))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_folders_that_are_no_checkpoints_are_not_looked_at(tmp_path: Path) -> None:
    save(tmp_path, 3, 2.0)
    for name in ("step-last", "step-4", "step-", "step-0000000²"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "progress.json").write_text("{}")
    assert Checkpoints(tmp_path, 0).steps() == [3]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file\nmore"),
        OSError(errno.ENOSPC, "No space left on device"),
        dcp.api.CheckpointException("save", {0: (OSError(errno.ENOSPC, "No space left on device"), None)}),
    ],
)
def test_a_disk_that_refuses_is_one_line(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 3, 2.0)

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(dcp, "save", refuse)
    with pytest.raises(OSError, match=r"step-00000004: could not be written") as found:
        save(tmp_path, 4, 3.0)
    assert "\n" not in str(found.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


class Writer:
    """Stand for the library: it begins to write when it is let, and counts how many do at a time."""

    def __init__(self) -> None:
        self.save, self.let, self.begun = dcp.save, Semaphore(0), Semaphore(0)
        self.now = self.most = 0

    def __call__(self, *arguments: object, **named: object) -> object:
        self.now += 1
        self.most = max(self.most, self.now)
        self.begun.release()
        assert self.let.acquire(timeout=60)
        self.now -= 1
        return self.save(*arguments, **named)  # type: ignore[arg-type]


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    writer = Writer()
    monkeypatch.setattr(dcp, "save", writer)
    return writer


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path: Path, writer: Writer) -> None:
    checkpoints, live, progress = Checkpoints(tmp_path, 0), tables(2.0), progress_of(3)
    checkpoints.save(live, progress)
    assert writer.begun.acquire(timeout=60)
    for table in live.values():
        for tensor in table.values():
            tensor.zero_()
    progress.updates["a"], progress.bad_steps["a"] = 8, 9  # as the loop counts on
    assert checkpoints.steps() == [] and not checkpoints.failed
    writer.let.release()
    checkpoints.wait()
    found = tables(0.0)
    written, _ = Checkpoints(tmp_path, 0).load(found)
    assert written is not None and (written.updates, written.bad_steps) == ({"a": 1}, {"a": 0})
    for table, expected in tables(2.0).items():
        for name, tensor in expected.items():
            assert torch.equal(found[table][name], tensor)


def test_one_is_written_at_a_time(tmp_path: Path, writer: Writer) -> None:
    checkpoints, done = Checkpoints(tmp_path, 0), Event()

    def save_two() -> None:
        for step in (1, 2):
            checkpoints.save(tables(step), progress_of(step))
        done.set()

    Thread(target=save_two, daemon=True).start()
    assert writer.begun.acquire(timeout=60) and not done.wait(0.1)  # the second one waits for the first
    writer.let.release()
    assert done.wait(60) and checkpoints.steps() == [1]
    writer.let.release()
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2] and writer.most == 1


def test_a_failed_writing_is_told_once_and_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, 0)
    with monkeypatch.context() as patched:
        patched.setattr(dcp, "save", refuse_to_write)
        checkpoints.save(tables(1.0), progress_of(1))
        with pytest.raises(OSError, match="step-00000001: could not be written"):
            checkpoints.save(tables(2.0), progress_of(2))
    assert checkpoints.steps() == [] and not list((tmp_path / "checkpoints").iterdir())
    checkpoints.save(tables(2.0), progress_of(2))
    checkpoints.wait()
    assert checkpoints.steps() == [2]


def refuse_to_write(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("world", [1, 2, 5])
def test_processes_share_what_all_of_them_have(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is copied by one of them, and none copies much more than its part."""
    tensors = {"a": {f"{size}": torch.zeros(size) for size in range(1, 60)}, "b": {"count": torch.tensor(1)}}
    names, loads = list[tuple[str, str]](), list[int]()
    for rank in range(world):
        own = BatchSlice(rank=rank, world=world)
        monkeypatch.setattr(parallel, "own_slice", lambda own=own: own)
        copies = copied(tensors)
        assert copies.keys() == tensors.keys()
        names += [(table, name) for table, part in copies.items() for name in part]
        loads.append(sum(copy.own.nbytes for part in copies.values() for copy in part.values()))
    assert sorted(names) == sorted((table, name) for table, part in tensors.items() for name in part)
    assert max(loads) - min(loads) <= 4 * 60
