"""States of the warm-up that are made of the student's own estimates, and students that go on from one [T5]."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.few_steps.ode_warmup import OdeWarmupStage
from sa3_torch.train.flow.model import PARENTS_FILE
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.planning.count import StepCounter, count_step, make_fake, networks_of, trained_of
from sa3_torch.train.run.random import Purpose, item_noise
from tests.support.run_stage import run_until
from tests.support.stages import ode_warmup_stage, train, trainer_of

pytestmark = pytest.mark.usefixtures("no_pictures")

LARGE = ("train.batch=32", "train.precision=fp32")


def own_states_stage(workspace: Path, *changes: str) -> OdeWarmupStage:
    """All but the states of pure noise are own."""
    return ode_warmup_stage(workspace, "teacher.own_share=1.0", *changes)


def change(stage: OdeWarmupStage) -> None:
    """Give the student other weights than the base's."""
    with torch.no_grad():
        for parameter in stage.denoiser.dit.parameters():
            parameter.mul_(1.5)


def drawn(stage: OdeWarmupStage):
    return stage.feed.get(0, stage.batch_slice)


def test_own_states_are_the_student_s_estimates_with_new_noise(workspace: Path) -> None:
    """Measured: a relative distance of 3e-7; what data would give is 1.0 away."""
    stage = own_states_stage(workspace, *LARGE)
    change(stage)
    stage.begin(0)
    run, draw = stage.trajectory(0), drawn(stage)
    rows, shape = slice(0, 32), tuple(run.result.shape[1:])
    first, noise = (
        item_noise(rows, shape, stage.config.train.seed, purpose, 0)
        for purpose in (Purpose.OWN_SAMPLES, Purpose.TRAINING_NOISE)
    )
    with torch.no_grad():
        estimate = stage.denoiser(first, torch.ones(32), run.inputs)
    t = run.times[0][:, None, None]
    assert 4 < int(draw.own.sum()) < 28 and torch.equal(draw.own, run.times[0] < 1)
    expected, data = ((1 - t) * start + t * noise for start in (estimate, draw.batch.latents))
    assert torch.equal(run.states[0][~draw.own], noise[~draw.own])
    for wanted, near in ((expected, True), (data, False)):
        apart = (run.states[0] - wanted)[draw.own].norm() / run.states[0][draw.own].norm()
        assert apart < 2e-6 if near else apart > 0.1


def test_a_share_of_the_renoised_states_is_own_and_all_others_stay_as_they_are(workspace: Path) -> None:
    """Share 0 is the stage without it: no copy of the student, not a number of its own, the same levels and states."""
    none, some, every = (ode_warmup_stage(workspace, *LARGE, f"teacher.own_share={share}") for share in (0.0, 0.5, 1.0))
    assert none.rollout is None and not [name for name, _ in none.denoiser.named_modules() if "rollout" in name]
    draws = [drawn(stage) for stage in (none, some, every)]
    assert not draws[0].own.any() and bool((draws[1].own <= draws[2].own).all())
    assert 0 < int(draws[1].own.sum()) < int(draws[2].own.sum())
    for stage, draw in zip((none, some, every), draws, strict=True):
        run = stage.trajectory(0)
        assert torch.equal(draw.levels, draws[0].levels)
        same = torch.tensor(
            [torch.equal(a, b) for a, b in zip(run.states[0], none.trajectory(0).states[0], strict=True)]
        )
        assert torch.equal(same, ~draw.own)


