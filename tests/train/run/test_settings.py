"""Settings of trainings: presets that build on others, and those that earlier versions stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.schema import Config, ConfigError
from sa3_torch.train.clap.stage import ClapConfig
from sa3_torch.train.few_steps.ode_warmup import OdeWarmupConfig
from sa3_torch.train.few_steps.posttrain import PosttrainConfig
from sa3_torch.train.flow.pretrain import PretrainConfig
from sa3_torch.train.run.settings import RUN_FORMAT, keep_settings, load_settings

# What the versions before 2026-12 wrote beside runs of the demo presets.
CLIPS = (
    '"clips": {"buckets": 4, "mask_shares": %s, "shares": {"chord": %s, "drum": 0.32, "noise": 0.08, "note": %s, '
    '"sample": 0.0, "user": 1.0}, "silence_seconds": 0.5}'
)
ADAM = (
    '{"beta1": %s, "beta2": 0.95, "clip_norm": 1.0, "final_learning_rate": %s, "inverse_gamma": 0.0, '
    '"learning_rate": %s, "muon": null, "schedule": "cosine", "warmup_steps": %s, "weight_decay": 0.01}'
)
TRAIN = (
    '"train": {"accumulate": 1, "batch": 16, "checkpoint_blocks": false, "compile": false, "ema_after": 0, '
    '"ema_decay": 0.999, "ema_every": %s, "milestone_every": 0, "parallel": "ddp", "precision": "bf16", '
    '"save_every": 250, "seed": 0, "steps": %s, "validate_every": %s}'
)
MASKS = "[0.1, 0.8, 0.1]"
STORED: dict[str, tuple[type[Config], str]] = {
    "ode-warmup": (
        OdeWarmupConfig,
        f'{{{CLIPS % (MASKS, 0.1, 0.5)}, "context_weight": 1.0, "optimizer": {ADAM % (0.9, 3e-05, 0.0003, 20)}, '
        '"teacher": {"apg": 0.0, "first_share": 0.75, "guidance": 3.0, "refresh_rate": 2, "renoised_share": 0.5, '
        f'"steps": 15}}, {TRAIN % (1, 1200, 250)}, "weight_power": 0.0}}',
    ),
    "pretrain": (
        PretrainConfig,
        f'{{{CLIPS % ("[0.1, 0.8, 0.1, 0.0]", 0.1, 0.5)}, "context_weight": 1.0, "coupling": "off", '
        '"demo": {"guidance": 4.0, "sampler": "euler", "steps": 30}, "normalize": "none", '
        f'"optimizer": {ADAM % (0.9, 3e-05, 0.0012, 200)}, "prompt_dropout": 0.1, "start": "all", "times": '
        '{"length": "valid", "one_shot": 0.0, "sampler": "truncated_logit_normal", "shift": {"end": 1.15, "rate": 0.0, '
        '"start": 0.5, "type": "full"}, "shift_max_frames": 128, "shift_min_frames": 8}, '
        f'{TRAIN % (1, 8000, 500)}, "train_text": true}}',
    ),
    "posttrain": (
        PosttrainConfig,
        f'{{"clap_max_noise": 0.5, {CLIPS % (MASKS, 0.25, 0.35)}, "contrastive_scale": 1.0, "discriminator": '
        f'{ADAM % (0.0, 0.0001, 0.001, 20)}, "discriminator_noise": {{"family": "truncated_logit_normal", '
        '"one_shot": 0.0, "shifted": true}, "discriminator_steps": 1, "generator": '
        f'{ADAM % (0.0, 3e-06, 3e-05, 20)}, "generator_noise": {{"family": "sampling_log_snr", "one_shot": 0.2, '
        '"shifted": false}, "head": {"groups": 16, "kernel": 3, "kind": "conv", "layers": 2, "width": 128}, '
        '"own_sample_share": 0.5, "own_sample_steps": 1, "penalty_step": 0.01, "shift_max_frames": 128, '
        f'"shift_min_frames": 8, "taps": [1, 2], {TRAIN % (2, 500, 300)}, "weights": {{"centring": 0.001, '
        '"clap": 10.0, "contrastive": 1.0, "discriminator": 1.0, "feature_matching": 0.0, "generator": 1.0, '
        '"gradient_penalty": 100.0}}',
    ),
}


@pytest.mark.parametrize("stage", STORED)
def test_runs_of_earlier_versions_go_on(stage: str, tmp_path: Path) -> None:
    kind, stored = STORED[stage]
    stored = json.dumps({**json.loads(stored), "autoencoder": "sha256:1"}, sort_keys=True) + "\n"
    (tmp_path / "settings.json").write_text(stored)
    same = load_settings(kind, stage, "first", ())
    keep_settings(tmp_path, same, {"autoencoder": "sha256:1", "clap": ""}, resumed=True)
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert kept["format"] == RUN_FORMAT and kept["train"] == same.to_dict()["train"]
    (tmp_path / "settings.json").write_text(stored)
    keep_settings(tmp_path, same, {"autoencoder": "sha256:1", "latents": "sha256:3"}, resumed=True)  # it knew none
    with pytest.raises(ConfigError, match=r"a run with latents = 'sha256:3', now it is 'sha256:4'; choose"):
        keep_settings(tmp_path, same, {"autoencoder": "sha256:1", "latents": "sha256:4"}, resumed=True)
    (tmp_path / "settings.json").write_text(stored)
    with pytest.raises(ConfigError, match=r"a run with autoencoder = 'sha256:1', now it is 'sha256:2'; choose"):
        keep_settings(tmp_path, same, {"autoencoder": "sha256:2"}, resumed=True)
    other = load_settings(kind, stage, "first", ("train.seed=1",))
    with pytest.raises(ConfigError, match=r"train\.seed = 0, now it is 1; choose another folder"):
        keep_settings(tmp_path, other, {"autoencoder": "sha256:1"}, resumed=True)


def test_weights_that_a_run_began_with_do_not_stand_in_the_place_of_a_setting(tmp_path: Path) -> None:
    """As they did in earlier versions, whose runs go on."""
    config, weights = load_settings(PretrainConfig, "pretrain", "first", ()), {"start_weights": "sha256:1"}
    keep_settings(tmp_path, config, weights, resumed=False)
    path = tmp_path / "settings.json"
    stored = json.loads(path.read_text())
    assert (stored["start"], stored.pop("start_weights")) == ("all", "sha256:1")
    path.write_text(json.dumps(stored | {"start": "sha256:1"}))
    keep_settings(tmp_path, config, weights, resumed=True)
    with pytest.raises(ConfigError, match=r"start_weights = 'sha256:1', now it is 'sha256:2'; choose another folder"):
        keep_settings(tmp_path, config, {"start_weights": "sha256:2"}, resumed=True)
    with pytest.raises(ValueError, match="names of settings: start"):
        keep_settings(tmp_path, config, {"start": "sha256:1"}, resumed=True)


@pytest.mark.parametrize("change", ["parallel=fsdp", "accumulate=2", "checkpoint_blocks=true", "compile=true"])
def test_a_run_goes_on_elsewhere_or_faster(change: str, tmp_path: Path) -> None:
    first, then = (
        load_settings(PretrainConfig, "pretrain", "first", changes) for changes in ((), (f"train.{change}",))
    )
    keep_settings(tmp_path, first, {}, resumed=False)
    keep_settings(tmp_path, then, {}, resumed=True)
    assert (
        json.loads((tmp_path / "settings.json").read_text())["train"]
        == then.to_dict()["train"]
        != first.to_dict()["train"]
    )


def test_a_run_with_a_setting_that_went_does_not_go_on(tmp_path: Path) -> None:
    kind, stored = STORED["pretrain"]
    (tmp_path / "settings.json").write_text(stored.replace('"coupling": "off"', '"coupling": "exact"'))
    with pytest.raises(ConfigError, match="coupling is 'exact': this setting went, only 'off' is left"):
        keep_settings(tmp_path, load_settings(kind, "pretrain", "first", ()), {}, resumed=True)


def test_words_of_earlier_versions_are_understood() -> None:
    changes = ("teacher.steps=4", "teacher.guidance=2.0", "teacher.apg=0.5")
    teacher = load_settings(OdeWarmupConfig, "ode-warmup", "first", changes).teacher
    assert teacher.sampling == Sampling(sampler="dpmpp", steps=4, guidance=Guidance(scale=2.0, apg=0.5))
    none = load_settings(OdeWarmupConfig, "ode-warmup", "first", ("teacher.guidance=1",)).teacher
    assert none.sampling.guidance == Guidance()
    pretrain = load_settings(PretrainConfig, "pretrain", "first", ("coupling=off", "demo.guidance=3"))
    assert pretrain.demo.guidance == Guidance(scale=3.0)
    with pytest.raises(ConfigError, match="coupling is 'exact': this setting went"):
        load_settings(PretrainConfig, "pretrain", "first", ("coupling=exact",))


def test_what_a_preset_leaves_out_can_be_set() -> None:
    changes = ("demo.guidance.rescale=0.7", "demo.guidance.interval=[0.2, 1.0]")
    pretrain = load_settings(PretrainConfig, "pretrain", "first", changes)
    assert pretrain.demo.guidance == Guidance(scale=4.0, rescale=0.7, interval=(0.2, 1.0))
    with pytest.raises(ConfigError, match="unknown key 'rescaled'; allowed: scale, apg, rescale"):
        load_settings(PretrainConfig, "pretrain", "first", ("demo.guidance.rescaled=0.7",))


def test_a_file_says_what_differs_from_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "full"\nbuckets = 2\n[tower]\ndepth = 1\n')
    mine, full = (load_settings(ClapConfig, "clap", name, ()) for name in (str(path), "full"))
    assert (mine.buckets, mine.tower.depth) == (2, 1) and mine.tower.width == full.tower.width
    assert mine.train == full.train and mine.shares == full.shares
    for base, message in (
        ('"nothing"', "no settings 'nothing' for clap"),
        ("3", "base is 3"),
        (f'"{path}"', "base is"),
    ):
        path.write_text(f"base = {base}\n")
        with pytest.raises(ConfigError, match=message):
            load_settings(ClapConfig, "clap", str(path), ())


def test_a_run_may_be_lengthened_and_not_shortened(tmp_path: Path) -> None:
    short, long = (load_settings(PretrainConfig, "pretrain", "first", (f"train.steps={n}",)) for n in (4, 5))
    keep_settings(tmp_path, short, {}, resumed=False)
    keep_settings(tmp_path, long, {}, resumed=True)
    with pytest.raises(ConfigError, match=r"a run with train\.steps = 5, now it is 4; choose another folder"):
        keep_settings(tmp_path, short, {}, resumed=True)


@pytest.mark.parametrize("text", ['{"editor.fontSize": 12}', "[]", "no JSON"])
def test_settings_of_something_else_are_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(ConfigError, match=r"settings\.json"):
        keep_settings(tmp_path, load_settings(PretrainConfig, "pretrain", "first", ()), {}, resumed=False)
    assert (tmp_path / "settings.json").read_text() == text
