"""``sa3 tune``, what it keeps, and what that changes: doctor, sounds and their tags, reruns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sa3_mlx.cli.models.tune import command
from sa3_mlx.cli.models.tune.bench import FreshBench, PipelineBench, Subject
from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.tuning import table
from sa3_mlx.common.tuning.choice import Choice, Work
from sa3_mlx.common.tuning.table import Tuning, key_of, read_table, save
from tests.support.command import SMALL, Run, ok, read, sa3

pytest.importorskip("mlx.core")
CLIP = ("generate", "rain", "--seconds", "0.4", "--steps", "2", "--seed", "1", "--backend", "mlx")
BITS = {"chunks": "half"}  # a way by which the bits of this model may differ, and no compiler is needed


@pytest.fixture
def home(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(table, "_told", set())
    return own_home


@pytest.fixture
def run(home: Path, capfd: pytest.CaptureFixture[str]) -> Run:  # noqa: ARG001
    """The command, in a home of its own."""
    return lambda *args: sa3(capfd, *args)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves of the usual chunks seem to be fast, everything else to take a second: no test looks at real time."""

    def seconds(bench: PipelineBench, works: Sequence[Work]) -> float:
        return len(works) * (0.5 if bench.pipeline.choices.way("chunks") == "half" else 1.0)

    monkeypatch.setattr(PipelineBench, "seconds", seconds)


def _save(**others: object) -> Tuning:
    key = key_of("mlx", "cpu", SMALL)
    usual = {"key": key.to_dict(), "model": "little", "date": "2026-01-01", "sa3": "0.1", "environment": {}}
    tuning = Tuning.from_dict({**usual, "ways": BITS, "before": 2.0, "after": 1.0, **others})
    save(tuning)
    return tuning


@pytest.mark.usefixtures("clock")
def test_tune_keeps_the_fastest_right_way(run: Run, home: Path) -> None:
    result = ok(run("tune", "little", "--backend", "mlx", "--seconds", "3", "--only", "chunks", "--only", "launches"))
    lines = result.out.splitlines()
    assert any(line.startswith("chunks ") and line.endswith("kept") for line in lines), result.out
    assert any("2.00 times as fast" in line for line in lines)
    (tuning,) = read_table()
    assert tuning.ways == BITS and tuning.key == key_of("mlx", "cpu", SMALL)
    assert (home / "tuning.json").is_file()
    assert "chunks half (little on mlx" in ok(run("doctor")).out


def test_tune_says_that_nothing_is_faster(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PipelineBench, "seconds", lambda _bench, works: float(len(works)))
    result = ok(run("tune", "little", "--backend", "mlx", "--seconds", "1", "--only", "launches"))
    assert "the usual ways are the fastest (little on mlx" in result.out
    assert read_table()[0].ways == {}


