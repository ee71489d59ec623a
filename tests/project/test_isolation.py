"""Who may import whom: each twin works where the other framework is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, {root!r})
"""
MODEL_FILES = (
    "choices",
    "layers",
    "attention",
    "t5gemma",
    "conditioner",
    "dit",
    "clap.network",
    "same",
    "guidance",
    "samplers",
    "weights",
    "pipeline",
    "trajectory",
    "lora",
)


def _import_without(blocked: tuple[str, ...], modules: list[str], *, unused: tuple[str, ...] = ()) -> None:
    """Import modules where some packages are missing, and others are not to be loaded."""
    lines = [BLOCK.format(blocked=set(blocked), root=str(ROOT)), *(f"import {module}" for module in modules)]
    lines.append(f"assert not set({[*blocked, *unused]!r}) & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _modules(folder: str, package: str) -> list[str]:
    """Every module below a folder, by the name that it is imported with."""
    paths = [path.relative_to(ROOT / folder).with_suffix("") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [".".join((package, *path.parts)) for path in paths if path.name != "__init__"]


def test_the_torch_twin_imports_without_mlx() -> None:
    """And without PyTorch's compiler, which takes as long as all of PyTorch: 1.7 s of the processor."""
    pytest.importorskip("torch")
    modules = ["sa3_mlx", *(f"sa3_torch.{name}" for name in MODEL_FILES)]
    _import_without(("mlx",), modules, unused=("torch._dynamo",))


def test_the_mlx_twin_imports_without_torch() -> None:
    pytest.importorskip("mlx.core")
    _import_without(("torch",), ["sa3_mlx", *(f"sa3_mlx.{name}" for name in MODEL_FILES)])


def test_shared_facts_import_without_both() -> None:
    _import_without(("mlx", "torch"), ["sa3_mlx", *_modules("sa3_mlx/common", "sa3_mlx.common")])


def test_the_converter_imports_without_both() -> None:
    _import_without(("mlx", "torch"), ["sa3_convert", *_modules("convert", "sa3_convert")])


def test_data_commands_are_listed_without_both() -> None:
    """Rendering, importing, checking and packing sounds needs neither framework."""
    names = ("lint", "recordings", "clip_cache", "encode.sources", "user_folder", "augment", "shards")
    modules = ["sa3_torch.train.demo_set.sets", *(f"sa3_torch.train.data.{name}" for name in names)]
    _import_without(("mlx", "torch"), ["sa3_mlx.cli.train.data", *modules])


def test_training_commands_are_listed_without_both() -> None:
    listing = "from sa3_mlx.cli.app import run; assert run(['train', '--help']) == 0"
    code = "\n".join([BLOCK.format(blocked={"mlx", "torch"}, root=str(ROOT)), listing])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pretrain" in done.stdout


def test_the_package_itself_loads_nothing() -> None:
    """Importing sa3_mlx is light: no numpy even; unknown names are refused with the names there are."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import sa3_mlx; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    import sa3_mlx

    assert sa3_mlx.ModelConfig.__name__ == "ModelConfig"
    with pytest.raises(AttributeError, match="Pipeline"):
        _ = sa3_mlx.Pipelin


def test_openblas_is_loaded_before_mlx() -> None:
    """Only ``runtime``, which gives mlx its BLAS, imports it (``mlx.utils`` has no arrays); too late is reported."""
    pytest.importorskip("mlx.core")
    files = [path for top in ("sa3_mlx", "sa3_torch", "convert", "benchmarks") for path in (ROOT / top).rglob("*.py")]
    direct = [
        path for path in files if re.search(r"^\s*(import|from) mlx(?!\.utils)\b", path.read_text(), re.MULTILINE)
    ]
    assert direct == [ROOT / "sa3_mlx" / "runtime.py"]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport sa3_mlx.pipeline, sa3_mlx.runtime as b\n"
    code += "assert 'before' not in b.status().message, b.status()"
    subprocess.run([sys.executable, "-c", code], check=True)
    if sys.platform == "linux":
        late = (
            f"import sys, mlx.core; sys.path.insert(0, {str(ROOT)!r}); import sa3_mlx.runtime as b; print(b.status())"
        )
        done = subprocess.run([sys.executable, "-c", late], capture_output=True, text=True, check=True)
        assert "fast=False" in done.stdout


@pytest.mark.parametrize(("command", "extra"), [("serve", "server"), ("mcp", "mcp")])
def test_commands_of_the_server_name_what_they_need(command: str, extra: str) -> None:
    """Without their packages they say in one line how to get them; all other commands work."""
    blocked = {"fastapi", "starlette", "uvicorn", "pydantic"} if extra == "server" else {"mcp"}
    code = f"from sa3_mlx.cli.app import run; sys.exit(run([{command!r}, '--folder', '.']))"
    code = "\n".join([BLOCK.format(blocked=blocked, root=str(ROOT)), code])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2 and f"pip install 'sa3[{extra}]'" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1
