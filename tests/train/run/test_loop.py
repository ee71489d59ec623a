"""The training loop itself: turns, schedules, averages, precision, checkpoints, what it logs and refuses."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import shutil
from pathlib import Path
from threading import Event

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")
import torch.distributed.checkpoint as dcp

from sa3_mlx.common.schema import ConfigError
from sa3_mlx.common.version import revision, version
from sa3_torch.train.run import parallel
from sa3_torch.train.run.logs import RunLog
from sa3_torch.train.run.optimizers import Ema, OptimizerConfig, UpdateRatio, learning_rate_at
from sa3_torch.train.run.parallel import BatchSlice, clip, follow, moments, std_of
from sa3_torch.train.run.planning.timing import time_precisions
from tests.support.stages import GameStage, autoencoder_stage, game_stage, train, trainer_of

pytestmark = pytest.mark.usefixtures("no_pictures")

COSINE = OptimizerConfig(
    learning_rate=1e-3,
    schedule="cosine",
    final_learning_rate=1e-5,
    inverse_gamma=0.0,
    warmup_steps=10,
    beta1=0.9,
    beta2=0.99,
    weight_decay=0.0,
    clip_norm=1.0,
)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def game(tmp_path: Path, *changes: str) -> GameStage:
    return game_stage(tmp_path, *changes)


def trained(model: torch.nn.Module) -> dict[str, list[torch.nn.Parameter]]:
    return {"all": [parameter for parameter in model.parameters() if parameter.requires_grad]}


def test_parts_cut_the_batch_and_refuse_uneven_ones() -> None:
    assert [list(range(12))[BatchSlice(rank=r, world=3).rows(12)] for r in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
    halves = [part.rows(12) for rank in range(2) for part in BatchSlice(rank=rank, world=2).micro_batches(3)]
    assert [list(range(12))[part] for part in halves] == [[i, i + 1] for i in range(0, 12, 2)]
    with pytest.raises(ConfigError, match="batch is 10: 4 parts "):
        BatchSlice(rank=0, world=4).rows(10)


def test_uneven_batch_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch is 8: 3 parts"):
        trainer_of(game(tmp_path, "train.accumulate=3"), tmp_path)


def test_moments_of_parts_give_the_standard_deviation_of_the_whole() -> None:
    x = 5 + torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    assert float(std_of(moments(x[:2]) + moments(x[2:]))) == pytest.approx(float(x.std()), rel=1e-6)


def test_a_running_statistic_ignores_what_is_not_finite() -> None:
    average = torch.tensor([2.0])
    follow(average, torch.tensor(math.nan), 0.5)
    assert float(average) == 2.0
    follow(average, torch.tensor(4.0), 0.5)
    assert float(average) == 3.0


def test_cosine_warms_up_and_ends_at_its_floor() -> None:
    rates = [learning_rate_at(COSINE, step=step, steps=1000, update=step) for step in range(1001)]
    assert rates[0] == pytest.approx(1e-4, rel=1e-3)
    assert rates[9] == pytest.approx(1e-3, rel=1e-3)
    assert rates[1000] == pytest.approx(1e-5)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_inverse_schedule_is_the_formula() -> None:
    """(1 - w^(k+1)) max(floor, base (1 + k/gamma)^-0.5), w = 0.995 for 200 warm-up steps."""
    config = dataclasses.replace(COSINE, schedule="inverse", inverse_gamma=1e4, warmup_steps=200)
    for k in (0, 1, 199, 30_000, 10**9):
        expected = (1 - 0.995 ** (k + 1)) * max(1e-5, 1e-3 * (1 + k / 1e4) ** -0.5)
        assert learning_rate_at(config, step=0, steps=1, update=k) == pytest.approx(expected, rel=1e-12)
    for changes in ({"schedule": "inverse"}, {"inverse_gamma": 5.0}):
        with pytest.raises(ConfigError, match="inverse_gamma is"):
            dataclasses.replace(COSINE, **changes)


def test_average_begins_after_and_moves_every_few_steps() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    ema = Ema(model, trained(model), decay=0.9, after=6, every=3)
    values = []
    for step in range(14):
        model.weight.data.fill_(float(step))
        ema.update(model, step)
        values.append(float(ema.state["weight"]))
    assert values[:9] == [0, 0, 0, 3, 3, 3, 6, 6, 6]  # copies; the update in step 6 is the first of the average
    beta = 1 - 2**-0.75
    assert values[9] == pytest.approx(beta * 6 + (1 - beta) * 9)
    assert values[12] == pytest.approx((1 - 3**-0.75) * values[9] + 3**-0.75 * 12)


def test_swap_exchanges_weights_and_buffers() -> None:
    model = torch.nn.BatchNorm1d(2)
    ema = Ema(model, trained(model), decay=0.9, after=0, every=1)
    model.weight.data.fill_(5.0)
    model.running_mean.fill_(7.0)
    ema.swap(model)
    assert float(model.weight[0]) == 1.0 and float(model.running_mean[0]) == 0.0
    ema.swap(model)
    assert float(model.weight[0]) == 5.0 and float(model.running_mean[0]) == 7.0


def test_frozen_weights_are_not_averaged() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    model[0].requires_grad_(False)
    ema = Ema(model, trained(model), decay=0.9, after=0, every=1)
    buffers = [name for name, _ in model.named_buffers()]
    assert sorted(ema.state) == sorted(["1.weight", "1.bias", *buffers])
    weights = model[0].weight.clone()
    ema.swap(model)
    assert torch.equal(model[0].weight, weights)


def test_processes_deal_out_averages_of_weights_that_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a third of them, and gets those of the others where they are swapped in."""
    models = [torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(6))) for _ in range(3)]
    emas, given = [], dict[tuple[float, ...], int]()
    for rank, model in enumerate(models):
        monkeypatch.setattr(parallel, "own_slice", lambda rank=rank: BatchSlice(rank=rank, world=3))
        emas.append(Ema(model, trained(model), decay=0.9, after=0, every=1))
    names = [name for ema in emas for name in ema.state]
    held = [sum(tensor.nbytes for tensor in ema.state.values()) for ema in emas]
    assert sorted(names) == sorted(models[0].state_dict()) and max(held) - min(held) <= 64
    monkeypatch.setattr(parallel, "give", lambda tensor, owner: given.update({tuple(tensor.flatten().tolist()): owner}))
    emas[0].swap(models[0])
    assert len(given) == 12 and set(given.values()) == {0, 1, 2}


