"""What was tuned, in the home: found by its key, bounded, whole or not there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.tuning import machine, table
from sa3_mlx.common.tuning.choice import Choice, Choices
from sa3_mlx.common.tuning.table import Tuning, environment, find, find_ways, forget, key_of, read_table, save
from tests.support.tiny import TINY

CONFIG: ModelConfig = TINY["tiny-s"]
PLACE = Choice(name="sum", about="", ways=("plain", "fast"), usual={"cpu": "plain"}, work=("step",), tolerance=1e-5)
CHOICES = Choices("mlx", "cpu", (PLACE,))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(table, "_told", set())
    return tmp_path / "home"


def _tuning(**others: object) -> Tuning:
    usual = Tuning(
        key=key_of("mlx", "cpu", CONFIG),
        model="tiny-s",
        date="2026-01-01",
        sa3="0.1",
        ways={"sum": "fast"},
        environment={},
        before=2.0,
        after=1.5,
    )
    return replace(usual, **others)  # type: ignore[arg-type]


def test_what_was_saved_is_found_by_models_of_the_same_sizes() -> None:
    assert find_ways(CHOICES, "cpu", CONFIG) == {}
    save(_tuning())
    assert find_ways(CHOICES, "cpu", CONFIG) == {"sum": "fast"}
    assert find_ways(CHOICES, "cpu", replace(CONFIG, name="another name")) == {"sum": "fast"}
    assert find_ways(CHOICES, "gpu", CONFIG) == {}
    assert find_ways(CHOICES, "cpu", TINY["tiny-l"]) == {}
    assert find("torch", "cpu", CONFIG) is None


@pytest.mark.parametrize(
    ("name", "value"), [("framework", "99.0"), ("chip", "Z80"), ("cores", 4096), ("system", "CP/M 2.2")]
)
def test_another_version_or_machine_is_not_used(name: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    save(_tuning())
    assert read_table()[0].key.is_here
    monkeypatch.setattr(machine, name, lambda *_: value)
    assert find_ways(CHOICES, "cpu", CONFIG) == {} and not read_table()[0].key.is_here


def test_ways_that_this_version_does_not_have_are_not_used() -> None:
    save(_tuning(ways={"sum": "faster than light", "rest": "fast"}))
    assert find_ways(CHOICES, "cpu", CONFIG) == {}


def test_a_new_entry_replaces_the_one_of_its_key() -> None:
    save(_tuning())
    save(_tuning(key=key_of("torch", "cpu", CONFIG)))
    save(_tuning(ways={}))
    assert [entry.ways for entry in read_table()] == [{"sum": "fast"}, {}]


def test_forgetting_one_model_or_all(home: Path) -> None:
    save(_tuning())
    save(_tuning(key=key_of("mlx", "cpu", TINY["tiny-l"])))
    assert forget(CONFIG) == 1 and find("mlx", "cpu", CONFIG) is None and len(read_table()) == 1
    assert forget(None) == 1 and not (home / "tuning.json").exists()
    assert forget(None) == 0


def test_variables_are_those_of_the_newest_entry_here() -> None:
    assert environment() == {}
    save(_tuning(environment={"MLX_MAX_OPS_PER_BUFFER": "100"}))
    save(_tuning(key=key_of("mlx", "gpu", CONFIG), environment={"MLX_MAX_OPS_PER_BUFFER": "200"}))
    save(_tuning(key=replace(key_of("mlx", "gpu", CONFIG), chip="Z80"), environment={"MLX_MAX_OPS_PER_BUFFER": "300"}))
    assert environment() == {"MLX_MAX_OPS_PER_BUFFER": "200"}


def _damaged(**others: object) -> str:
    return json.dumps({"format": "sa3-tuning/1", "entries": [{**_tuning().to_dict(), **others}]})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not valid JSON"),
        ("\x00\xff", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format": "sa3-tuning/2", "entries": []}', "sa3-tuning/1"),
        ('{"format": "sa3-tuning/1"}', "missing field"),
        (" " * (2 << 20), "more than 1024 KiB"),
        (_damaged(ways={"sum": 7}), "short texts"),
        (_damaged(ways={"sum": "x" * 300}), "short texts"),
        (_damaged(ways={str(number): "x" for number in range(100)}), "more than 64"),
        (_damaged(environment={"LD_PRELOAD": "evil.so"}), "LD_PRELOAD"),
        (_damaged(before="NaN"), "before"),
        (_damaged(before=float("nan")), "before"),
        (_damaged(key=None), "key"),
        (json.dumps({"format": "sa3-tuning/1", "entries": [_tuning().to_dict()] * 300}), "more than 256"),
    ],
)
def test_a_broken_or_hostile_file_costs_one_line(
    text: str, reason: str, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home.mkdir()
    (home / "tuning.json").write_bytes(text.encode("latin-1"))
    assert read_table() == [] and find_ways(CHOICES, "cpu", CONFIG) == {} and environment() == {}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"note: {home / 'tuning.json'} is not used (") and reason in line
    save(_tuning())
    assert find_ways(CHOICES, "cpu", CONFIG) == {"sum": "fast"}


KILLED = """
import os, signal, sys
from pathlib import Path
from sa3_mlx.common.files import atomic
from sa3_mlx.common.tuning import table
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(atomic, sys.argv[1], kill)
from sa3_mlx.common.tuning.table import read_table, save
(entry,) = read_table()
save(type(entry).from_dict(entry.to_dict() | {"ways": {"sum": "plain"}}))
"""


@pytest.mark.parametrize("moment", ["_lock", "_settle"])
def test_a_kill_during_writing_leaves_the_old_table(moment: str, home: Path) -> None:
    save(_tuning())
    before = (home / "tuning.json").read_bytes()
    done = subprocess.run([sys.executable, "-c", KILLED, moment], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (home / "tuning.json").read_bytes() == before
    save(_tuning(ways={}))
    assert sorted(path.name for path in home.iterdir() if not path.name.startswith(".")) == ["tuning.json"]


def test_a_machine_is_named_without_its_owner() -> None:
    key = key_of("mlx", "cpu", CONFIG)
    words = " ".join(map(str, key.to_dict().values()))
    assert key.cores >= 1 and key.chip and machine.memory() > 1e8
    assert os.uname().nodename not in words and str(Path.home()) not in words
