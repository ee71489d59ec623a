"""Training commands as they are typed: under torchrun two processes end where one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from safetensors.torch import load_file

from sa3_mlx.assets import DEMO
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.data.pre_encode import EncodeConfig, PreEncoder
from sa3_torch.train.data.sources import ClipSource

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {  # of two short steps
    "pretrain": ("train.batch=4", "clips.buckets=1", "demo.steps=1", "optimizer.warmup_steps=1"),
    "clap": ("train.batch=8", "tower.depth=1", "optimizer.warmup_steps=1"),
}
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def latents(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny clips in latents of the demo model."""
    out = tmp_path_factory.mktemp("demo") / "latents"
    encoding = EncodeConfig(copies=1, seed=0, shard_frames=1000, chunk_frames=None)
    PreEncoder(ClipSource(ClipSet(workspace / "clips"), 2), DEMO, out, encoding).run()
    return out


@pytest.mark.parametrize("command", ["pretrain", pytest.param("clap", marks=pytest.mark.slow)])
def test_a_command_under_torchrun_ends_where_one_process_does(command: str, latents: Path, tmp_path: Path) -> None:
    """Sharded by FSDP2; the first process writes the averaged weights whole. Measured: relative L2 2e-5."""
    model = {"pretrain": ("--autoencoder", DEMO), "clap": ("--model", DEMO)}[command]
    settings = ("train.steps=2", "train.precision=fp32", "train.parallel=fsdp", *SETTINGS[command])
    sets = [part for setting in settings for part in ("--set", setting)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    found = []
    for name, launcher in (("one", ()), ("two", LAUNCHER)):
        out = tmp_path / name
        line = [sys.executable, *launcher, "-m", "sa3_mlx", "train", command, "--latents", latents, *model, *sets]
        done = subprocess.run([*line, "--out", out], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        measures, made = done.stdout.strip().splitlines()  # the first process alone speaks
        assert measures.startswith("step 2: ") and str(out / "model") in made
        found.append(load_file(out / "model" / "model.safetensors"))
    one, two = found
    assert one.keys() == two.keys()
    for key in one:
        a, b = one[key].float(), two[key].float()
        assert float((a - b).norm()) <= 1e-4 * float(a.norm()) + 1e-6, key
