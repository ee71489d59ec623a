"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest

for _library in ("OMP", "OPENBLAS"):  # before any of them is loaded; several threads only cost where models are tiny
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

from tests.support.command import Run, make_home, sa3, use_home
from tests.support.tiny import TINY as CONFIGS
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.twins import TINY, Twin

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
LONGEST = (  # files that take longest begin first, so that no process still works on one while the others wait
    *("cuda/test_benchmark.py", "train/run/test_processes.py", "twins/test_exact.py", "train/run/test_stages.py"),
    *("train/run/test_plan.py", "cuda/test_compiled.py", "train/run/test_blocks.py", "benchmarks/test_mac.py"),
    *("train/run/test_torchrun.py", "faults/test_faults.py", "cli/models/test_get.py", "benchmarks/test_music.py"),
)


if importlib.util.find_spec("mlx") is not None:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)  # tolerances are those of a CPU; ``metal`` tests choose the GPU themselves


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [*(item.path.as_posix().endswith(name) for name in LONGEST), True].index(True))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the reference outputs of the official code; skips where it is not beside the repository."""
    if not GOLDEN.is_dir():
        pytest.skip("no golden folder beside the repository")
    return GOLDEN


@pytest.fixture(scope="session")
def golden_or_kept() -> Path:
    """As ``golden``, for tests that need no weights: without that folder they use the few cases in tests/goldens."""
    return GOLDEN


@pytest.fixture(params=["mlx", "torch"])
def twin(request: pytest.FixtureRequest) -> Twin:
    """Each framework in turn; skips where it is not installed."""
    module = "mlx.core" if request.param == "mlx" else "torch"
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{module} is not installed")
    return Twin(request.param)


@pytest.fixture(scope="session")
def checkpoints(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny official models, converted: folders by name."""
    from sa3_convert import convert

    root = tmp_path_factory.mktemp("checkpoints")
    for name in TINY:
        convert(golden / name / "weights.safetensors", root / name, name=name, force=False, progress=None)
    return {name: root / name for name in TINY}


@pytest.fixture(scope="session")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints with random weights that need no reference: the tiny models and an autoencoder alone, by name."""
    root = tmp_path_factory.mktemp("random")
    configs = {**CONFIGS, "autoencoder": replace(CONFIGS["tiny-s"], name="autoencoder", diffusion=None)}
    return {name: write_checkpoint(root / name, config) for name, config in configs.items()}


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny training stages of ``stages.py`` read."""
    from sa3_torch.train.autoencoder.gate import check_latents
    from sa3_torch.train.data.clip_cache import ClipSet
    from sa3_torch.train.data.encode.sources import ClipSource
    from tests.support.stages import make_workspace

    folder = tmp_path_factory.mktemp("workspace")
    make_workspace(folder)
    assert check_latents(
        folder / "latents", ClipSource(ClipSet(folder / "clips"), 2), folder / "run" / "model", items=2
    ).good
    return folder


@pytest.fixture(scope="module")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the models of ``make_home``."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def run(shared_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command, in a folder of its own, with "little" as the default model."""
    use_home(shared_home, monkeypatch)
    monkeypatch.chdir(tmp_path)
    return lambda *args: sa3(capfd, *args)
