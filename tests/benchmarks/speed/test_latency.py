"""The latency benchmark: what it starts, how it counts, what it reads from a machine. Nothing asserts on time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner

from benchmarks.__main__ import COMMANDS, main
from benchmarks.options import parse_lengths
from benchmarks.speed import energy, machine
from benchmarks.speed.latency import KEY, key, save, spread, start, sustained, table
from benchmarks.speed.models import PROMPT, make_random_model
from benchmarks.speed.worker import Work, work
from sa3_mlx.cli import backend
from sa3_mlx.cli.group import run_group
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.model.checkpoint import expected_tensors
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.tuning.table import Tuning, key_of
from sa3_mlx.common.tuning.table import save as save_tuning
from tests.support.command import SMALL, make_home

ROOT = Path(__file__).resolve().parents[3]

# What `powermetrics --samplers cpu_power,gpu_power` prints on an Apple chip, shortened.
POWERMETRICS = """Machine model: Mac16,1
*** Sampled system activity (Mon Nov 10 12:00:00 2025 +0000) (203.51ms elapsed) ***

**** Processor usage ****

E-Cluster HW active frequency: 1293 MHz
CPU 0 frequency: 1338 MHz
CPU Power: 954 mW
GPU Power: 9462 mW
ANE Power: 0 mW
Combined Power (CPU + GPU + ANE): 10416 mW

**** GPU usage ****

GPU HW active frequency: 1470 MHz
GPU Power: 9460 mW
*** Sampled system activity (Mon Nov 10 12:00:00 2025 +0000) (610.53ms elapsed) ***

