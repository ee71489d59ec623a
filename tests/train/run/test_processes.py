"""Several processes train as one: over gloo, sharded or not, with micro-batches, and when one of them stops or fails.

The quick cases have every kind of unit, of exchange and of turns once; the slow ones are all stages.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from safetensors.torch import load_file

from sa3_torch.train.run.loop import Trainer
from tests.support.run_stage import command, environment, flat, run_until
from tests.support.stages import STAGES, trainer_of

pytestmark = pytest.mark.usefixtures("no_pictures")

STEPS = 3
ONLY_FSDP = ("distill", "text")  # under DDP they are as the stages that they vary
LARGER = {"quantize": "train.batch=4"}  # where a batch is cut into four
WHOLE = {"complete": "semantics.critic_weight=0.0"}  # the critic looks at the whole batch, and is refused in parts
NARROW = ("autoencoder", "posttrain")  # in bf16, too


@dataclass(frozen=True)
class Case:
    """Say how a stage is run by several processes, or in micro-batches by one."""

    name: str
    wrapper: str
    processes: int = 2
    accumulate: int = 1
    recomputed: bool = False
    wide: bool = False  # begun by one process

    def __str__(self) -> str:
        kind = f"{self.name}-{self.wrapper}-{self.processes}x{self.accumulate}"
        return kind + "-recomputed" * self.recomputed + "-wide" * self.wide

    @property
    def alike(self) -> tuple[str, ...]:
        """Settings of both runs."""
        parts = self.processes * self.accumulate
        larger = [LARGER[self.name]] if self.name in LARGER and parts > 2 else []
        whole = [WHOLE[self.name]] if self.name in WHOLE and self.accumulate > 1 else []
        return (f"train.steps={STEPS}", *larger, *whole)

    @property
    def alone(self) -> str:
        """Name the folder of the same run by one process."""
        return "-".join(["one", self.name, *self.alike[1:]])

    def job(self) -> str:
        """Return what ``run_stage.py`` is asked for."""
        how = (f"train.parallel={self.wrapper}", f"train.accumulate={self.accumulate}")
        return ":".join([str(self), self.name, *self.alike, *how, *["train.checkpoint_blocks=true"] * self.recomputed])


QUICK = (
    Case("complete", "fsdp"),
    Case("pretrain", "ddp"),
    Case("text", "fsdp"),
    Case("clap", "ddp"),
    Case("muon", "ddp"),
    Case("posttrain", "fsdp"),
    Case("game", "ddp"),
    Case("game", "fsdp", wide=True),
    Case("pretrain", "fsdp", recomputed=True),
)
PAIRS = [Case(name, kind) for name in STAGES for kind in ("ddp", "fsdp") if kind == "fsdp" or name not in ONLY_FSDP]
FOUR = [
    *(Case(name, "ddp", processes=4) for name in STAGES),
    *(Case(name, "ddp", accumulate=2) for name in STAGES if name != "game"),  # whose average follows every part
    *(Case(name, "ddp", processes=1, accumulate=4) for name in STAGES if name != "game"),
    Case("posttrain", "fsdp", processes=4),
    Case("complete", "fsdp", processes=4),
    Case("autoencoder", "fsdp", wide=True),
    Case("autoencoder", "fsdp", recomputed=True),
]
CASES = [
    *(pytest.param(case, id=str(case)) for case in QUICK),
    *(pytest.param(case, id=str(case), marks=pytest.mark.slow) for case in (*PAIRS, *FOUR) if case not in QUICK),
]
MEASURED = [entry for entry in CASES if str(entry.id).endswith("2x1")]  # type: ignore[union-attr]
BF16 = [pytest.param(name, marks=() if name == "posttrain" else pytest.mark.slow) for name in NARROW]


class Runs:
    """Run what the chosen tests ask for: each stage by one process, and by groups of them, once.

    Not in this process, as what ran before may change how sums are blocked. On as many threads as each of several
    processes has: more change the last bits of FFTs, and in bins of any quietness the log-magnitude has a gradient of
    the same size, whose direction is their phase: with two threads it is another one by 5e-4 of its length, on
    bit-identical audio.
    """

    def __init__(self, out: Path, workspace: Path, cases: list[Case], narrow: list[str]) -> None:
        self.out, self.workspace, self.cases, self.narrow = out, workspace, cases, narrow
        self._done = set[int]()

    def alone(self, case: Case) -> Path:
        """Return the folder of the run by one process."""
        self._group(1)
        return self.out / case.alone

    def together(self, case: Case) -> Path:
        """Return the folder of the run as the case says."""
        self._group(case.processes)
        return self.out / str(case)

    def of_two(self) -> Path:
        """Return the folder of the runs of two processes, the last of which was stopped by a signal and failed."""
        self._group(2)
        return self.out

    def _group(self, processes: int) -> None:
        if processes in self._done:
            return
        self._done.add(processes)
        jobs = [case.job() for case in self.cases if case.processes == processes]
        for case in self.cases:
            if case.wide and case.processes == processes:
                run_until(case.name, self.workspace, self.out / str(case), 1, *case.alike)
        if processes == 1:
            alone = {case.alone: ":".join([case.alone, case.name, *case.alike]) for case in self.cases}
            words = command(self.workspace, self.out, *alone.values(), *jobs)
            subprocess.run(words, env=environment(), stderr=subprocess.DEVNULL, check=True)
        elif processes == 2:
            bf16 = [
                f"bf16-{kind}-{name}:{name}:train.steps=2:train.precision=bf16:train.parallel={kind}"
                for name in self.narrow
                for kind in ("ddp", "fsdp")
            ]
            self._stopped([*jobs, *bf16, "stopped:slow:train.steps=1000000", "crashed:crash:train.steps=1000000"])
        else:
            for process in self._started(processes, jobs):
                assert process.wait(timeout=1200) == 0, self._errors(processes)

    def _started(self, processes: int, jobs: list[str]) -> list[subprocess.Popen[bytes]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        return [
            subprocess.Popen(
                command(self.workspace, self.out, *jobs),
                stderr=(self.out / f"errors{rank}-{processes}.txt").open("w"),
                env={**environment(), **address, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(processes)
        ]

    def _stopped(self, jobs: list[str]) -> None:
        """Let a signal to the second process stop the last run but one; in the last one that process fails."""
        processes, log = self._started(2, jobs), self.out / "stopped" / "log.jsonl"
        while all(process.poll() is None for process in processes) and not (
            log.is_file() and '"step": 10' in log.read_text()
        ):
            time.sleep(0.01)
        processes[1].terminate()
        codes = [process.wait(timeout=600) for process in processes]
        assert 0 not in codes and (self.out / "crashed").is_dir(), self._errors(2)

    def _errors(self, processes: int) -> list[str]:
        return [(self.out / f"errors{rank}-{processes}.txt").read_text()[-3000:] for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    chosen = [item.callspec.params for item in request.session.items if item.path == request.path and _varied(item)]
    cases = dict.fromkeys(values["case"] for values in chosen if "case" in values)
    narrow = dict.fromkeys(values["narrow"] for values in chosen if "narrow" in values)
    return Runs(tmp_path_factory.mktemp("runs"), workspace, [*cases], [*narrow])


def _varied(item: pytest.Item) -> bool:
    return hasattr(item, "callspec")


def read(case: Case, workspace: Path, folder: Path) -> Trainer:
    """Read a run back by one process."""
    return trainer_of(STAGES[case.name](workspace, *case.alike), folder)


@pytest.mark.parametrize("case", CASES)
def test_processes_and_micro_batches_equal_one(case: Case, workspace: Path, runs: Runs) -> None:
    """Relative L2 after three steps. Measured: weights and averages 5e-7, moments of Adam 1.2e-5 (autoencoder) and 4e-6
    (others). Gradients of equal weights agree to 2e-7; where weights differ by 1e-7, the log-magnitude's differ by 5e-5
    and all others by 3e-5 at most, which three steps begin to show."""
    one, more = read(case, workspace, runs.alone(case)), read(case, workspace, runs.together(case))
    assert one.step == more.step == STEPS
    for table in one._tensors():
        a, b = flat(one._tensors(), table), flat(more._tensors(), table)
        distance = float((a - b).norm() / a.norm())
        print(f"{case}: {table} {distance:.1e}")
        assert distance < (5e-5 if table.startswith("optimizer") else 1e-5), table


@pytest.mark.parametrize("narrow", BF16)
def test_both_wrappers_compute_the_same_in_bf16(narrow: str, workspace: Path, runs: Runs) -> None:
    """Moments of Adam after two steps. Measured: 1e-6 at most. Where units of FSDP2 were bf16, and so what blocks pass
    on, 6e-2; where autocast kept the weights that it had made, 0.6, as gradients were lost."""
    settings, folder = ("train.steps=2", "train.precision=bf16"), runs.of_two()
    ddp, fsdp = (
        trainer_of(STAGES[narrow](workspace, *settings), folder / f"bf16-{kind}-{narrow}")._tensors()
        for kind in ("ddp", "fsdp")
    )
    for table in (table for table in ddp if table.startswith("optimizer")):
        a, b = flat(ddp, table), flat(fsdp, table)
        assert float((a - b).norm() / a.norm()) < 1e-5, table


@pytest.mark.parametrize("case", MEASURED)
def test_processes_measure_what_one_measures(case: Case, runs: Runs) -> None:
    """Each has a share of the held-out items."""
    assert measures(runs.together(case)) == pytest.approx(measures(runs.alone(case)), rel=1e-3, abs=1e-4)


def measures(folder: Path) -> dict[str, float]:
    *_, last = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return {name: value for name, value in last.items() if name.startswith("validation/")}


@pytest.mark.parametrize("case", [Case("pretrain", "ddp"), Case("text", "fsdp")], ids=str)
def test_processes_export_what_one_exports(case: Case, runs: Runs) -> None:
    """Averages that processes have dealt out among them, and the text encoder, which they leave as it is. In fp16."""
    one, more = (load_file(f / "model" / "model.safetensors") for f in (runs.alone(case), runs.together(case)))
    assert one.keys() == more.keys()
    for key in one:
        torch.testing.assert_close(one[key], more[key], rtol=2e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize("case", MEASURED)
def test_running_statistics_are_equal_on_all_processes(case: Case, runs: Runs) -> None:
    first, second = (torch.load(runs.together(case) / f"rank{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_process_with_an_exception_ends_the_job(runs: Runs) -> None:
    assert "disk on fire" in (runs.of_two() / "errors1-2.txt").read_text()
    assert not (runs.of_two() / "crashed" / "rank0.pt").exists()


def test_a_signal_stops_all_processes_at_the_same_step_with_a_checkpoint(workspace: Path, runs: Runs) -> None:
    stopped = runs.of_two() / "stopped"
    resumed = trainer_of(STAGES["game"](workspace, "train.steps=1000000"), stopped)
    assert resumed.step >= 10
    assert sum(resumed.updates.values()) == resumed.step
    assert (stopped / "rank0.pt").is_file() and (stopped / "rank1.pt").is_file()
