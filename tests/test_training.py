"""Both stages on a tiny configuration: they learn one batch, resume bit-identically, and end in a model that runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from tiny_checkpoint import write_checkpoint  # noqa: E402

from sa3_mlx.spec.calibration import Prompt  # noqa: E402
from sa3_mlx.spec.config import ConfigError, ModelConfig  # noqa: E402
from sa3_mlx.spec.presets import PRESETS  # noqa: E402
from sa3_torch.train.autoencoder import AutoencoderConfig, AutoencoderStage  # noqa: E402
from sa3_torch.train.clips import ClipSet, Draft, write_clips  # noqa: E402
from sa3_torch.train.encode import EncodeConfig, PreEncoder, load_autoencoder  # noqa: E402
from sa3_torch.train.latents import LatentSet  # noqa: E402
from sa3_torch.train.loop import Stage, Trainer, learning_rate_at  # noqa: E402
from sa3_torch.train.pretrain import PretrainConfig, PretrainStage  # noqa: E402
from sa3_torch.train.quantize import QuantizeConfig, QuantizeStage  # noqa: E402
from sa3_torch.train.settings import load_settings, to_json  # noqa: E402
from sa3_torch.train.sources import ClipSource  # noqa: E402
from sa3_torch.train.vocabulary import save_tokenizer  # noqa: E402

DEMO = PRESETS["demo"]
assert DEMO.diffusion is not None
MODEL = dataclasses.replace(
    DEMO,
    name="test",
    same=dataclasses.replace(DEMO.same, width=64, encoder_depth=1, decoder_depth=1, latent_channels=16),
    diffusion=dataclasses.replace(
        DEMO.diffusion, max_frames=48, dit=dataclasses.replace(DEMO.diffusion.dit, width=64, depth=1, memory_tokens=2)
    ),
)
SHORT = ("train.compile=false", "train.precision='fp32'", "train.warmup_steps=1", "train.validate_every=1000")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipSet:
    """Eight short tones and eight bursts of noise, a few of each held out."""
    random = np.random.default_rng(5)

    def draft(number: int) -> Draft:
        time = np.arange(16_000) / 44_100
        note = number % 2 == 0
        audio = np.sin(2 * np.pi * 220 * 2 ** (number / 12) * time) if note else random.standard_normal(16_000)
        return Draft(
            id=f"{number}", captions=("piano note A3",) if note else ("white noise",), kind="note" if note else "noise",
            label="note" if note else "white", instrument="piano" if note else None, midi=57 + number if note else None,
            split="validation" if number >= 12 else "train", audio=(0.3 * audio).astype(np.float32),
        )  # fmt: skip

    return write_clips(tmp_path_factory.mktemp("clips"), map(draft, range(16)), channels=1, about={})


def autoencoder_stage(clips: ClipSet, *changes: str) -> AutoencoderStage:
    config = load_settings(
        AutoencoderConfig, "autoencoder", "demo", (*SHORT, "train.batch=2", "crop_samples=8192", *changes)
    )
    return AutoencoderStage(MODEL, config, clips)


@pytest.fixture(scope="module")
def autoencoder(clips: ClipSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    stage = autoencoder_stage(clips, "train.steps=2")
    assert Trainer(stage, stage.config.train, folder, to_json(stage.config)).run()
    return folder / "model"


@pytest.fixture(scope="module")
def latents(clips: ClipSet, autoencoder: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentSet:
    config = EncodeConfig(copies=2, seed=0, shard_frames=100, chunk_frames=None)
    return PreEncoder(ClipSource(clips, 2), autoencoder, tmp_path_factory.mktemp("latents"), config).run()


def pretrain_stage(latents: LatentSet, autoencoder: Path, tmp_path: Path, *changes: str) -> PretrainStage:
    config = load_settings(PretrainConfig, "pretrain", "demo", (*SHORT, "train.batch=4", "buckets=1", *changes))
    same, _ = load_autoencoder(autoencoder)
    save_tokenizer(tmp_path / "tokenizer.json")
    return PretrainStage(MODEL, config, latents, tmp_path / "tokenizer.json", same)


def quantize_stage(folder: Path, *changes: str) -> QuantizeStage:
    prompts = tuple(Prompt(0.2, text) for text in ("kick", "snare", "bell low", "rain"))
    settings = (*SHORT, "train.batch=2", "recipe='3bit'", "rounds=1")
    return QuantizeStage(folder, load_settings(QuantizeConfig, "quantize", "demo", (*settings, *changes)), prompts)


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every weight matters in it, unlike in a model after two steps."""
    return write_checkpoint(tmp_path_factory.mktemp("random") / "model", MODEL)


