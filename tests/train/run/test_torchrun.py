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
from sa3_torch.train.autoencoder.gate import check_latents
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.data.encode.pre_encode import EncodeConfig, PreEncoder
from sa3_torch.train.data.encode.sources import ClipSource
from tests.support.command import sa3

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {  # of two short steps
    "pretrain": ("train.batch=4", "clips.buckets=1", "demo.steps=1", "optimizer.warmup_steps=1"),
    "clap": ("train.batch=8", "tower.depth=1", "optimizer.warmup_steps=1"),
}
LAUNCHER = ("--standalone", "--nproc-per-node=2", "-m", "--", "sa3_mlx")


@pytest.fixture(scope="module")
def latents(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny clips in latents of the demo model."""
    out = tmp_path_factory.mktemp("demo") / "latents"
    encoding = EncodeConfig(copies=1, seed=0, shard_frames=1000, chunk_frames=None)
    source = ClipSource(ClipSet(workspace / "clips"), 2)
    PreEncoder(source, DEMO, out, encoding).run()
    assert check_latents(out, source, DEMO, items=2).good
    return out


def test_torchrun_takes_no_option_of_a_command_for_its_own() -> None:
    """Without the two dashes --start is ambiguous to it."""
    from torch.distributed.run import parse_args

    words = ["train", "pretrain", "--start", "base", "--log", "x"]
    found = parse_args([*LAUNCHER, *words])
    assert (found.training_script, found.training_script_args) == ("sa3_mlx", words) and found.module


@pytest.mark.parametrize("command", ["pretrain", pytest.param("clap", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("no_pictures")
def test_a_command_under_torchrun_ends_where_one_process_does(
    command: str, latents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sharded by FSDP2; the first process writes the averaged weights whole. Measured: relative L2 2e-5 of each.

    Of CLAP all weights are compared together: what starts at zero gets nearly no gradient in two steps, and AdamW makes
    steps of a usual size of its last bits (1 % in one table). test_processes compares these stages in exact settings.
    """
    model = {"pretrain": ("--autoencoder", DEMO), "clap": ("--model", DEMO)}[command]
    settings = ("train.steps=2", "train.precision=fp32", "train.parallel=fsdp", *SETTINGS[command])
    sets = [part for setting in settings for part in ("--set", setting)]
    line = ["train", command, "--latents", latents, *model, *sets, "--out"]
    alone = sa3(capfd, *line, tmp_path / "one")
    assert alone.code == 0, alone
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    both = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *LAUNCHER, *line, tmp_path / "two"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert both.returncode == 0, both.stderr[-3000:]
    for name, printed in (("one", alone.out), ("two", both.stdout)):
        measures, made, *further = printed.strip().splitlines()  # only the first process speaks
        assert measures.startswith("step 2: ") and str(tmp_path / name / "model") in made
        assert len(further) == printed.count("next: ") == (command == "pretrain")  # the demo takes no CLAP
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for names in [one] if command == "clap" else [[name] for name in one]:
        a, b = (torch.cat([weights[name].float().flatten() for name in names]) for weights in (one, two))
        assert float((a - b).norm()) <= 1e-4 * float(a.norm()) + 1e-6, names