def test_only_the_group_whose_turn_it_is_gets_gradients_and_updates(tmp_path: Path) -> None:
    stage = game(tmp_path, "train.steps=2")
    trainer = trainer_of(stage, tmp_path)
    for group, other in (("generator", "discriminator"), ("discriminator", "generator")):
        trainer._gradients(group)
        assert all(parameter.grad is not None for parameter in trainer.trained[group])
        assert all(parameter.grad is None for parameter in trainer.trained[other])
        trainer.optimizers[group].zero_grad()
        trainer.step += 1


def test_clipping_is_per_group_and_returns_the_norm_before() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert float(clip([parameter], 1.0)) == pytest.approx(5.0)
    assert float(parameter.grad.norm()) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.usefixtures("pictures")
def test_log_has_terms_raw_values_norms_rates_and_speed(tmp_path: Path) -> None:
    train(game(tmp_path, "train.steps=12"), tmp_path)
    first = rows(tmp_path)[1]
    assert first["step"] == 10
    for group in ("generator", "discriminator"):
        assert first[f"grad_norm/{group}"] > 0 and first[f"lr/{group}"] > 0
    assert first["adversarial"] == pytest.approx(0.5 * first["adversarial/raw"])
    assert first["items_per_second"] == pytest.approx(8 * first["steps_per_second"])
    assert "validation/mean" in rows(tmp_path)[-1]
    assert list((tmp_path / "tensorboard").iterdir())
    assert (tmp_path / "loss.png").stat().st_size > 5_000


def test_the_ratio_of_an_update_is_that_of_the_weights_it_changes(tmp_path: Path) -> None:
    weights = [torch.full((3,), 2.0), torch.full((4, 4), 2.0)]
    ratio = UpdateRatio(weights)
    weights[0] += 0.2
    weights[1] -= 0.2
    assert ratio.after() == pytest.approx(0.1, rel=1e-5)
    train(game(tmp_path, "train.steps=20"), tmp_path)
    shown = next(row for row in rows(tmp_path) if row["step"] == 20)
    assert 0 < shown["update_ratio/generator"] < 1 and 0 < shown["update_ratio/discriminator"] < 1


