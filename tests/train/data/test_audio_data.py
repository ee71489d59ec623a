"""Clip caches and shards as the data of an autoencoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("webdataset", reason="the training extra is not installed")

from sa3_mlx.cli.app import run
from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.autoencoder.stage import AutoencoderConfig, AutoencoderStage
from sa3_torch.train.data.audio_data import AudioData, open_audio
from sa3_torch.train.data.crops import ShardCrops
from sa3_torch.train.data.packing import write_shards
from sa3_torch.train.run.settings import load_settings
from tests.support.stages import MODEL, SHORT, train

pytestmark = pytest.mark.usefixtures("no_pictures")

SETTINGS = (*SHORT, "train.batch=4", "train.steps=2", "crop_samples=8192", "shards.streams=2", "shards.window=3")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten recordings in five shards; the first sample of the last shard begins with silence."""
    folder, out, random = tmp_path_factory.mktemp("sounds"), tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for i in range(10):
        audio = 0.2 * random.standard_normal((16_000, 2))
        audio[: 16_000 if i == 8 else 0] = 0
        soundfile.write(folder / f"{i}.wav", audio, 44_100)
        (folder / f"{i}.txt").write_text(f"noise {i}")
    write_shards(folder, out, shard_bytes=100_000, captions_required=True)
    return out


def stage_of(data: AudioData, *changes: str) -> AutoencoderStage:
    config = load_settings(AutoencoderConfig, "autoencoder", "first", (*SETTINGS, *changes))
    return AutoencoderStage(MODEL, config, data.clips, shards=data.shards)


def test_the_last_shard_is_held_out(packed: Path, tmp_path: Path) -> None:
    data = open_audio(str(packed), tmp_path)
    assert data.shards is not None and data.shards.samples == 8
    assert [(clip.id, clip.captions, clip.split) for clip in data.clips.clips] == [
        ("9.wav", ("noise 9",), "validation")
    ]
    made = (tmp_path / "held-out" / "index.json").stat().st_mtime_ns
    again = open_audio(str(packed / "index.json"), tmp_path)
    assert again.digest == data.digest != ""
    assert (tmp_path / "held-out" / "index.json").stat().st_mtime_ns == made


def test_shards_without_an_index_are_indexed_once(packed: Path, tmp_path: Path) -> None:
    place = f"{packed}/audio-{{000000..000002}}.tar"
    data = open_audio(place, tmp_path)
    assert data.shards is not None and data.shards.samples == 4
    (index,) = tmp_path.glob("shards-*.json")
    made = index.stat().st_mtime_ns
    assert open_audio(place, tmp_path).digest == data.digest and index.stat().st_mtime_ns == made
    with pytest.raises(ValueError, match="only one shard; the last one is held out"):
        open_audio(f"{packed}/audio-000000.tar", tmp_path)


def test_a_clip_cache_is_its_own_held_out_set(workspace: Path, tmp_path: Path) -> None:
    data = open_audio(str(workspace / "clips"), tmp_path)
    assert data.shards is None and data.digest == data.clips.digest() and data.clips.select("validation")
    with pytest.raises(FileNotFoundError, match=r"no index\.json"):
        open_audio(str(tmp_path), tmp_path)


def test_an_autoencoder_trains_on_shards(packed: Path, tmp_path: Path) -> None:
    stage = stage_of(open_audio(str(packed), tmp_path))
    assert isinstance(stage.crops, ShardCrops)
    train(stage, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("validation/si_sdr" in row for row in rows)
    config = load_settings(AutoencoderConfig, "autoencoder", "first", SETTINGS).to_dict()
    del config["shards"]
    data = open_audio(str(packed), tmp_path)
    with pytest.raises(ConfigError, match=r"the settings have no table \[shards\]"):
        AutoencoderStage(MODEL, AutoencoderConfig.from_dict(config), data.clips, shards=data.shards)


def test_the_command_takes_shards_and_refuses_to_go_on_with_others_or_at_another_stride(
    packed: Path, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [f"--set={line}" for line in (*SETTINGS, "train.steps=1", "crop_samples=16384")]
    command = ["train", "autoencoder", "--out", str(tmp_path / "run"), *changes]
    assert run([*command, "--data", str(packed)]) == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert run([*command, "--data", str(workspace / "clips")]) == 2
    assert "holds a run with data = " in capsys.readouterr().err
    assert run([*command, "--data", str(packed), "--stride", "8"]) == 2
    assert "holds a run with stride = None, now it is 8" in capsys.readouterr().err
