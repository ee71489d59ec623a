"""What is installed: every package of ours, the files that they read, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONVERT = ROOT / "convert"
BUILD = "import sys, setuptools.build_meta as meta; meta.build_wheel(sys.argv[1])"


def packages() -> set[str]:
    """Names of all folders with an ``__init__.py``, as they are imported once installed."""
    found = {".".join(("sa3_convert", *p.parent.parts[len(ROOT.parts) + 1 :])) for p in CONVERT.rglob("__init__.py")}
    for top in ("sa3_mlx", "sa3_torch"):
        found |= {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / top).rglob("__init__.py")}
    return found


def test_the_packages_of_pyproject_are_the_folders_of_the_repository():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(packages())
    assert setuptools["package-dir"] == {"sa3_convert": "convert"}
    code = {path.parent for top in ("sa3_mlx", "sa3_torch", "convert") for path in (ROOT / top).rglob("*.py")}
    assert not [folder for folder in code if not (folder / "__init__.py").is_file()]


def test_a_wheel_holds_three_packages_and_the_files_that_they_read(tmp_path: Path):
    pytest.importorskip("setuptools")
    tree = tmp_path / "tree"
    for name in ("sa3_mlx", "sa3_torch", "convert", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "results", "goldens"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    done = subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    tops = {name.parts[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sa3_mlx", "sa3_torch", "sa3_convert"}
    wanted = {path.relative_to(tree) for top in ("sa3_mlx", "sa3_torch") for path in (tree / top).rglob("*")}
    assert {path for path in wanted if (tree / path).is_file()} <= names