def test_a_run_names_the_source_that_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(game(tmp_path, "train.steps=1"), tmp_path)
    assert rows(tmp_path)[0] == {"step": 0, "revision": revision()}
    (progress,) = tmp_path.glob("checkpoints/step-*/progress.json")
    assert json.loads(progress.read_text())["revision"] == revision()
    monkeypatch.setattr("sa3_mlx.common.version.SOURCE", tmp_path)
    assert revision() == version()


def test_log_of_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    changes = ("train.steps=30", "train.save_every=10")
    train(game(tmp_path, *changes), tmp_path)
    before = [(row["step"], row.get("distance")) for row in rows(tmp_path)]
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 30, "dist')  # killed while writing
    for step in (20, 30):
        shutil.rmtree(tmp_path / "checkpoints" / f"step-{step:08d}")
    train(game(tmp_path, *changes), tmp_path)
    assert [(row["step"], row.get("distance")) for row in rows(tmp_path)] == before


def test_three_checkpoints_and_milestones_are_kept(tmp_path: Path) -> None:
    stage = game(tmp_path, "train.steps=14", "train.save_every=2", "train.milestone_every=4")
    trainer = train(stage, tmp_path)
    assert trainer.checkpoints.steps() == [4, 8, 10, 12, 14]
    assert not (tmp_path / "checkpoints" / "part").exists()


