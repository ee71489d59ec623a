"""ODE warm-up: what the teacher's runs are, what is kept of them, and what a student learns [T5]."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import ConfigError
from sa3_torch.dit import Prepared
from sa3_torch.train.data.encode.pre_encode import load_autoencoder
from sa3_torch.train.few_steps.denoiser import few_step_config
from sa3_torch.train.few_steps.ode_warmup import OdeWarmupStage
from sa3_torch.train.flow import demo
from sa3_torch.train.flow.model import PARENTS_FILE
from sa3_torch.train.run.optimizers import Group, make_optimizer
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.planning.count import count_step, make_fake, networks_of, trained_of
from tests.support.stages import MODEL, ode_warmup_stage
from tests.support.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")

DATA_STD = 0.6


class GaussianDiT:
    """The velocity of the flow of N(0, 0.6^2) data, E[eps | x] - E[z | x], in place of a DiT."""

    def prepare(self, cond) -> Prepared:
        return Prepared(contexts=(None,), local=(None,), seconds=torch.zeros(len(cond.seconds), 1), valid=None)

    def modulation(self, t, _seconds):
        return t[:, None]

    def velocity(self, x, modulation, _prepared):
        t = modulation[:, None]
        variance = (1 - t) ** 2 * DATA_STD**2 + t**2
        return x * (t - (1 - t) * DATA_STD**2) / variance


def analytic(x, t):
    """Where the flow of Gaussian data takes x: its quantile stays the same."""
    t = t[:, None, None]
    return x * DATA_STD / ((1 - t) ** 2 * DATA_STD**2 + t**2).sqrt()


def gaussian_stage(workspace: Path) -> OdeWarmupStage:
    stage = ode_warmup_stage(
        workspace, "teacher.sampling.steps=100", "teacher.sampling.guidance=1.0", "clips.mask_shares=[0.0, 1.0, 0.0]"
    )
    stage.teacher.dit = torch.nn.Identity()
    stage.teacher.dit.streamed = False
    stage.teacher.dit.prepare, stage.teacher.dit.modulation = GaussianDiT().prepare, GaussianDiT().modulation
    stage.teacher.dit.velocity = GaussianDiT().velocity
    return stage


def test_with_a_gaussian_teacher_the_analytic_map_has_the_least_loss(workspace: Path) -> None:
    """Measured: 3e-4, as the sampler takes 100 steps; 4e-3 with a map that is 10 % off."""
    stage = gaussian_stage(workspace)

    def loss_of(map_) -> float:
        stage.denoiser = lambda x, t, _: map_(x, t)  # type: ignore[assignment]
        return float(sum(stage.losses(step)["one_step"] for step in range(4))) / 4

    exact = loss_of(analytic)
    assert exact < 1e-3
    for factor in (0.9, 1.1):
        assert loss_of(lambda x, t, factor=factor: factor * analytic(x, t)) > 3 * exact


def test_states_begin_with_noise_and_end_before_the_result(workspace: Path) -> None:
    stage = ode_warmup_stage(workspace, "teacher.renoised_share=0.0")
    run = stage.trajectory(0)
    count, frames, channels = run.result.shape
    assert run.states.shape == (3, count, frames, channels) and run.times.shape == (3, count)
    assert torch.equal(run.times[0], torch.ones(count)) and bool((run.times[1:] < run.times[:-1]).all())
    assert abs(float(run.states[0].std()) - 1) < 0.05
    picks = torch.tensor([2, 0, 1, 2])
    x, t = run.at(picks)
    assert all(torch.equal(x[i], run.states[k, i]) and t[i] == run.times[k, i] for i, k in enumerate(picks.tolist()))


def test_some_trajectories_begin_with_data_and_noise(workspace: Path) -> None:
    """Below t = 1 the first state is (1 - t) z + t eps with the noise that a trajectory from t = 1 begins with."""
    pure = ode_warmup_stage(workspace, "train.batch=64", "teacher.renoised_share=0.0").trajectory(0)
    stage = ode_warmup_stage(workspace, "train.batch=64", "teacher.renoised_share=0.5")
    run, z = stage.trajectory(0), stage.latents.train.batch(0).latents
    t, noise = run.times[0], pure.states[0]
    assert 16 < int((t < 1).sum()) < 48 and 0.1 < float(t.min()) < 0.5
    torch.testing.assert_close(run.states[0], (1 - t)[:, None, None] * z + t[:, None, None] * noise)
    assert bool((run.times[1:] < run.times[:-1]).all())
    assert torch.equal(run.states[:, t == 1], pure.states[:, t == 1])


def test_the_teacher_s_guidance_can_leave_out_the_part_along_the_prediction(workspace: Path) -> None:
    """One step of the sampler is linear in the estimate: what guidance adds with apg 1 is orthogonal to what apg 0 has
    beyond it."""

    def first_step(*changes: str) -> torch.Tensor:
        settings = (f"teacher.{change}" for change in ("renoised_share=0.0", *changes))
        return ode_warmup_stage(workspace, *settings, "train.precision=fp32").trajectory(0).states[1].flatten(1)

    without = first_step("sampling.guidance=1")
    plain, orthogonal = (first_step(f"sampling.guidance={{scale=2, apg={apg}}}") for apg in (0.0, 1.0))
    added, left_out = orthogonal - without, plain - orthogonal
    assert bool((added.norm(dim=1) > 1e-4).all()) and bool((left_out.norm(dim=1) > 1e-4).all())
    assert float(torch.cosine_similarity(added, left_out).abs().max()) < 0.02


def test_apg_without_guidance_is_refused(workspace: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.sampling: guidance apg.* have no effect at guidance scale 1"):
        ode_warmup_stage(workspace, "teacher.sampling.guidance={scale=1, apg=0.5}")


def test_a_share_of_items_takes_the_first_state(workspace: Path) -> None:
    stage = ode_warmup_stage(workspace, "train.batch=64", "teacher.renoised_share=0.0", "teacher.first_share=0.6")
    seen = []
    stage.denoiser = lambda x, t, _: seen.append(t) or x  # type: ignore[assignment]
    stage.losses(0)
    assert abs(float((seen[0] == 1).float().mean()) - (0.6 + 0.4 / 3)) < 0.2
    assert len(seen[0].unique()) > 1


def test_stored_trajectories_are_used_with_their_own_captions_and_masks(workspace: Path) -> None:
    """Pitfall 8: between two refreshes no other batch is even read."""
    stage, other = ode_warmup_stage(workspace), ode_warmup_stage(workspace)
    stage.losses(0)
    stage.latents.train.batch = None  # type: ignore[method-assign, assignment]
    stage.latents.masks = None  # type: ignore[method-assign, assignment]
    assert torch.equal(stage.losses(1)["one_step"], other.losses(1)["one_step"])
    assert not torch.equal(other.losses(1)["one_step"], other.losses(0)["one_step"])  # other picks


def test_a_refresh_keeps_nothing_of_the_last_trajectory(workspace: Path) -> None:
    stage = ode_warmup_stage(workspace)
    for stage.batch_slice in BatchSlice().micro_batches(2):
        stage.losses(1)
    assert len(stage._kept) == 2
    stage.losses(2)
    assert [key[0] for key in stage._kept] == [2]


def test_every_item_picks_its_own_step(workspace: Path) -> None:
    stage = ode_warmup_stage(workspace, "train.batch=12", "teacher.sampling.steps=4")
    seen = []
    stage.denoiser = lambda x, t, _: seen.append(t) or x  # type: ignore[assignment]
    stage.losses(0)
    assert len(seen[0].unique()) > 1


def learn(stage: OdeWarmupStage, steps: int) -> None:
    """Steps on the batch of step 0."""
    optimizer = make_optimizer(Group(network=stage.model, optimizer=stage.config.optimizer))
    for _ in range(steps):
        optimizer.zero_grad()
        stage.losses(0)["one_step"].backward()
        optimizer.step()


def test_the_teacher_and_the_text_encoder_stay_as_they_are(workspace: Path) -> None:
    stage = ode_warmup_stage(workspace)
    fixed = {"teacher": stage.teacher, "text": stage.networks.text_encoder}
    before = {key: {name: value.clone() for name, value in fixed[key].state_dict().items()} for key in fixed}
    learn(stage, 2)
    assert not any(module.training for module in stage.teacher.modules())
    for key, module in fixed.items():
        assert all(torch.equal(value, before[key][name]) for name, value in module.state_dict().items())
    assert not torch.equal(stage.networks.dit.project_out.weight, stage.teacher.dit.project_out.weight)
    assert not torch.equal(
        stage.networks.conditioner.seconds_embed.weight, stage.teacher.conditioner.seconds_embed.weight
    )


def test_a_student_learns_one_stored_batch(workspace: Path) -> None:
    """Relative error at its picks after 200 steps; measured: 0.02, from 1.2."""
    stage = ode_warmup_stage(workspace, "optimizer.learning_rate=3e-3")
    learn(stage, 200)
    stage.losses(0)
    assert float(stage.notes["measured/relative_error"]) < 0.05


def test_validation_begins_at_the_error_of_the_base(workspace: Path) -> None:
    with torch.no_grad():
        measures = ode_warmup_stage(workspace).validate()
    ratios = [measures[name] for name in ("one_step_ratio", "ratio", "ratio_t1.000")]
    assert ratios == pytest.approx([1, 1, 1], rel=1e-5)  # two copies of the weights may be summed in other blocks
    assert measures["one_step"] == pytest.approx(measures["one_step_base"]) and measures["one_step"] > 0


def test_validation_leaves_out_the_state_from_which_euler_itself_takes_one_step(workspace: Path) -> None:
    """The base has no error there, and a ratio to it would be infinite."""
    stage = ode_warmup_stage(workspace, "teacher.sampling={sampler='euler',steps=4}")
    with torch.no_grad():
        for parameter in stage.networks.dit.parameters():
            parameter.mul_(1.1)
        measures = stage.validate()
    assert all(math.isfinite(value) for value in measures.values()), measures
    assert sum(name.startswith("ratio_t") for name in measures) == 3


def test_export_is_a_denoiser_with_its_parents(workspace: Path, tmp_path: Path) -> None:
    stage = ode_warmup_stage(workspace)
    stage.export(tmp_path, stage.model.state_dict())
    config = ModelConfig.load(tmp_path)
    assert config == few_step_config(MODEL)
    assert config.usual_sampling == Sampling(sampler="pingpong", steps=8)
    parents = json.loads((tmp_path / PARENTS_FILE).read_text())
    assert parents == {"autoencoder": load_autoencoder(workspace / "run" / "model")[1], "start": stage.parents["start"]}


def test_demos_take_one_four_and_eight_steps(workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sounds = {}
    monkeypatch.setattr(demo, "save_sound", lambda path, audio, *_, **__: sounds.update({path.name: audio}))
    ode_warmup_stage(workspace).demo(tmp_path, 7)
    assert sorted(sounds) == ["000007-1.wav", "000007-4.wav", "000007-8.wav"]
    one, four, eight = sounds.values()
    assert one.shape == four.shape == eight.shape and (one != four).any()


def test_latents_of_another_autoencoder_are_refused(workspace: Path, tmp_path: Path) -> None:
    config = ode_warmup_stage(workspace).config
    with pytest.raises(ValueError, match="was encoded by autoencoder"):
        OdeWarmupStage(workspace / "random", config, [workspace / "latents"])
    with pytest.raises(ValueError, match="not the autoencoder in"):
        OdeWarmupStage(workspace / "random", config, [workspace / "latents"], workspace / "run" / "model")
    (tmp_path / "base").mkdir()
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "base" / file).write_bytes((workspace / "base" / file).read_bytes())
    with pytest.raises(ValueError, match="was encoded by autoencoder"):
        OdeWarmupStage(tmp_path / "base", config, [workspace / "latents"])
    OdeWarmupStage(tmp_path / "base", config, [workspace / "latents"], workspace / "run" / "model")
    alone = write_checkpoint(tmp_path / "alone", dataclasses.replace(MODEL, diffusion=None))
    with pytest.raises(ValueError, match="has no diffusion model to train"):
        OdeWarmupStage(alone, config, [workspace / "latents"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher.sampling.steps=0", "steps is 0"),
        ("teacher.refresh_rate=0", "refresh_rate is 0"),
        ("teacher.sampling.guidance=-1.0", "guidance scale is -1: allowed are 0 to 100"),
        ("teacher.sampling.sampler='pingpong'", "adds noise itself"),
        ("context_weight=-1.0", "context_weight is -1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: str, message: str, workspace: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ode_warmup_stage(workspace, change)


def test_counted_arithmetic_of_the_teacher_is_spread_over_the_steps_that_it_serves(workspace: Path) -> None:
    def flops(rate: int) -> int:
        stage = ode_warmup_stage(workspace, f"teacher.refresh_rate={rate}")
        make_fake(networks_of(stage))
        return count_step(stage, trained_of(stage), 8, [BatchSlice()]).flops

    every, second = flops(1), flops(2)
    teacher = 2 * (every - second)
    assert teacher > 0 and flops(4) == pytest.approx(every - 0.75 * teacher, rel=1e-3)
