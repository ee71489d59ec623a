"""What a newcomer meets: no file is long, no folder has many files side by side, a class name has one meaning."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES, FILES = 400, 15
TWINS = ("sa3_mlx", "sa3_torch")
MIRRORED = {  # twins in files of other names
    "InputProducts": ["quantize.py", "train/quantize/calibrate.py"],
}
FACES = ("__init__.py", "__main__.py")  # the name of a package, not a file beside others


def tracked() -> list[Path]:
    """Files of the repository; skips outside of one."""
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git repository")
    return [Path(line) for line in listed.splitlines() if (ROOT / line).is_file()]


def test_no_file_of_code_is_long() -> None:
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in tracked() if _code(path)}
    assert len(lengths) > 300
    assert not {str(path): length for path, length in lengths.items() if length > LINES}


def test_no_folder_has_many_files_side_by_side() -> None:
    folders = Counter(str(path.parent) for path in tracked() if path.name not in FACES)
    assert folders["sa3_mlx"] > 10
    assert not {folder: count for folder, count in folders.items() if count > FILES}


def test_nothing_strays_to_the_top() -> None:
    known = {".gitignore", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"}
    assert {path.name for path in tracked() if len(path.parts) == 1} == known


def _code(path: Path) -> bool:
    return path.suffix in (".py", ".js", ".css", ".html")


def test_files_that_begin_first_are_there() -> None:
    from tests.conftest import LONGEST

    assert {Path("tests", name) for name in LONGEST} <= set(tracked())


def test_a_class_name_has_one_meaning() -> None:
    """Twins share names, in files that share theirs; names that begin with _ are known in their file only."""
    homes: dict[str, set[Path]] = {}
    for path in tracked():
        if path.suffix == ".py" and path.parts[0] in (*TWINS, "convert", "benchmarks"):
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes.setdefault(node.name, set()).add(Path(*path.parts[path.parts[0] in TWINS :]))
    assert len(homes) > 300
    shared = {name: sorted(map(str, paths)) for name, paths in homes.items() if len(paths) > 1}
    assert shared == MIRRORED