@pytest.fixture(params=["autoencoder", "pretrain", "quantize"])
def make_stage(request: pytest.FixtureRequest, clips: ClipSet, tmp_path: Path):
    """(changes) -> a fresh stage; parametrised over all stages."""
    if request.param == "autoencoder":
        return lambda *changes: autoencoder_stage(clips, *changes)
    if request.param == "quantize":
        model = request.getfixturevalue("random_model")
        return lambda *changes: quantize_stage(model, *changes)
    folder, data = request.getfixturevalue("autoencoder"), request.getfixturevalue("latents")
    return lambda *changes: pretrain_stage(data, folder, tmp_path, *changes)


def test_stage_learns_one_batch(make_stage) -> None:
    stage = make_stage("train.steps=1")
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=3e-3)
    values = []
    for _ in range(60):
        loss = sum(stage.losses(0).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(float(loss.detach()))
    assert values[-1] < 0.6 * values[0], (values[0], values[-1])


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make_stage, tmp_path: Path) -> None:
    def run(folder: Path, stop_at: int | None) -> Stage:
        stage = make_stage("train.steps=6", "train.save_every=1000")
        trainer = Trainer(stage, stage.config.train, folder, to_json(stage.config))
        if stop_at is not None:
            inner = stage.losses

            def losses(step: int):
                trainer.stop = step == stop_at
                return inner(step)

            stage.losses = losses
        assert trainer.run() == (stop_at is None)
        return stage

    whole = run(tmp_path / "whole", None)
    run(tmp_path / "halves", 2)
    resumed = run(tmp_path / "halves", None)
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_other_settings_are_refused_on_resume(clips: ClipSet, tmp_path: Path) -> None:
    stage = autoencoder_stage(clips, "train.steps=1")
    Trainer(stage, stage.config.train, tmp_path, to_json(stage.config)).run()
    other = autoencoder_stage(clips, "train.steps=2")
    with pytest.raises(ConfigError, match="other settings"):
        Trainer(other, other.config.train, tmp_path, to_json(other.config))


def test_non_finite_loss_is_skipped_then_named(clips: ClipSet, tmp_path: Path) -> None:
    stage = autoencoder_stage(clips, "train.steps=50")
    inner = stage.losses
    stage.losses = lambda step: {**inner(step), "waveform": inner(step)["waveform"] * (torch.nan if step < 3 else 1)}
    before = {name: tensor.clone() for name, tensor in stage.model.named_parameters()}
    trainer = Trainer(stage, dataclasses.replace(stage.config.train, steps=2), tmp_path, "{}")
    trainer.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.model.named_parameters())
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["skipped"] for row in rows if "skipped" in row] == [["waveform"]] * 2
    stage.losses = lambda step: {"waveform": inner(step)["waveform"] * torch.nan}
    with pytest.raises(RuntimeError, match="waveform not finite in 10 steps"):
        Trainer(stage, stage.config.train, tmp_path / "again", "{}").run()


def test_trained_model_loads_strictly_and_makes_finite_audio(
    latents: LatentSet, autoencoder: Path, tmp_path: Path
) -> None:
    from sa3_mlx.spec.request import Item, Request
    from sa3_torch.pipeline import Pipeline
    from sa3_torch.weights import load_model

    stage = pretrain_stage(latents, autoencoder, tmp_path, "train.steps=2", "train.validate_every=2")
    assert Trainer(stage, stage.config.train, tmp_path / "run", to_json(stage.config)).run()
    folder = tmp_path / "run" / "model"
    assert ModelConfig.load(folder) == MODEL
    load_model(folder, torch.device("cpu"))
    request = Request(items=(Item(prompt="piano note A3", seconds=0.5, seed=1),), steps=2, sampler="euler")
    audio = Pipeline.load(folder).generate(request).audio[0]
    assert audio.shape == (22_050, 2) and np.isfinite(audio).all()
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("validation/shuffled_ratio" in row for row in rows)


