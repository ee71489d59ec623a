"""What is settled before mlx is imported: versions that are refused, and settings of an Apple GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sa3_mlx.runtime import LARGE_BUFFERS, refusal, settings

ROOT = Path(__file__).resolve().parents[2]
PRETEND = (
    "import importlib.metadata, os, soundfile, sys;"  # soundfile looks for its library by the platform
    "sys.platform = 'darwin'; importlib.metadata.version = lambda _: {!r};"
    "os.sysconf = {{'SC_PHYS_PAGES': {!r}, 'SC_PAGE_SIZE': 1}}.get;"
)
NAMES = tuple(settings(LARGE_BUFFERS))


def _on_a_mac(
    version: str, code: str, memory: int = LARGE_BUFFERS, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a process that takes itself for one on a Mac with this version of MLX."""
    script = PRETEND.format(version, memory) + code
    inherited = {name: value for name, value in os.environ.items() if name not in NAMES}
    return subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=inherited | environment,
    )


@pytest.mark.parametrize("version", ["0.29.0", "0.30.4", "0.31.1", "0.32.0"])
def test_versions_that_compute_wrongly_are_refused(version: str) -> None:
    reason = refusal(version)
    assert reason is not None and reason.startswith(f"mlx {version} is installed: ") and "pip install -U" in reason
    found = _on_a_mac(version, "import sa3_mlx.runtime")
    assert found.returncode == 1 and found.stderr.splitlines()[-1] == f"ImportError: {reason}"


@pytest.mark.parametrize("version", ["0.31.2", "0.32.1", "0.32.4", "0.33.0.dev20261130", "1.0"])
def test_other_versions_are_not(version: str) -> None:
    assert refusal(version) is None


def test_an_old_version_is_one_line_of_the_command() -> None:
    pytest.importorskip("mlx.core")
    code = "sys.argv = ['sa3', 'generate', 'rain', '--model', 'demo', '--backend', 'mlx', '--out', 'no.wav']; "
    found = _on_a_mac("0.30.4", code + "from sa3_mlx.cli import main; sys.exit(main())")
    assert found.returncode != 0 and "Traceback" not in found.stderr
    assert "mlx 0.30.4 is installed" in found.stderr.splitlines()[-1], found.stderr


def test_the_gpu_gets_work_in_larger_pieces_unless_the_user_has_said_otherwise() -> None:
    pytest.importorskip("mlx.core")
    show = f"import sa3_mlx.runtime; print(*(os.environ.get(name) for name in {NAMES}))"
    assert _on_a_mac("0.32.4", show).stdout == "0 200 200\n"
    assert _on_a_mac("0.32.4", show, MLX_MAX_OPS_PER_BUFFER="40", MLX_ENABLE_TF32="1").stdout == "1 40 200\n"
    assert _on_a_mac("0.32.4", show, LARGE_BUFFERS - 1).stdout == "0 None None\n"
    unknown = "os.sysconf = lambda _: int('?'); " + show
    assert _on_a_mac("0.32.4", unknown).stdout == "0 None None\n"


@pytest.mark.skipif(sys.platform != "linux", reason="what Linux leaves alone")
def test_elsewhere_nothing_is_set() -> None:
    pytest.importorskip("mlx.core")
    code = "import os, sa3_mlx.runtime; print([name for name in os.environ if name.startswith('MLX_')])"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLX_")}
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert found.stdout == "[]\n"


def test_what_was_tuned_goes_before_what_is_usual_and_after_the_user(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    key = {"twin": "mlx", "device": "gpu", "chip": "M4", "cores": 10, "system": "macOS 26", "version": "0.32.4"}
    facts = {"model": "little", "date": "2026-01-01", "sa3": "0.1", "ways": {}, "before": 2.0, "after": 1.0}
    entry = {"key": {**key, "shape": "0"}, **facts, "environment": {"MLX_MAX_OPS_PER_BUFFER": "400"}}
    (tmp_path / "tuning.json").write_text(json.dumps({"format": "sa3-tuning/1", "entries": [entry]}))
    here = (
        "from sa3_mlx.common.tuning import machine;"
        "machine.chip, machine.cores, machine.system = lambda: 'M4', lambda: 10, lambda: 'macOS 26';"
    )
    show = f"{here}import sa3_mlx.runtime; print(*(os.environ.get(name) for name in {NAMES}))"
    assert _on_a_mac("0.32.4", show, SA3_HOME=str(tmp_path)).stdout == "0 400 200\n"
    assert _on_a_mac("0.32.4", show, SA3_HOME=str(tmp_path), MLX_MAX_OPS_PER_BUFFER="40").stdout == "0 40 200\n"
    assert _on_a_mac("0.33.0", show, SA3_HOME=str(tmp_path)).stdout == "0 200 200\n"
