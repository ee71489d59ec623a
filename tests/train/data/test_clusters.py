"""Corpora beyond one machine as docs/training.md 10.4 describes them: a bucket under torchrun, parts by Ray [T10.4]."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from safetensors.torch import load_file

from sa3_torch.train.data.encode.pre_encode import load_autoencoder
from sa3_torch.train.data.latents import LatentSet
from tests.support.command import AUTOENCODER
from tests.support.data.recordings import write_recordings
from tests.support.stages import SHORT
from tests.support.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "sa3_mlx")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_two_processes_train_on_a_bucket_as_one_does(tmp_path: Path) -> None:
    """On pieces, each process on the shards of its own rows. The program of the bucket is a stand-in."""
    pytest.importorskip("webdataset", reason="the training extra is not installed")
    from sa3_torch.train.data.packing import Cut, write_shards

    (tmp_path / "sounds").mkdir()
    for number in range(10):
        audio = 0.2 * np.random.default_rng(number).standard_normal((60_000, 2))
        soundfile.write(tmp_path / "sounds" / f"{number}.wav", audio, 44_100)
        (tmp_path / "sounds" / f"{number}.txt").write_text(f"noise {number}")
    bucket = tmp_path / "bucket"
    cut = Cut(seconds=1.0, overlap=0.2)
    assert (
        len(write_shards(tmp_path / "sounds", bucket, shard_bytes=400_000, captions_required=True, cut=cut).shards) == 5
    )
    program = tmp_path / "bin" / "aws"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$RANK ${{4##*/}}" >> {tmp_path}/asked; exec cat "{bucket}/${{4##*/}}"\n')
    program.chmod(0o755)
    settings = (*SHORT, "train.batch=4", "train.steps=2", "crop_samples=8192", "shards.streams=2", "shards.window=3")
    sets = [f"--set={each}" for each in (*settings, "train.precision=fp32")]
    words = ["train", "autoencoder", "--data", "s3://bucket/sounds", *sets, "--out"]
    environment = {**ENVIRONMENT, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    for out, launcher in (("one", (sys.executable, "-m", "sa3_mlx")), ("two", LAUNCHER)):
        (tmp_path / "asked").write_text("")
        found = subprocess.run(
            [*launcher, *words, str(tmp_path / out)], env=environment, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stderr[-3000:]
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name in one:
        assert float((one[name] - two[name]).norm()) <= 1e-4 * float(one[name].norm()) + 1e-6, name
    asked = [each.split() for each in (tmp_path / "asked").read_text().splitlines()]
    by_rank = {rank: {name for who, name in asked if who == rank and name.endswith(".tar")} for rank in ("0", "1")}
    assert by_rank == {  # the first process reads what is held out, too
        "0": {"audio-000000.tar", "audio-000002.tar", "audio-000004.tar"},
        "1": {"audio-000001.tar", "audio-000003.tar"},
    }


def test_parts_are_encoded_by_ray(tmp_path: Path) -> None:
    """Tasks of a cluster, here of one machine: each part in its folder, all of them what one command makes."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    folder, model = write_recordings(tmp_path / "sounds"), write_checkpoint(tmp_path / "autoencoder", AUTOENCODER)
    for name in ("quiet.wav", "twin.wav"):
        (folder / name).unlink()
    line = [sys.executable, "-m", "sa3_mlx", "pre-encode", "--data", str(folder), "--autoencoder", str(model)]
    subprocess.run([*line, "--out", str(tmp_path / "whole")], env=ENVIRONMENT, check=True, capture_output=True)

    @ray.remote(num_cpus=1, max_retries=3)
    def encode(part: int) -> None:
        place = ["--part", f"{part}/2", "--out", str(tmp_path / f"{part}")]
        subprocess.run([*line, *place], env=ENVIRONMENT, check=True, capture_output=True)

    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        ray.get([encode.remote(part) for part in (1, 2)])
    finally:
        ray.shutdown()
    digest = load_autoencoder(model)[1]
    whole = LatentSet(tmp_path / "whole", autoencoder=digest)
    parts = LatentSet(tmp_path / "1", tmp_path / "2", autoencoder=digest)
    assert [item.id for item in parts.items] == [item.id for item in whole.items]
    for one, other in zip(whole.items, parts.items, strict=True):
        assert torch.equal(whole.read(one), parts.read(other))