def test_ways_are_timed_as_often_as_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once more at first, which does not count: two ways, then the clip."""
    timed: list[Sequence[Work]] = []
    monkeypatch.setattr(PipelineBench, "seconds", lambda _bench, works: float(timed.append(works) or len(works)))
    for rounds in ((), ("--rounds", "3")):
        timed.clear()
        ok(run("tune", "little", "--backend", "mlx", "--seconds", "1", "--only", "launches", *rounds))
        assert len(timed) == 3 * (1 + (int(rounds[1]) if rounds else command._MOST))
    refused = run("tune", "little", "--rounds", "0")
    assert refused.code == 2 and "--rounds" in refused.err


def test_dry_run_lists_and_writes_nothing(run: Run) -> None:
    result = ok(run("tune", "little", "--backend", "mlx", "--dry-run"))
    assert "chunks " in result.out and "compiled_step " in result.out and "half" in result.out
    assert not read_table()


def test_torch_has_its_own_places(run: Run) -> None:
    pytest.importorskip("torch")
    result = ok(run("tune", "little", "--backend", "torch", "--dry-run"))
    assert "attention " in result.out
    assert "only with --allow compiled_step=compiled" in result.out


@pytest.mark.usefixtures("clock")
def test_torch_is_tuned_too(run: Run) -> None:
    pytest.importorskip("torch")
    ok(run("tune", "little", "--backend", "torch", "--seconds", "3"))
    assert [(entry.key.twin, entry.ways) for entry in read_table()] == [("torch", BITS)]


def test_forgetting(run: Run, home: Path) -> None:
    _save()
    assert "1 tuning(s) removed" in ok(run("tune", "--forget")).out
    assert not (home / "tuning.json").exists() and "nothing yet" in ok(run("doctor")).out


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--allow", "tf32"), "expected PLACE=WAY"),
        (("--allow", "sums=fast"), "no place is called 'sums'"),
        (("--only", "sums"), "no place is called 'sums'"),
        (("--allow", "chunks=none"), "chunks is 'none': allowed are usual"),
        (("--seconds", "4000"), "little makes at most"),
        (("--forget", "--dry-run"), "give one of them"),
    ],
)
def test_refusals(run: Run, args: tuple[str, ...], line: str) -> None:
    result = run("tune", "little", "--backend", "mlx", *args)
    assert result.code == 2 and line in result.err and len(result.err.splitlines()) == 1


def test_doctor_counts_what_belongs_to_another_version(run: Run) -> None:
    other = key_of("mlx", "cpu", SMALL).to_dict() | {"version": "0.1"}
    _save(key=other)
    assert "1 of other machines or versions, not used" in ok(run("doctor")).out


def test_tags_say_in_which_ways_a_sound_was_made(run: Run) -> None:
    ok(run(*CLIP, "--out", "usual.wav"))
    assert read_provenance(Path("usual.wav")).runtime.ways == {}
    assert "ways" not in json.dumps(read_provenance(Path("usual.wav")).to_dict()), "tags of before stay what they were"
    _save(ways={**BITS, "launches": "ahead"})
    ok(run(*CLIP, "--out", "tuned.wav"))
    made = read_provenance(Path("tuned.wav"))
    assert made.runtime.ways == BITS, "ways of the same bits are not worth a word"
    assert made.request.chunk_frames == 64
    np.testing.assert_allclose(read("tuned.wav"), read("usual.wav"), atol=1e-4)


def test_rerun_goes_the_recorded_ways_whatever_is_tuned_here(run: Run) -> None:
    ok(run(*CLIP, "--out", "usual.wav"))
    _save()
    ok(run(*CLIP, "--out", "tuned.wav"))
    again = ok(run("rerun", "usual.wav"))
    assert "byte for byte" in again.out and read_provenance(Path("usual-rerun.wav")).runtime.ways == {}
    ok(run("tune", "--forget"))
    again = ok(run("rerun", "tuned.wav"))
    assert "byte for byte" in again.out and read_provenance(Path("tuned-rerun.wav")).runtime.ways == BITS


def test_a_broken_table_does_not_stop_a_sound(run: Run, home: Path) -> None:
    (home / "tuning.json").write_text("{")
    result = ok(run(*CLIP, "--out", "a.wav"))
    assert [line for line in result.err.splitlines() if "tuning.json is not used" in line]


@pytest.mark.usefixtures("home")
def test_python_goes_the_tuned_ways_and_says_so() -> None:
    from sa3_mlx import Item, Pipeline, Request

    _save()
    pipeline = Pipeline.load("little")
    sizes: list[str] = []
    decode = pipeline._decode

    def spy(*arrays: np.ndarray) -> object:
        sizes.append(pipeline.choices.way("chunks"))
        return decode(*arrays)

    pipeline._decode = spy  # type: ignore[method-assign, assignment]
    generation = pipeline.generate(Request(items=(Item(prompt="rain", seconds=0.4, seed=1),)))
    assert set(sizes) == {"half"} and generation.ways == BITS
    assert pipeline.choices.way("chunks") == "usual", "other pipelines go their own ways"
    pipeline.ways = {}
    assert pipeline.generate(generation.request).ways == {}


def test_work_is_the_same_every_time(home: Path) -> None:
    subject = Subject(twin="mlx", device="auto", folder=str(home / "models" / "little"), seconds=0.5)
    ticks = iter(range(1000))
    bench = PipelineBench(subject, clock=lambda: float(next(ticks)))
    works: tuple[Work, ...] = ("step", "decode", "encode")
    first, second = bench.results(works), bench.results(works)
    assert all(np.array_equal(*pair) for pair in zip(first, second, strict=True))
    steps = SMALL.usual_sampling.steps
    assert bench.seconds(["step"]) == pytest.approx(steps / 2), "every run takes a tick: two steps of all"
    assert bench.seconds(["decode"]) == 1


def test_a_process_of_its_own_gives_the_same(home: Path) -> None:
    subject = Subject(twin="mlx", device="auto", folder=str(home / "models" / "little"), seconds=0.3)
    bench = PipelineBench(subject)
    fresh = bench.fresh({"chunks": "usual"}, {"MLX_MAX_OPS_PER_BUFFER": "200"})
    (found,), (wanted,) = fresh.results(["decode"]), bench.results(["decode"])
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(RuntimeError, match="no place is called 'nothing'"):
        fresh.fresh({"nothing": "plain"}, {}).seconds(["decode"])
    assert isinstance(fresh, FreshBench)


def test_a_busy_machine_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for load, cpu_time, told in ((900.0, False, True), (900.0, True, False), (0.0, False, False)):
        monkeypatch.setattr(command.os, "getloadavg", lambda load=load: (load, load, load))
        args = ("--cpu-time",) if cpu_time else ()
        result = ok(run("tune", "little", "--backend", "mlx", "--dry-run", *args))
        assert ("other programs are running here" in result.err) == told
    with pytest.raises(ValueError, match="says nothing about a GPU"):
        command._check_clock("gpu", cpu_time=True)


def test_an_autoencoder_alone_is_tuned_by_what_it_does(run: Run) -> None:
    result = ok(run("tune", "only-autoencoder", "--backend", "mlx", "--dry-run"))
    assert "chunks " in result.out and "compiled_step" not in result.out


def test_chunks_that_need_too_much_memory_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from sa3_mlx.choices import CHOICES

    place = CHOICES.place("chunks")
    assert command._impossible(place, "double", config=SMALL, seconds=3, metal=None) is None
    assert "the usual ones" in (command._impossible(place, "double", config=SMALL, seconds=0.5, metal=None) or "")
    monkeypatch.setattr(command.machine, "memory", lambda: 10**6)
    assert "it may take" in (command._impossible(place, "double", config=SMALL, seconds=3, metal=None) or "")
    assert command._impossible(place, "long", config=SMALL, seconds=3, metal=None) is None


def test_settings_of_a_process_matter_to_reruns_where_bits_may_differ(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sa3_mlx.choices import CHOICES

    def settle(name: str, way: str, asked: dict[str, float]) -> None:
        environment = {"off": {"MLX_TEST": "0"}, "on": {"MLX_TEST": "1"}}
        place = Choice(
            name=name,
            about="",
            ways=("off", "on"),
            usual={"cpu": "off"},
            work=("decode",),
            asked=asked,
            environment=environment,
        )
        monkeypatch.setitem(CHOICES.places, name, place)
        monkeypatch.setitem(CHOICES.usual, name, way)

    monkeypatch.setattr(CHOICES, "_ways", CHOICES.now())  # which forgets these places with them
    ok(run(*CLIP, "--out", "usual.wav"))
    settle("buffers", "on", {})
    assert "byte for byte" in ok(run("rerun", "usual.wav")).out, "the same bits either way"
    settle("tf32", "on", {"on": 1e-2})
    refused = run("rerun", "usual.wav", "--force", "--out", "forced.wav")
    assert refused.code == 0 and read_provenance(Path("forced.wav")).runtime.ways == {"tf32": "on"}
    refused = run("rerun", "usual.wav", "--out", "other.wav")
    assert refused.code == 2 and "tf32 is on, the file was made with off" in refused.err, refused
    assert "begin with MLX_TEST=0" in refused.err
    assert run("rerun", "forced.wav").code == 0
    monkeypatch.setitem(CHOICES.usual, "tf32", "off")
    refused = run("rerun", "forced.wav", "--out", "other.wav")
    assert refused.code == 2 and "tf32 is off, the file was made with on" in refused.err