@pytest.mark.parametrize("damage", ["cut", "junk", "bit", "progress"])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    changes = ("train.steps=6", "train.save_every=2")
    whole = train(game(tmp_path, *changes), tmp_path)
    newest = whole.checkpoints.path(6)
    file = next(newest.glob("*.distcp"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "junk":
        file.write_bytes(bytes(file.stat().st_size))
    elif damage == "bit":
        data = bytearray(file.read_bytes())
        at = data.find(whole.ema.state["0.weight"].numpy().tobytes())
        assert at > 0
        data[at] ^= 1
        file.write_bytes(data)
    else:
        (newest / "progress.json").write_text("{")
    stage = game(tmp_path, *changes)
    trainer = trainer_of(stage, tmp_path)
    assert trainer.step == 4
    assert trainer.remarks[0].startswith(f"{newest}: damaged (") and trainer.remarks[1] == "going on from step 4"
    assert trainer.run()
    for name, tensor in whole.ema.state.items():
        assert torch.equal(tensor, trainer.ema.state[name])
    assert trainer_of(game(tmp_path, *changes), tmp_path).step == 6


def test_checkpoint_of_other_networks_is_not_read(tmp_path: Path) -> None:
    trainer = train(game(tmp_path, "train.steps=2"), tmp_path)
    tensors = trainer._tensors()
    tensors["ema"]["another.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match="its tensors are not those of this run"):
        trainer.checkpoints.load(tensors)


def test_nothing_but_damaged_checkpoints_is_refused(tmp_path: Path) -> None:
    trainer = train(game(tmp_path, "train.steps=2"), tmp_path)
    (trainer.checkpoints.path(2) / "progress.json").write_text("[]")
    with pytest.raises(ValueError, match=r"step-00000002: damaged .*; to start again, remove "):
        trainer_of(game(tmp_path, "train.steps=2"), tmp_path)


def test_other_settings_are_refused_on_resume_by_name(tmp_path: Path) -> None:
    train(game(tmp_path, "train.steps=2"), tmp_path)
    with pytest.raises(ConfigError, match=r"train\.batch = 8, now it is 4 \(and 1 more\); choose another folder"):
        trainer_of(game(tmp_path, "train.seed=1", "train.batch=4"), tmp_path)
    trainer_of(game(tmp_path, "train.steps=3", "train.accumulate=2", "train.parallel=fsdp"), tmp_path)


def test_non_finite_loss_is_skipped_then_named(tmp_path: Path) -> None:
    stage = game(tmp_path, "train.steps=6", "train.save_every=2")
    trainer = trainer_of(stage, tmp_path)
    inner = stage.losses
    before = {name: tensor.clone() for name, tensor in stage.model.named_parameters()}

    def broken(step: int):
        terms = inner(step)
        return {**terms, "distance": terms["distance"] * math.nan} if "distance" in terms else terms

    stage.losses = broken
    assert trainer.run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.model.named_parameters())
    assert [row["skipped"] for row in rows(tmp_path) if "skipped" in row] == [["distance"]] * 3

    stage = game(tmp_path, "train.steps=60", "train.save_every=2")
    trainer = trainer_of(stage, tmp_path / "again")
    fine = stage.losses
    stage.losses = lambda step: {k: v * (math.nan if step > 4 else 1) for k, v in fine(step).items()}
    with pytest.raises(RuntimeError, match="not finite in 10 steps of discriminator in a row at step 23"):
        trainer.run()
    assert trainer_of(game(tmp_path, "train.steps=60", "train.save_every=2"), tmp_path / "again").step == 4


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next step, in one line; the one before stays, and the same command goes on from it."""
    changes = ("train.steps=1000", "train.save_every=2")
    trainer, save = trainer_of(game(tmp_path, *changes), tmp_path), dcp.save

    def write(*arguments: object, **named: object) -> object:
        if trainer.checkpoints.steps() == [2]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(dcp, "save", write)
    with pytest.raises(OSError, match=r"step-00000004: could not be written \(No space left on device\)") as found:
        trainer.run()
    assert "\n" not in str(found.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "model").exists()
    assert trainer_of(game(tmp_path, *changes), tmp_path).step == 2


def test_an_error_of_a_step_lets_a_checkpoint_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, save = game(tmp_path, "train.steps=6", "train.save_every=2"), dcp.save
    inner, failed = stage.losses, Event()

    def losses(step: int):
        if step == 2:
            failed.set()
            raise RuntimeError("no such kernel")
        return inner(step)

    def write(*arguments: object, **named: object) -> object:
        assert failed.wait(60)
        return save(*arguments, **named)  # type: ignore[arg-type]

    stage.losses = losses
    monkeypatch.setattr(dcp, "save", write)
    trainer = trainer_of(stage, tmp_path)
    with pytest.raises(RuntimeError, match="no such kernel"):
        trainer.run()
    assert trainer.checkpoints.steps() == [2]


def test_precision_auto_times_both_logs_them_and_keeps_its_choice(tmp_path: Path) -> None:
    stage = game(tmp_path, "train.steps=2", "train.precision=auto")
    trainer = train(stage, tmp_path)
    row = rows(tmp_path)[1]
    seconds = {name: row[f"precision/{name}_step_seconds"] for name in ("fp32", "bf16")}
    assert trainer.precision == stage.precision == min(seconds, key=seconds.__getitem__)
    assert trainer_of(game(tmp_path, "train.steps=2", "train.precision=auto"), tmp_path).precision == trainer.precision
    with pytest.raises(ConfigError, match="precision is 'auto' with parallel 'fsdp'"):
        game(tmp_path, "train.precision=auto", "train.parallel=fsdp")


def test_timing_leaves_no_trace(workspace: Path) -> None:
    stage = autoencoder_stage(workspace)
    before = {name: tensor.clone() for name, tensor in stage.model.state_dict().items()}
    time_precisions(stage)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stage.model.state_dict().items())
    assert all(parameter.grad is None for parameter in stage.model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_in_single_precision(workspace: Path, precision: str) -> None:
    stage = autoencoder_stage(workspace)
    stage.precision = precision
    terms = stage.losses(6000)  # where the spectral loss is on
    assert set(terms) == {"waveform", "softnorm", "spectral"}
    assert all(value.dtype == torch.float32 for value in terms.values())


@pytest.mark.usefixtures("pictures")
def test_demo_leaves_pictures_beside_its_sound(workspace: Path, tmp_path: Path) -> None:
    stage = autoencoder_stage(workspace)
    with torch.no_grad():
        stage.demo(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000007-latents.png", "000007.png", "000007.wav"]


@pytest.mark.parametrize("asked", [True, False])
def test_a_compiler_that_ends_with_the_signal_is_no_error(asked: bool, tmp_path: Path) -> None:
    """A Ctrl-C goes to all processes of a terminal, so also to the compiler that a step waits for."""
    changes = ("train.steps=6", "train.save_every=2")
    whole = train(game(tmp_path, *changes), tmp_path / "whole")
    trainer = trainer_of(game(tmp_path, *changes), tmp_path / "run")
    step = trainer._train_step

    def interrupted(log: RunLog) -> None:
        step(log)
        if trainer.step == 3:
            trainer.asked = asked
            raise RuntimeError("C++ compile error")

    trainer._train_step = interrupted  # type: ignore[method-assign]
    if not asked:
        with pytest.raises(RuntimeError, match="compile"):
            trainer.run()
        return
    assert trainer.run() is False and trainer.step == 2
    again = trainer_of(game(tmp_path, *changes), tmp_path / "run")
    assert again.step == 2 and again.run()
    assert all(map(torch.equal, whole.stage.model.parameters(), again.stage.model.parameters()))
