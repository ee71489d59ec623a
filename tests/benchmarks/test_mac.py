"""``benchmarks mac``: everything in short on any machine, and what the file may hold."""

from __future__ import annotations

import getpass
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.mac import parts
from benchmarks.mac.command import check_personal
from benchmarks.mac.report import markdown
from sa3_mlx.common.installed import home

pytest.importorskip("mlx.core")
REPORT = """<testsuites><testsuite>
<testcase classname="tests.twins.test_metal" name="one" />
<testcase classname="tests.twins.test_metal" name="two"><failure message="/Users/someone/sa3">x</failure></testcase>
<testcase classname="tests.twins.test_metal" name="three"><skipped message="no Apple GPU" /></testcase>
<testcase classname="tests.twins.test_metal" name="four"><error message="y">y</error></testcase>
</testsuite></testsuites>"""
WARM = {"p50": 1.5, "p95": 2.0, "values": [1.4, 1.5, 1.9]}
ENTRY = {
    "seconds": 5.0,
    "steps": 8,
    "energy": {"joules_each": 12.4, "watts": 6.0},
    "cold": {"wall": WARM},
    "warm": {"total": WARM, "sample": WARM, "decode": WARM, "peak_memory_bytes": 2 * 10**9, "peak_rss_bytes": 1},
}
RESULT: dict[str, Any] = {
    "date": "2026-01-01",
    "machine": {
        "chip": "Apple M4",
        "cpu_cores": "10 (4 performance, 6 efficiency)",
        "gpu_cores": 10,
        "memory_bytes": 17179869184,
        "system": "macOS 26.2",
        "versions": {"mlx": "0.32.4"},
    },
    "model": {"name": "small-music", "weights": "random"},
    "tests": {"passed": 9, "skipped": 0, "failed": ["test_heads"]},
    "usual": [ENTRY],
    "tuned": [ENTRY],
    "tuning": {"kept": {"ways": {"chunks": "double"}, "environment": {"MLX_A": "1"}, "before": 3.0, "after": 2.0}},
    "memory": [
        {"seconds": 5.0, "residency": "run", "measured": {"sample": 2_000_000}, "predicted": {"sample": 3_000_000}}
    ],
    "operations": [
        {
            "name": "2 x 3 x 4",
            "dtype": "float16",
            "ways": ["transposed", "stored"],
            "milliseconds": [1.0, 1.5],
            "spread": [0.1, 0.1],
            "error": 0.0,
        }
    ],
    "sustained": {
        "seconds": 30.0,
        "runs": 50,
        "minutes": 1.5,
        "first_p50": 1.0,
        "last_p50": 1.25,
        "slowdown": 1.25,
        "energy": None,
    },
    "short": False,
    "busy": True,
}


def test_the_dry_run_goes_through_everything_and_leaves_the_home_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    result = CliRunner().invoke(main, ["mac", "--dry-run", "--results", str(tmp_path / "results")])
    assert result.exit_code == 0, result.output
    table, data = sorted((tmp_path / "results").iterdir(), key=lambda path: path.suffix, reverse=True)
    found = json.loads(data.read_text())
    assert found["format"] == "sa3-mac/1" and found["short"] and data.name.endswith("-short.json")
    assert [entry["ways"] for entry in found["usual"]] == ["usual"] and found["tuned"][0]["warm"]["total"]["p50"] > 0
    tuning = found["tuning"]
    assert tuning["kept"]["key"]["twin"] == "mlx" and any("launches" in line for line in tuning["lines"])
    assert found["memory"][0]["measured"]["decode"] > 0 and found["sustained"]["slowdown"] > 0
    ways = {tuple(each["ways"]) for each in found["operations"]}
    assert ways == {("transposed", "stored"), ("rows", "view"), ("float32", "float16"), ("packed", "unpacked")}
    assert all(each["error"] < 5e-3 for each in found["operations"])
    assert set(found["tests"]) == {"passed", "skipped", "failed"}
    assert table.read_text() == markdown(found) and "A dry run" in table.read_text()
    for text in (data.read_text(), table.read_text()):
        assert str(tmp_path) not in text and str(parts.ROOT) not in text
        check_personal(text)
    assert not (tmp_path / "home" / "tuning.json").exists() and home() == tmp_path / "home"


@pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")
def test_elsewhere_only_the_dry_run_makes_sense() -> None:
    result = CliRunner().invoke(main, ["mac"])
    assert result.exit_code == 2 and "this is no Mac" in result.output


def test_reports_of_tests_keep_names_and_no_messages() -> None:
    assert parts.read_report(REPORT) == {"passed": 1, "skipped": 1, "failed": ["two", "four"]}


def test_markdown_has_every_part() -> None:
    text = markdown(RESULT)
    assert (
        "**Apple M4**, 10 (4 performance, 6 efficiency) cores, GPU with 10 cores, 17 GB, macOS 26.2, mlx 0.32.4" in text
    )
    assert "9 passed, 0 skipped; failed: test_heads." in text
    assert "| 5 s | tuned | 1.50 s | 1.500 s | 0.500 s | 187.5 ms | 1.500 s | 2.00 GB | 12 J |" in text
    assert "Tuning: chunks double, MLX_A 1: 1.50 times as fast." in text
    assert "| 5 s | run | sample | 2 MB | 3 MB |" in text
    assert "| 2 x 3 x 4 | float16 | transposed or stored | 1.000 | 1.500 | 1.50 | 0e+00 |" in text
    assert "Sustained: 50 clips of 30 s in 1.5 min, 1.000 s at first, 1.250 s at last, 1.25 times as long." in text
    assert text.endswith("Other programs were running: the times are too long.\n")


@pytest.mark.parametrize("word", [str(Path.home()), platform.node(), getpass.getuser()])
def test_a_result_with_a_name_is_refused(word: str) -> None:
    if len(word) > 3:
        with pytest.raises(ValueError, match="nothing was written"):
            check_personal(f"x {word.upper()} y")
    check_personal(markdown(RESULT))


def test_the_home_of_the_user_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SA3_HOME", "mine")
    with pytest.raises(RuntimeError), parts.own_home():
        assert os.environ["SA3_HOME"] != "mine"
        raise RuntimeError
    assert os.environ["SA3_HOME"] == "mine"
    monkeypatch.delenv("SA3_HOME")
    with parts.own_home():
        assert "SA3_HOME" in os.environ
    assert "SA3_HOME" not in os.environ