def test_share_0_draws_no_noise_for_the_student(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sa3_torch.train.few_steps import ode_warmup

    purposes = []
    monkeypatch.setattr(ode_warmup, "item_noise", lambda *words: purposes.append(words[3]) or item_noise(*words))
    ode_warmup_stage(workspace).losses(0)
    assert purposes == [Purpose.TRAINING_NOISE]
    own_states_stage(workspace).losses(0)
    assert purposes[1:] == [Purpose.TRAINING_NOISE, Purpose.OWN_SAMPLES]


def test_the_student_of_a_refresh_serves_until_the_next(workspace: Path) -> None:
    stage = own_states_stage(workspace)
    assert stage.rollout is not None
    seen = []
    for step in range(3):
        change(stage)
        stage.begin(step)
        kept, live = (network.dit.project_out.weight for network in (stage.rollout, stage.denoiser))
        seen.append(float((kept.norm() / live.norm()).detach()))
    assert seen == pytest.approx([1, 1 / 1.5, 1])
    assert not any(parameter.requires_grad for parameter in stage.rollout.parameters())


def test_a_run_that_stops_between_two_refreshes_goes_on_bit_for_bit(workspace: Path, tmp_path: Path) -> None:
    """Step 3 uses what the student of step 2 made, which the checkpoint has; that of step 3 would make other states."""
    steps = "train.steps=4"
    whole = train(own_states_stage(workspace, steps), tmp_path / "whole", evaluated=False)
    run_until("own-states", workspace, tmp_path / "stopped", 2, steps)
    resumed = trainer_of(own_states_stage(workspace, steps), tmp_path / "stopped")
    resumed._evaluate = lambda _log: None
    assert resumed.step == 3
    assert resumed.run()
    for table, tensors in whole._tensors().items():
        assert all(torch.equal(tensor, resumed._tensors()[table][name]) for name, tensor in tensors.items()), table


def test_the_student_s_evaluation_is_counted_over_the_steps_that_it_serves(workspace: Path) -> None:
    """One forward pass of a batch in every period."""

    def flops(share: float, rate: int) -> int:
        settings = (f"teacher.own_share={share}", f"teacher.refresh_rate={rate}", "train.precision=fp32")
        stage = ode_warmup_stage(workspace, *settings)
        make_fake(networks_of(stage))
        return count_step(stage, trained_of(stage), 8, [BatchSlice()]).flops

    stage = own_states_stage(workspace, "train.precision=fp32")
    run = stage.trajectory(0)
    with StepCounter() as forward, torch.no_grad():
        stage.denoiser(run.result, run.times[0], run.inputs)
    assert forward.flops > 0
    for rate in (1, 2):
        assert flops(1.0, rate) - flops(0.0, rate) == pytest.approx(forward.flops / rate, abs=1)


def test_exports_hold_no_copy_of_the_student(workspace: Path, tmp_path: Path) -> None:
    trainer = train(own_states_stage(workspace, "train.steps=2"), tmp_path, evaluated=False)
    names = trainer._tensors()["weights/student"]
    assert any(name.startswith("rollout.dit.") for name in names)
    assert not any("rollout" in name for name in (*trainer.ema.state, *trainer.stage.model.state_dict()))


def going_on(workspace: Path, student: Path, *changes: str) -> OdeWarmupStage:
    config = own_states_stage(workspace, *changes).config
    return OdeWarmupStage(workspace / "base", config, [workspace / "latents"], student=student)


def test_a_student_goes_on_from_a_model_of_the_stage(workspace: Path, tmp_path: Path) -> None:
    """The teacher stays the base; which student it was is recorded."""
    first = own_states_stage(workspace)
    change(first)
    first.export(tmp_path / "model", first.model.state_dict())
    stage = going_on(workspace, tmp_path / "model")
    for name, tensor in first.denoiser.dit.state_dict().items():
        torch.testing.assert_close(stage.denoiser.dit.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)  # of 16 bits
    assert torch.equal(stage.teacher.dit.project_out.weight, first.teacher.dit.project_out.weight)
    assert stage.rollout is not None
    assert torch.equal(stage.rollout.dit.project_out.weight, stage.denoiser.dit.project_out.weight)
    stage.export(tmp_path / "second", stage.model.state_dict())
    parents = json.loads((tmp_path / "second" / PARENTS_FILE).read_text())
    assert parents["student"] == file_hash(tmp_path / "model" / "model.safetensors")
    assert parents["start"] == first.parents["start"]


def test_a_student_of_another_base_is_refused(workspace: Path) -> None:
    for other in ("base", "random"):  # which are no denoisers
        with pytest.raises(ValueError, match=r"not made of this base by `sa3 train ode-warmup`; give one that was"):
            going_on(workspace, workspace / other)


def test_a_student_with_another_text_encoder_is_refused(workspace: Path, tmp_path: Path) -> None:
    first = own_states_stage(workspace)
    state = {
        name: tensor * 2 if name.startswith("text_encoder.") else tensor
        for name, tensor in first.model.state_dict().items()
    }
    first.export(tmp_path / "model", state)
    with pytest.raises(ValueError, match="not made of this base"):
        going_on(workspace, tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("teacher.own_share=1.5",), "own_share is 1.5"),
        (("teacher.renoised_share=0.0",), r"own_share is 1, of a teacher\.renoised_share of 0"),
    ],
)
def test_shares_that_mean_nothing_are_refused(changes: tuple[str, ...], message: str, workspace: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        own_states_stage(workspace, *changes)
