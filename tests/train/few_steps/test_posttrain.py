"""Adversarial post-training: who learns in which turn, what the discriminator sees, and the pitfalls of the training
spec, 7.5. What all stages have in common is in test_stages.py."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.presets import LOGSNR
from sa3_mlx.common.schema import ConfigError
from sa3_torch.samplers import pingpong
from sa3_torch.train.few_steps.alarms import ADVERSARIAL, ROWS, BalanceAlarms
from sa3_torch.train.few_steps.arc_losses import masked_mean
from sa3_torch.train.few_steps.denoiser import frozen_inputs
from sa3_torch.train.few_steps.heads import HeadConfig
from sa3_torch.train.few_steps.latent_discriminator import LatentDiscriminator
from sa3_torch.train.few_steps.posttrain import PosttrainStage
from sa3_torch.train.flow.masks import Masks
from sa3_torch.train.flow.model import open_model
from sa3_torch.train.run.optimizers import learning_rate_at
from sa3_torch.train.run.parallel import BatchSlice
from tests.support.stages import MODEL, frechet_stage, posttrain_stage, trainer_of
from tests.support.tiny_checkpoint import write_checkpoint

pytestmark = pytest.mark.usefixtures("no_pictures")

HEAD = HeadConfig(layers=2, width=16, groups=4, kernel=3)
NO_PENALTY = ("weights.gradient_penalty=0.0", "weights.centring=0.0", "weights.contrastive=0.0")


class LinearClap:
    """Vectors of the first channels; texts are all alike."""

    def embed_audio(self, latents, valid, _t):
        mean = (latents * valid[..., None]).sum(1)[:, :4]
        return torch.nn.functional.normalize(mean, dim=-1)

    def embed_text(self, ids, _mask):
        return torch.nn.functional.normalize(torch.ones(len(ids), 4), dim=-1)


def with_clap(workspace: Path) -> PosttrainStage:
    config = dataclasses.replace(
        posttrain_stage(workspace).config,
        weights=dataclasses.replace(posttrain_stage(workspace).config.weights, clap=1.0),
    )
    return PosttrainStage(workspace / "base", workspace / "base", config, [workspace / "latents"], LinearClap())


def test_each_turn_trains_its_own_network_alone(workspace: Path, tmp_path: Path) -> None:
    trainer = trainer_of(posttrain_stage(workspace), tmp_path)
    for step, mine, other in ((0, "generator", "discriminator"), (1, "discriminator", "generator")):
        trainer.step = step
        assert trainer.stage.turn(step) == mine
        trainer._gradients(mine)
        assert all(parameter.grad is not None for parameter in trainer.trained[mine])
        assert all(parameter.grad is None for parameter in trainer.trained[other])
        assert all(parameter.grad is None for parameter in trainer.stage.networks.text_encoder.parameters())
        trainer.optimizers[mine].zero_grad()


def test_the_average_moves_with_the_generator(workspace: Path) -> None:
    assert [posttrain_stage(workspace).turn(step)[0] for step in range(4)] == list("gdgd")
    with pytest.raises(ConfigError, match="ema_every is 1: the generator moves every 2 steps"):
        posttrain_stage(workspace, "train.ema_every=1")


def test_nothing_is_dropped_out_in_either_turn(workspace: Path) -> None:
    """Pitfall 9: the same scene gives the same sounds on G and D steps, in training mode."""
    stage = posttrain_stage(workspace)
    stage.model.train()
    scene = stage._scene(0)
    on_g = stage._generate(scene)
    stage.turn = lambda step: "discriminator"  # type: ignore[method-assign]  # noqa: ARG005
    with torch.no_grad():
        assert torch.equal(stage._generate(scene), on_g)


def test_the_discriminator_has_a_trained_conditioner_of_its_own(workspace: Path) -> None:
    """Pitfall 6."""
    stage = posttrain_stage(workspace)
    assert stage.discriminator.conditioner is not stage.networks.conditioner
    shared = {id(p) for p in stage.model.parameters()} & {id(p) for p in stage.discriminator.parameters()}
    assert not shared and all(p.requires_grad for p in stage.discriminator.parameters())
    stage.losses(1)["discriminator"].backward()
    assert all(bool(p.grad.any()) for p in stage.discriminator.conditioner.parameters())


def test_all_blocks_tapped_are_the_base_itself(workspace: Path) -> None:
    """The discriminator's features lead to the base's velocity, without the memory tokens."""
    stage = posttrain_stage(workspace)
    base, *_ = open_model(workspace / "base")
    scene = stage._scene(1)
    with torch.no_grad():
        judge = LatentDiscriminator(base, (len(base.dit.layers) - 1,), HEAD, 0)
        x = torch.where(scene.inputs.valid[..., None], scene.z, 0.0)
        hidden = judge.features(x, scene.drawn.t, judge.prepare(scene.inputs))[0]
        velocity = base.dit.project_out(hidden)
        velocity = velocity + base.dit.postprocess(velocity)
        wanted = x - scene.drawn.t[:, None, None] * velocity
        torch.testing.assert_close(stage.denoiser(x, scene.drawn.t, scene.inputs), wanted)


def test_scores_do_not_depend_on_padding(workspace: Path) -> None:
    """Pitfall 11, with the blocks before the head. Measured: 2e-7."""
    stage = posttrain_stage(workspace)
    batch = stage.latents.train.batch(0)
    frames = int(batch.valid.sum(1).max())
    draw = Masks(batch.valid, torch.zeros_like(batch.valid))

    def mean_scores(size: int, filling: float) -> torch.Tensor:
        filled = torch.where(batch.valid[..., None], batch.latents, filling)
        cut = dataclasses.replace(batch, latents=filled[:, :size], valid=batch.valid[:, :size])
        bundle = frozen_inputs(stage.networks, cut, Masks(draw.valid[:, :size], draw.keep[:, :size]))
        verdict = stage.discriminator(
            cut.latents, torch.full((len(batch.items),), 0.4), stage.discriminator.prepare(bundle)
        )
        return masked_mean(verdict.scores, verdict.mask)

    with torch.no_grad():
        torch.testing.assert_close(mean_scores(frames, 0.0), mean_scores(batch.valid.shape[1], 50.0), atol=1e-5, rtol=0)


def test_scores_are_computed_in_full_precision(workspace: Path) -> None:
    """Pitfall 10: blocks in bf16, head in fp32."""
    stage = posttrain_stage(workspace)
    stage.precision = "bf16"
    scene = stage._scene(1)
    with stage.autocast():
        prepared = stage.discriminator.prepare(scene.inputs)
        verdict = stage.discriminator(scene.z, scene.drawn.t, prepared)
    assert prepared.seconds.dtype == torch.bfloat16 and verdict.scores.dtype == torch.float32
    assert all(term.dtype == torch.float32 for step in (0, 1) for term in stage.losses(step).values())


def test_equal_captions_leave_nothing_to_contrast(workspace: Path) -> None:
    """Pitfalls 2 and 3: exactly 0, no gradient; and the batch is what it was."""
    stage = posttrain_stage(workspace, "weights.discriminator=0.0", *NO_PENALTY[:2])
    plan = stage.latents.train.plan(1)
    same = dataclasses.replace(plan, items=plan.items[:1] * 4, texts=plan.texts[:1] * 4)
    stage.latents.train.plan = lambda step: same  # type: ignore[method-assign]  # noqa: ARG005
    first = stage.feed.get(1, BatchSlice()).batch
    before = copy.deepcopy(first)
    terms = stage.losses(1)
    assert float(terms["contrastive"].detach()) == 0
    sum(terms.values()).backward()
    assert not any(bool(p.grad.any()) for p in stage.discriminator.parameters())
    assert first.items == before.items and all(
        torch.equal(getattr(first, name), getattr(before, name))
        for name in ("latents", "valid", "ids", "mask", "seconds")
    )


def test_other_prompts_change_the_text_alone(workspace: Path) -> None:
    stage = posttrain_stage(workspace, *NO_PENALTY[:2])
    step = next(step for step in range(1, 40, 2) if bool(stage._scene(step).drawn.usable.any()))  # several captions
    scene = stage._scene(step)
    seen = []
    prepare = stage.discriminator.prepare
    stage.discriminator.prepare = lambda bundle: seen.append(bundle) or prepare(bundle)  # type: ignore[method-assign]
    stage.losses(step)
    own, other = seen
    assert other.local is own.local and other.seconds is own.seconds and other.valid is own.valid
    moved = (own.hidden != other.hidden).flatten(1).any(1)
    assert bool(moved[scene.drawn.usable].all())
    assert torch.equal(stage.networks.text_encoder(scene.drawn.other_ids, scene.drawn.other_mask), other.hidden)


def test_a_single_item_cannot_be_contrasted(workspace: Path) -> None:
    """Pitfall 4."""
    with pytest.raises(ConfigError, match=r"batch is 1: .* set weights\.contrastive=0"):
        posttrain_stage(workspace, "train.batch=1")
    stage = posttrain_stage(workspace, "train.batch=1", "weights.contrastive=0.0")
    assert "contrastive" not in stage.losses(1)


def test_without_the_penalty_the_discriminator_learns_one_batch_by_heart(workspace: Path) -> None:
    stage = posttrain_stage(workspace, *NO_PENALTY)
    optimizer = torch.optim.AdamW(stage.discriminator.parameters(), 1e-3, betas=(0.0, 0.95))
    for _ in range(200):
        loss = sum(stage.losses(1).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.1:
            return
    raise AssertionError(f"the loss is still {float(loss):.3f}")


def test_the_clap_term_pulls_the_generator_to_its_prompt(workspace: Path) -> None:
    stage = with_clap(workspace)
    terms = stage.losses(0)
    assert 0 < float(terms["clap"].detach()) <= math.pi**2 / 2
    terms["clap"].backward()
    assert any(bool(p.grad.any()) for p in stage.networks.dit.parameters() if p.grad is not None)
    assert not any(p.grad is not None for p in stage.discriminator.parameters())
    with torch.no_grad():
        assert stage.validate().keys() == {"gap", "spread", "clap", "clap_of_data"}


def test_a_clap_weight_needs_a_clap(workspace: Path) -> None:
    for term in ("clap", "frechet"):
        config = frechet_stage(workspace, "weights.clap=0.0", "weights.frechet=0.0", f"weights.{term}=1.0").config
        with pytest.raises(ConfigError, match=r"without a latent CLAP: give one with --clap, or set both to 0"):
            PosttrainStage(workspace / "base", workspace / "base", config, [workspace / "latents"], None)
    config = posttrain_stage(workspace).config
    with pytest.raises(ConfigError, match=r"weights\.clap is 0 and weights\.frechet 0 with a latent CLAP"):
        PosttrainStage(workspace / "base", workspace / "base", config, [workspace / "latents"], LinearClap())


def test_own_samples_take_the_place_of_data_in_the_input(workspace: Path) -> None:
    stage = posttrain_stage(workspace, "own_sample_share=1.0")
    scene = stage._scene(0)
    batch = dataclasses.replace(scene.drawn.batch, latents=scene.z + 1)
    other = dataclasses.replace(scene, drawn=dataclasses.replace(scene.drawn, batch=batch))
    with torch.no_grad():
        assert torch.equal(stage._generate(scene), stage._generate(other))


def test_real_and_fake_share_noise_and_level(workspace: Path) -> None:
    stage = posttrain_stage(workspace, *NO_PENALTY)
    scene, seen = stage._scene(1), []
    inner = stage.discriminator.forward
    stage.discriminator.forward = lambda x, t, prepared: seen.append((x, t)) or inner(x, t, prepared)  # type: ignore[method-assign]
    stage._generate = lambda scene: scene.z + 1  # type: ignore[method-assign]
    stage.losses(1)
    (real, t_real), (fake, t_fake) = seen
    assert torch.equal(t_real, t_fake) and not torch.equal(t_real, scene.drawn.t)
    torch.testing.assert_close(fake - real, (1 - t_real)[:, None, None].expand_as(real))


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_ping_pong_with_an_oracle_keeps_the_moments_of_the_data(steps: int) -> None:
    """The oracle draws data given its noisy state; Gaussian data of mean 0.3 and deviation 0.6."""
    mean, std, count = 0.3, 0.6, 40_000
    random = torch.Generator().manual_seed(0)

    def velocity(x, t):
        t = torch.from_numpy(t)[:, None, None].double()
        gain = (1 - t) * std**2 / ((1 - t) ** 2 * std**2 + t**2)
        spread = (std**2 * (1 - (1 - t) * gain)).sqrt()
        z = mean + gain * (x - (1 - t) * mean) + spread * torch.randn(x.shape, generator=random, dtype=torch.double)
        return (x - z) / t

    def noise(_k: int):
        return torch.randn(1, count, 1, generator=random, dtype=torch.double)

    *_, last = pingpong(velocity, noise(0), sigmas(LOGSNR, steps, 1.0, [64]), noise)
    assert float(last.x.mean()) == pytest.approx(mean, abs=0.01)
    assert float(last.x.std()) == pytest.approx(std, rel=0.01)


def test_alarms_are_said_once_and_plainly() -> None:
    health = BalanceAlarms(ADVERSARIAL)
    rows = [health.alarms({"measured/gap": 3.0, "discriminator/raw": 0.5, "other": 9.0}) for _ in range(3 * ROWS)]
    said = [line for row in rows for line in row]
    assert rows[: ROWS - 1] == [[]] * (ROWS - 1)
    assert said == [
        "measured/gap is 3 over the last 20 rows, healthy is 0.3 to 2: the discriminator wins; lower its learning rate"
    ]


def test_alarms_reach_the_log(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = posttrain_stage(workspace, "train.steps=10")
    for name in ("validate", "demo", "export"):
        monkeypatch.setattr(stage, name, lambda *_: {})
    monkeypatch.setattr(stage, "alarms", lambda values: [f"gap {np.isfinite(values['measured/gap'])}"])
    assert trainer_of(stage, tmp_path).run()
    assert '"alarm": "gap True"' in (tmp_path / "log.jsonl").read_text()


def test_models_that_do_not_belong_together_are_refused(workspace: Path, tmp_path: Path) -> None:
    config = posttrain_stage(workspace).config
    other = write_checkpoint(tmp_path / "other", MODEL, variant="other")
    with pytest.raises(ValueError, match="text encoder or autoencoder are not those of the model"):
        PosttrainStage(workspace / "base", other, config, [workspace / "latents"], None)
    for taps in ("[]", "[0, 0]", "[1]", "[-1]"):
        with pytest.raises(ValueError, match="allowed are ascending blocks 0 to 0"):
            posttrain_stage(workspace, f"taps={taps}")


def test_the_discriminator_begins_alone(workspace: Path, tmp_path: Path) -> None:
    stage = frechet_stage(workspace, "head_start=4", "train.steps=4")
    assert [stage.turn(step)[0] for step in range(8)] == list("ddddgdgd")
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    head = stage.discriminator.head.project_out.weight.detach().clone()
    trainer = trainer_of(stage, tmp_path)
    for trainer.step in range(4):
        trainer._train_step(None)
    assert all(torch.equal(value, before[name]) for name, value in stage.model.state_dict().items())
    assert not torch.equal(stage.discriminator.head.project_out.weight, head)
    assert trainer.updates == {"generator": 0, "discriminator": 4}


@pytest.mark.parametrize(("rate", "moved"), [(0.0, 0.0), (0.1, 0.1)])
def test_the_backbone_learns_more_slowly_than_the_head(
    workspace: Path, tmp_path: Path, rate: float, moved: float
) -> None:
    """The first update of Adam moves every weight by its learning rate."""
    rates = ("discriminator.learning_rate=1e-3", "discriminator.weight_decay=0.0", "discriminator.beta1=0.0")
    stage = posttrain_stage(workspace, f"backbone_rate={rate}", *rates)
    parts = {"head": stage.discriminator.head.project_out.weight, "dit": stage.discriminator.dit.project_in.weight}
    before = {name: weight.detach().clone() for name, weight in parts.items()}
    trainer = trainer_of(stage, tmp_path)
    trainer.step = 1
    trainer._train_step(None)
    change = {name: float((weight - before[name]).detach().abs().median()) for name, weight in parts.items()}
    assert change["head"] == pytest.approx(1e-3, rel=0.05)
    assert change["dit"] == pytest.approx(moved * 1e-3, rel=0.05)


def test_features_are_compared_where_few_steps_begin(workspace: Path) -> None:
    """The turns of the discriminator fill the moments with items of pure noise or own samples; the generator learns
    from these alone."""
    stage = frechet_stage(workspace, "weights.generator=0.0", "weights.clap=0.0")
    for step in (0, 1):
        stage.losses(step)
    counted = [stage._scene(step).few_step for step in (0, 1)]
    mass = float(stage.discriminator.moments.moments[0, -1, -1])
    assert mass == pytest.approx(0.98 * float(counted[0].sum()) + float(counted[1].sum()))
    scene = stage._scene(2)
    fake = stage._generate(scene).detach().requires_grad_()
    terms = stage._generator_losses(scene, fake)
    assert terms.keys() == {"frechet"}
    terms["frechet"].backward()
    assert torch.equal(fake.grad.flatten(1).any(1), scene.few_step) and not bool(scene.few_step.all())


def test_a_held_rate_falls_in_the_last_quarter_alone(workspace: Path) -> None:
    changes = ("generator.schedule=held", "generator.learning_rate=1e-4", "generator.final_learning_rate=1e-6")
    config = posttrain_stage(workspace, *changes, "generator.warmup_steps=10").config.generator
    rates = [learning_rate_at(config, step=step, steps=100, update=step) for step in (4, 10, 75, 87, 100)]
    assert rates[:3] == pytest.approx([0.5e-4, 1e-4, 1e-4])
    assert 1e-6 < rates[3] < 0.6e-4 and rates[4] == pytest.approx(1e-6)
