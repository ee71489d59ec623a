"""What the stages read, refuse and leave: caches, latents, settings, a model that runs. See also test_stages.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")


from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.autoencoder.stage import AutoencoderConfig
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.data.encode.pre_encode import load_autoencoder
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.flow.pretrain import PretrainConfig, PretrainStage
from sa3_torch.train.run.settings import load_settings
from tests.support.stages import DEMO, MODEL, SHORT, autoencoder_stage, pretrain_stage, train

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def autoencoder(workspace: Path) -> Path:
    return workspace / "run" / "model"


@pytest.fixture
def latents(workspace: Path, autoencoder: Path) -> LatentSet:
    return LatentSet(workspace / "latents", autoencoder=load_autoencoder(autoencoder)[1])


def test_trained_model_loads_strictly_and_makes_finite_audio(workspace: Path, tmp_path: Path) -> None:
    from sa3_mlx.common.generation.request import Item, Request
    from sa3_torch.pipeline import Pipeline
    from sa3_torch.weights import load_model

    train(pretrain_stage(workspace, "train.steps=2", "train.validate_every=2"), tmp_path / "run")
    folder = tmp_path / "run" / "model"
    assert ModelConfig.load(folder) == MODEL
    load_model(folder, torch.device("cpu"))
    request = Request(
        items=(Item(prompt="piano note A3", seconds=0.5, seed=1),), sampling=Sampling(sampler="euler", steps=2)
    )
    audio = Pipeline.load(folder).generate(request).audio[0]
    assert audio.shape == (22_050, 2) and np.isfinite(audio).all()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("validation/shuffled_ratio" in row for row in rows)


def test_the_autoencoder_trains_on_augmented_crops(workspace: Path) -> None:
    changes = (
        "train.batch=16",
        "augment.chirps_per_16=1",
        "augment.silence=0.2",
        "augment.tail=0.5",
        "augment.pan=1.0",
    )
    stage = autoencoder_stage(workspace, *changes)
    assert stage.crops.batch(0).audio.shape[0] == 17
    assert all(torch.isfinite(term) for term in stage.losses(0).values())


def test_copies_are_shifted_versions_of_training_clips_only(latents: LatentSet) -> None:
    copies = [item for item in latents.items if item.id.endswith("+1")]
    assert len(copies) == 12 and all(item.split == "train" for item in copies)
    first = next(item for item in latents.items if item.id == "0")
    second = next(item for item in latents.items if item.id == "0+1")
    assert second.frames in (first.frames, first.frames + 1) and second.seconds == first.seconds
    assert not torch.equal(latents.read(first), latents.read(second)[: first.frames])


def test_latents_of_another_autoencoder_are_refused(latents: LatentSet) -> None:
    with pytest.raises(ValueError, match="was encoded by autoencoder"):
        LatentSet(latents.folders[0], autoencoder="sha256:other")


def test_settings_that_no_model_can_run_are_named(
    workspace: Path, latents: LatentSet, autoencoder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="crop_samples is 8200: test needs a multiple of 2048"):
        autoencoder_stage(workspace, "crop_samples=8200")
    for change, message in (
        ("clips.buckets=0", "buckets is 0"),
        ("clips.mask_shares=[1.0]", "expected shares of segments, full"),
        ("demo.sampler='heun'", "allowed are euler"),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain_stage(workspace, change)
    same, _ = load_autoencoder(autoencoder)
    config = load_settings(PretrainConfig, "pretrain", "first", SHORT)
    with pytest.raises(ValueError, match="the autoencoder is not that of first"):
        PretrainStage(DEMO, config, latents, tmp_path / "tokenizer.json", same)


def test_damaged_caches_are_refused_in_one_line(tmp_path: Path) -> None:
    for text, message in (
        ("{}", "expected format sa3-clips/1, got None"),
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object, got list"),
    ):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ClipSet(tmp_path)


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("nothing", (), "no settings 'nothing' for autoencoder; presets: first, music, music-decoder, same-l, "),
        ("first", ("steps=3",), "unknown key 'steps'"),
        ("first", ("train.stepz=3",), "unknown key 'stepz'"),
        ("first", ("train.steps",), "expected key=value"),
        ("first", ("optimiser.lr=3",), "there is no table 'optimiser'"),
        ("first", ("train.steps=many",), "train.steps: expected int, got 'many'"),
        ("first", ("train.precision=fp8",), "allowed: 'bf16', 'fp32', 'auto'"),
        ("missing.toml", (), "no settings 'missing.toml'"),
        ("first", ("train.batch=0",), "batch is 0: allowed is at least 1"),
        ("first", ("train.batch=1000000",), "batch is 1000000: allowed is 1 to 16384"),
        ("first", (f"train.seed={10**400}",), r"train\.seed: must be below 2\^63, got 1000"),
        ("first", ("train.save_every=0",), "save_every is 0"),
        ("first", ("train.milestone_every=7",), "milestone_every is 7: allowed are multiples of save_every"),
        ("first", ("generator.schedule=linear",), "allowed: 'cosine', 'inverse'"),
        ("first", ("train.ema_decay=2.0",), "ema_decay is 2.0"),
        ("first", ("spectral.overlap=0",), "multiples of overlap"),
        ("first", ("crop_samples=1000",), "crop_samples is 1000: less than the window of"),
    ],
)
def test_bad_settings_are_named(source: str, change: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(AutoencoderConfig, "autoencoder", source, change)


def test_own_recordings_train_an_autoencoder(tmp_path: Path) -> None:
    """Recordings with captions are imported, drawn, and validated on."""
    import soundfile as sf

    from sa3_torch.train.data.user_folder import import_folder

    random = np.random.default_rng(2)  # of integers: the files, whose hashes decide, are the same on every machine
    (tmp_path / "in").mkdir()
    for number in range(12):
        sf.write(tmp_path / "in" / f"{number}.wav", random.integers(-8000, 8000, (12_000, 2), dtype=np.int16), 44_100)
        (tmp_path / "in" / f"{number}.txt").write_text(f"noise {number}\n")
    clips, report = import_folder(tmp_path / "in", tmp_path / "cache", captions_required=True)
    assert report.imported == 12
    assert clips.select("validation"), "the split of these files by hash holds none out"
    assert len(clips.clips) == 12
    (tmp_path / "cache").rename(tmp_path / "clips")
    train(autoencoder_stage(tmp_path, "train.steps=2"), tmp_path / "run")