def test_the_autoencoder_trains_on_augmented_crops(clips: ClipSet) -> None:
    changes = (
        "train.batch=16",
        "augment.chirps_per_16=1",
        "augment.silence=0.2",
        "augment.tail=0.5",
        "augment.pan=1.0",
    )
    stage = autoencoder_stage(clips, *changes)
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
        LatentSet(latents.folder, autoencoder="sha256:other")


def test_settings_that_no_model_can_run_are_named(
    clips: ClipSet, latents: LatentSet, autoencoder: Path, tmp_path: Path
):
    with pytest.raises(ConfigError, match="crop_samples is 8200: test needs a multiple of 2048"):
        autoencoder_stage(clips, "crop_samples=8200")
    for change, message in (("buckets=0", "buckets is 0"), ("mask_shares=[1.0]", "expected shares of segments, full")):
        with pytest.raises(ConfigError, match=message):
            pretrain_stage(latents, autoencoder, tmp_path, change)
    same, _ = load_autoencoder(autoencoder)
    config = load_settings(PretrainConfig, "pretrain", "demo", SHORT)
    with pytest.raises(ValueError, match="the autoencoder is not that of demo"):
        PretrainStage(DEMO, config, latents, tmp_path / "tokenizer.json", same)


def test_damaged_caches_and_runs_are_refused_in_one_line(clips: ClipSet, tmp_path: Path) -> None:
    for text, message in (("{}", "expected format sa3-clips/1, got None"), ("{", "not valid JSON"), ("[]", "got None")):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            ClipSet(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"junk")
    stage = autoencoder_stage(clips, "train.steps=1")
    with pytest.raises(ValueError, match="cannot be resumed from"):
        Trainer(stage, stage.config.train, tmp_path, to_json(stage.config))


def test_learning_rate_warms_up_and_ends_at_its_floor() -> None:
    config = load_settings(
        AutoencoderConfig, "autoencoder", "demo", ("train.steps=1000", "train.warmup_steps=10")
    ).train
    rates = [learning_rate_at(config, step) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1 * config.learning_rate)
    assert rates[9] == pytest.approx(config.learning_rate, rel=1e-3)
    assert rates[1000] == pytest.approx(config.final_learning_rate)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("nothing", (), "no settings 'nothing' for autoencoder; presets: demo"),
        ("demo", ("steps=3",), "unknown key 'steps'"),
        ("demo", ("train.stepz=3",), "unknown key 'stepz'"),
        ("demo", ("train.steps",), "expected key=value"),
        ("demo", ("optimizer.lr=3",), "there is no table 'optimizer'"),
        ("demo", ("train.steps=many",), "train.steps: expected int, got 'many'"),
        ("demo", ("train.precision=fp8",), "allowed: 'bf16', 'fp32'"),
        ("missing.toml", (), "no settings 'missing.toml'"),
        ("demo", ("train.batch=0",), "batch is 0: allowed is at least 1"),
        ("demo", ("train.save_every=0",), "save_every is 0"),
        ("demo", ("train.ema_decay=2.0",), "ema_decay is 2.0"),
        ("demo", ("spectral.overlap=0",), "multiples of overlap"),
        ("demo", ("crop_samples=1000",), "crop_samples is 1000: less than the window of"),
    ],
)
def test_bad_settings_are_named(source: str, change: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(AutoencoderConfig, "autoencoder", source, change)


def test_own_recordings_train_an_autoencoder(tmp_path: Path) -> None:
    """Recordings with captions are imported, drawn, and validated on."""
    import soundfile as sf

    from sa3_torch.train.user_folder import import_folder

    random = np.random.default_rng(2)  # of integers: the files, whose hashes decide, are the same on every machine
    (tmp_path / "in").mkdir()
    for number in range(12):
        sf.write(tmp_path / "in" / f"{number}.wav", random.integers(-8000, 8000, (12_000, 2), dtype=np.int16), 44_100)
        (tmp_path / "in" / f"{number}.txt").write_text(f"noise {number}\n")
    clips, report = import_folder(tmp_path / "in", tmp_path / "cache", captions_required=True)
    assert report.imported == 12
    assert clips.select("validation"), "the split of these files by hash holds none out"
    stage = autoencoder_stage(clips, "train.steps=2")
    assert Trainer(stage, stage.config.train, tmp_path / "run", to_json(stage.config)).run()