CPU Power: 1000 mW
GPU Power: 5000 mW
ANE Power: 0 mW
Combined Power (CPU + GPU + ANE): 6000 mW
*** Sampled system activity (Mon Nov 10 12:00:01 2025 +0000) (200.00ms elapsed) ***
"""
DISPLAYS = """{
  "SPDisplaysDataType" : [
    {
      "_name" : "Apple M4",
      "spdisplays_mtlgpufamilysupport" : "spdisplays_metal4",
      "spdisplays_ndrvs" : [ { "_name" : "Color LCD" } ],
      "spdisplays_vendor" : "sppci_vendor_Apple",
      "sppci_bus" : "spdisplays_builtin",
      "sppci_cores" : "10",
      "sppci_device_type" : "spdisplays_gpu",
      "sppci_model" : "Apple M4"
    }
  ]
}"""


def test_power_is_averaged_over_the_length_of_its_samples():
    """A sample that was cut off by the end is left out."""
    watts = energy.parse_powermetrics(POWERMETRICS)
    assert watts == pytest.approx((0.20351 * 10.416 + 0.61053 * 6.0) / (0.20351 + 0.61053))
    assert energy.parse_powermetrics("powermetrics must be invoked as the superuser\n") is None
    assert energy.parse_nvidia("412.35\n 398.10\n\n405.20\n") == pytest.approx(405.2166, abs=1e-3)
    assert energy.parse_nvidia("[N/A]\n[N/A]\n") is None


def _script(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("tool", ["nvidia-smi", "powermetrics"])
def test_energy_is_that_of_the_work_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str):
    (tmp_path / "text").write_text(POWERMETRICS if tool == "powermetrics" else "300.0\n100.0\n")
    _script(tmp_path, tool, f"/bin/cat {tmp_path}/text; exec /bin/sleep 30")
    _script(tmp_path, "sudo", f'[ "$1" = -n ] && [ "$2" = powermetrics ] && exec {tmp_path}/powermetrics')
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(energy, "sys", SimpleNamespace(platform="darwin" if tool == "powermetrics" else "linux"))
    with energy.EnergyMeter(on_cuda=True) as meter:
        pass
    assert meter.energy is not None and meter.energy.source == tool
    assert meter.energy.watts == pytest.approx(200.0 if tool == "nvidia-smi" else 7.104, abs=1e-3)
    assert meter.energy.joules == meter.energy.watts * meter.energy.seconds


def test_energy_is_absent_where_nothing_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for platform in ("linux", "darwin"):
        monkeypatch.setattr(energy, "sys", SimpleNamespace(platform=platform))
        with energy.EnergyMeter(on_cuda=True) as meter:
            pass
        assert meter.energy is None
    _script(tmp_path, "powermetrics", "exit 1")
    _script(tmp_path, "sudo", "exit 1")  # a password would be needed
    with energy.EnergyMeter(on_cuda=False) as meter:
        pass
    assert meter.energy is None


def test_machines_describe_themselves():
    assert machine.parse_displays(DISPLAYS) == ("Apple M4", 10)
    assert machine.parse_displays("") == machine.parse_displays('{"SPDisplaysDataType": [{}]}') == (None, None)
    assert machine.parse_cpuinfo("processor\t: 0\nmodel name\t: Some Chip 9000\nflags\t: a b\n") == "Some Chip 9000"
    assert machine.parse_memory("MemTotal:       24684092 kB\nMemFree: 1 kB\n") == 24684092 * 1024
    here = machine.describe("mlx")
    assert here.memory_bytes > 0 and here.chip and here.slug() and "numpy" in here.versions and here.text()
    assert machine.run(["no-such-command-at-all"]) == ""


def test_other_programs_are_noticed():
    before = machine.parse_cpu_seconds("cpu  100 0 50 1000 10 0 0 0 0 0\ncpu0 1 2 3\n")
    after = machine.parse_cpu_seconds("cpu  180 0 70 1100 20 0 0 0 0 0\n")
    assert after - before == pytest.approx(100 / os.sysconf("SC_CLK_TCK"))
    assert machine.parse_shares("  99.8\n 0.2\n50,0\n") == pytest.approx(1.5)
    assert machine.busy_cores() >= 0


def test_a_mac_is_described_by_its_own_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers = {
        "machdep.cpu.brand_string": "Apple M4",
        "hw.perflevel0.physicalcpu": "4",
        "hw.perflevel1.physicalcpu": "6",
        "hw.memsize": "17179869184",
    }
    cases = "\n".join(f"{name}) echo {value};;" for name, value in answers.items())
    _script(tmp_path, "sysctl", f'case "$2" in\n{cases}\nesac')
    (tmp_path / "displays.json").write_text(DISPLAYS)
    _script(tmp_path, "system_profiler", f"/bin/cat {tmp_path}/displays.json")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "sys", SimpleNamespace(platform="darwin"))
    mac = machine.describe("mlx")
    assert (mac.chip, mac.gpu, mac.gpu_cores, mac.memory_bytes) == ("Apple M4", "Apple M4", 10, 2**34)
    assert "4 performance, 6 efficiency" in mac.cpu_cores and mac.slug() == "apple-m4-10-gpu-cores"


def _work(folder: Path, name: str, **changes: float) -> Work:
    return Work(
        backend=name,
        device="cpu",
        folder=str(folder),
        dtype="float32",
        text_dtype="auto",
        compiled=False,
        tuned=True,
        prompt="soft rain",
        seconds=0.5,
        sampling=Sampling(sampler="pingpong", steps=3),
        warmups=0,
        repeats=2,
        minutes=changes.get("minutes", 0.0),
        write=True,
        spawned=0.0,
    )


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_a_worker_is_a_process_of_its_own(tmp_path: Path, name: str):
    if not backend.available(name):  # type: ignore[arg-type]
        pytest.skip(f"{name} is not installed")
    folder = make_home(tmp_path) / "models" / SMALL.name
    run = start(_work(folder, name))
    assert len(run["timings"]) == 2 and run["steps"] == 3 and run["finite"]
    for timing in run["timings"]:
        assert timing["total"] == pytest.approx(timing["text"] + timing["sample"] + timing["decode"])
        assert timing["text"] + timing["sample"] <= timing["first_sound"] <= timing["total"]
    assert run["peak_rss_bytes"] > 0 and run["wall"] > sum(timing["total"] for timing in run["timings"])
    assert (run["memory_counter"] == "mlx") == (run["peak_memory_bytes"] is not None) == (name == "mlx")


def test_a_worker_says_in_which_ways_it_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlx.core")
    monkeypatch.setenv("SA3_HOME", str(make_home(tmp_path)))
    folder = tmp_path / "models" / SMALL.name
    assert work(_work(folder, "mlx"))["ways"] == "usual"
    save_tuning(
        Tuning(
            key=key_of("mlx", "cpu", SMALL),
            model="little",
            date="2026-01-01",
            sa3="0.1",
            ways={"chunks": "half"},
            environment={},
            before=2.0,
            after=1.0,
        )
    )
    assert work(_work(folder, "mlx"))["ways"] == "chunks half"
    assert work(replace(_work(folder, "mlx"), tuned=False))["ways"] == "usual"


def test_a_worker_that_fails_gives_its_reason(tmp_path: Path):
    with pytest.raises(ValueError, match=r"the measured process failed: .*no config\.json"):
        start(_work(tmp_path, "mlx"))


def test_the_sustained_mode_compares_the_first_and_the_last_fifth():
    timings = [{"begun": float(i), "total": 1.0 if i < 10 else 1.5} for i in range(20)]
    result = sustained({"timings": timings, "energy": None})
    assert (result["first_p50"], result["last_p50"], result["slowdown"], result["runs"]) == (1.0, 1.5, 1.5, 20)


def test_spread_keeps_every_value():
    values = [3.0, 1.0, 2.0]
    assert spread(values) == {"p50": 2.0, "p95": pytest.approx(2.9), "values": values}


@pytest.mark.parametrize("name", ["mlx", "torch"])
def test_the_command_writes_a_table_a_file_and_a_line_of_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    if not backend.available(name):  # type: ignore[arg-type]
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("SA3_HOME", str(make_home(tmp_path / "home")))
    monkeypatch.setattr("benchmarks.speed.latency.PROMPT", "soft rain")
    monkeypatch.setattr(
        "benchmarks.speed.latency.start", lambda job: work(replace(job, spawned=0.0))
    )  # in this process
    args = [
        "latency",
        "--model",
        "little",
        "--backend",
        name,
        "--device",
        "cpu",
        "--seconds",
        "0.3,0.5,99",
        "--repeats",
        "2",
        "--steps",
        "2",
        "--results",
        str(tmp_path / "results"),
    ]
    for _ in range(2):  # the second replaces the first
        result = CliRunner().invoke(main, [*args, "--sustained", "0.001"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    entries = json.loads(result.stdout.strip().splitlines()[-1])["entries"]
    assert [entry["seconds"] for entry in entries] == [0.3, 0.5] and "per step" in result.stdout
    assert "left out, little makes up to 3.20 s" in result.stderr
    assert all(entry["cold"]["wall"]["p50"] > 0 and "slowdown" in entry["sustained"] for entry in entries)
    (path,) = (tmp_path / "results").iterdir()
    saved = json.loads(path.read_text())
    assert saved["entries"] == entries, "the second measurement replaces the first"
    assert saved["machine"]["versions"] and saved["date"] in path.name
    assert str(tmp_path) not in path.read_text(), "results name no folder of a person's machine"


def test_another_setting_is_another_entry(tmp_path: Path):
    first = dict.fromkeys(KEY, "x")
    second = first | {"dtype": "float16"}
    assert key(first) != key(second)
    here = machine.describe("mlx")
    save(tmp_path, here, [first])
    path = save(tmp_path, here, [second])
    assert json.loads(path.read_text())["entries"] == [first, second]


def test_random_weights_of_a_preset_are_made_once(tmp_path: Path):
    folder = make_random_model(tmp_path / "m", SMALL)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert make_random_model(folder, SMALL) == folder and (folder / "model.safetensors").stat().st_mtime_ns == stamp
    with TensorFile.open(folder / "model.safetensors") as file:
        assert file.shapes() == dict(sorted(expected_tensors(SMALL).items()))
        assert {file.info(name)[0] for name in file.names() if name.startswith("text_encoder")} == {"BF16"}
    assert len(PROMPT.split()) == 24


def test_lengths_are_read():
    assert parse_lengths(None, None, "5,30.5") == (5.0, 30.5)  # type: ignore[arg-type]
    with pytest.raises(click.BadParameter, match="expected numbers such as 5,30"):
        parse_lengths(None, None, "5;30")  # type: ignore[arg-type]


def test_every_command_has_help_and_needs_only_one_twin():
    for name in COMMANDS:
        assert CliRunner().invoke(main, [name, "--help"]).exit_code == 0, name
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from benchmarks.__main__ import main\n"
        "main(['latency', '--help'], standalone_mode=False); main(['report', '--help'], standalone_mode=False)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_table_says_what_was_not_counted():
    warm = {stage: {"p50": 1.0, "p95": 2.0} for stage in ("total", "cpu", "text", "sample", "decode", "first_sound")}
    entry = {
        "seconds": 5.0,
        "steps": 8,
        "real_time_factor": 5.0,
        "energy": None,
        "warm": warm | {"peak_memory_bytes": None, "peak_rss_bytes": 2 * 10**9},
    }
    head, row = table([entry])
    assert len(head) == len(row) and row[head.index("energy")] == row[head.index("cold")] == "-"
    assert row[head.index("memory")] == "2.00 GB RSS" and row[head.index("per step")] == "125.0 ms"


def test_errors_are_one_line_here_too(capsys: pytest.CaptureFixture[str]):
    command = [sys.executable, "-m", "benchmarks", "latency", "--model", "nope"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [(done.returncode, done.stdout, done.stderr)]
    for args in (("precision", "nope"), ("adherence", "nope")):
        code = run_group(main, args, "python -m benchmarks")
        found.append((code, *capsys.readouterr()))
    for code, out, error in found:
        assert code == 2 and out == ""
        assert error.startswith("python -m benchmarks: nope: no such model or folder; installed: "), error
        assert error.count("\n") == 1
