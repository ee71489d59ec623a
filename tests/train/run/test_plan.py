"""Plans of trainings: what is counted without computing is what a real step takes; impossible settings are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from torch import Tensor

from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import ConfigError
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.train.autoencoder.semantics.critic import Critic
from sa3_torch.train.flow.pretrain import PretrainConfig
from sa3_torch.train.run import parallel
from sa3_torch.train.run.blocks import work_by_blocks
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.planning import timing
from sa3_torch.train.run.planning.count import StepCounter, count_step, make_fake, networks_of, trained_of
from sa3_torch.train.run.planning.device import Device
from sa3_torch.train.run.planning.plan import TIMED_STEPS, TrainingPlan, make_plan
from sa3_torch.train.run.settings import load_settings
from tests.support import stages
from tests.support.command import refused_line, sa3, snapshot
from tests.support.stages import STAGES

DEVICE = Device(name="a test", gpu=False, memory=1e12, rates={"fp32": 1e12, "bf16": 1e13}, nominal=True)


def planned(name: str, workspace: Path, *changes: str, processes: int = 1) -> TrainingPlan:
    return _planned(name, workspace, changes, processes, stages.MODEL)


@cache
def _planned(name: str, workspace: Path, changes: tuple[str, ...], processes: int, _model: ModelConfig) -> TrainingPlan:
    stage = STAGES[name](workspace, *changes)
    train = stage.config.train  # type: ignore[attr-defined]
    return make_plan(stage, train, processes=processes, device=DEVICE, timed=False)


@pytest.mark.parametrize("name", STAGES)
def test_a_step_without_values_takes_what_a_real_one_takes(name: str, workspace: Path) -> None:
    """Measured: bytes to 0.3 %, of the warm-up, whose first steps also keep trajectories, to 2.5 %; FLOPs exactly. The
    last step has every term."""
    stage = STAGES[name](workspace)
    trained, step = trained_of(stage), stage.config.train.steps - 1  # type: ignore[attr-defined]
    real = count_step(stage, trained, step, [BatchSlice()])
    make_fake(networks_of(stage))
    found = count_step(stage, trained_of(stage), step, [BatchSlice()])
    assert found.flops == real.flops > 0
    assert found.gradient_bytes == real.gradient_bytes
    assert found.peak_bytes == pytest.approx(
        real.peak_bytes, rel=0.04 if name in ("ode-warmup", "own-states") else 0.01
    )


def test_bytes_are_those_of_living_tensors() -> None:
    with StepCounter() as memory:
        a = torch.zeros(1000)
        assert memory.live == 4000
        b = a.view(10, 100).T  # no storage of its own
        assert memory.live == 4000
        c = a + 1
        del a, b
        assert memory.live == 4000 and memory.peak == 8000
        c += 1
    assert memory.peak == 8000


def test_arithmetic_of_products_and_attention_is_counted() -> None:
    q, k = torch.zeros(2, 3, 5, 64), torch.zeros(2, 3, 7, 64)
    with StepCounter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, k, k)
    assert counter.flops == 4 * 2 * 3 * 5 * 7 * 64
    with StepCounter() as counter:
        torch.nn.functional.linear(q, torch.zeros(8, 64))
    assert counter.flops == 2 * 2 * 3 * 5 * 64 * 8


@pytest.mark.parametrize(("name", "frozen"), [("pretrain", {"same"}), ("distill", {"teacher"}), ("quantize", {"dit"})])
def test_networks_of_a_stage(name: str, frozen: set[str], workspace: Path) -> None:
    stage, plan = STAGES[name](workspace), planned(name, workspace)
    assert frozen <= {name for name, (own, others) in plan.parameters.items() if others and not own}
    for group in stage.groups:
        assert plan.parameters[group][0] > 0
    assert plan.memory.frozen > 0


def test_a_compiled_network_is_counted_once(workspace: Path, recwarn: pytest.WarningsRecorder) -> None:
    plain = planned("autoencoder", workspace)
    compiled = STAGES["autoencoder"](workspace, "train.compile=true")
    plan = make_plan(compiled, compiled.config.train, processes=1, device=DEVICE, timed=False)
    assert (plan.parameters, plan.memory, plan.flops) == (plain.parameters, plain.memory, plain.flops)
    assert not [warning for warning in recwarn if "hooks" in str(warning.message)]


def test_memory_adds_up(workspace: Path) -> None:
    stage = STAGES["autoencoder"](workspace)
    numbers = [parameter.numel() for parameter in stage.model.parameters()]
    plan = planned("autoencoder", workspace)
    assert plan.parameters == {"generator": (sum(numbers), 0)}
    buffers = sum(buffer.nbytes for buffer in stage.model.buffers())
    memory = plan.memory
    assert memory.weights == memory.average == 4 * sum(numbers) + buffers
    assert memory.gradients == 4 * sum(numbers)
    assert memory.optimizer == 8 * sum(numbers) + 4 * len(numbers)  # and a counter for each
    assert memory.frozen == memory.exchange == 0
    assert memory.peak == sum(vars(memory).values())


def test_processes_and_micro_batches_make_activations_smaller(workspace: Path) -> None:
    one, two = planned("pretrain", workspace), planned("pretrain", workspace, processes=2)
    cut = planned("pretrain", workspace, "train.accumulate=2")
    assert planned("autoencoder", workspace, "train.accumulate=2").memory.peak > 0  # what it prepares is there
    assert two.memory.activations < 0.7 * one.memory.activations
    assert two.memory.exchange == one.memory.gradients and two.memory.weights == one.memory.weights
    assert two.flops == pytest.approx(one.flops / 2, rel=0.1)  # a micro-batch may be cut from another bucket
    assert cut.flops == pytest.approx(one.flops, rel=0.01)
    sharded = planned("pretrain", workspace, "train.parallel='fsdp'", processes=4)
    assert sharded.memory.optimizer == one.memory.optimizer // 4
    assert sharded.memory.weights == one.memory.weights // 4
    assert sharded.memory.exchange > 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clips_that_are_compared_with_those_of_other_processes_are_planned(accumulate: int, workspace: Path) -> None:
    """Although these are not there: the vectors of this process stand for theirs."""
    one = planned("clap", workspace)
    two = planned("clap", workspace, f"train.accumulate={accumulate}", processes=2)
    assert two.memory.exchange == one.memory.gradients
    earlier = two.memory.gradients if accumulate > 1 else 0  # are there beside those of a later micro-batch
    assert 0 < two.memory.activations - earlier < one.memory.activations


def test_the_critic_is_planned_with_the_crops_of_all_processes(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every crop stands beside two others, in three ways; the two of a process by themselves would have one other."""
    rows, forward = [], Critic.forward

    def counted(self: Critic, *given: Tensor) -> Tensor:
        rows.append(len(given[0]))
        return forward(self, *given)

    monkeypatch.setattr(Critic, "forward", counted)
    for processes in (1, 2):
        rows.clear()
        stage = STAGES["complete"](workspace)
        make_plan(stage, stage.config.train, processes=processes, device=DEVICE, timed=False)  # type: ignore[attr-defined]
        assert set(rows) == {4 // processes * (1 + 2 * 3)}
    assert parallel.own_slice() == BatchSlice()


def test_a_text_encoder_that_only_reads_captions_is_frozen_memory(workspace: Path) -> None:
    """It is in a list, so that checkpoints do not hold it."""
    own = (f"semantics.text_encoder={str(workspace / 'base')!r}", "semantics.text_width=48")
    words, frozen = STAGES["complete"](workspace), STAGES["complete"](workspace, *own)
    assert not networks_of(words).keys() - words.groups.keys()
    (name,) = networks_of(frozen).keys() - frozen.groups.keys()
    assert isinstance(networks_of(frozen)[name], T5GemmaEncoder)


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """With four blocks in the DiT."""
    diffusion = stages.MODEL.diffusion
    assert diffusion is not None
    diffusion = replace(diffusion, dit=replace(diffusion.dit, depth=4))
    monkeypatch.setattr(stages, "MODEL", replace(stages.MODEL, diffusion=diffusion))


@pytest.mark.usefixtures("deep")
@pytest.mark.parametrize("name", ["autoencoder", "pretrain"])
def test_checkpointed_blocks_give_the_same_gradients_with_less_memory(name: str, workspace: Path) -> None:
    gradients, counts = [], []
    for on in (False, True):
        stage = STAGES[name](workspace)
        names = list(stage.model.state_dict())
        if on:
            work_by_blocks(stage.model, compiled=False, checkpointed=True)
        assert list(stage.model.state_dict()) == names
        trained = trained_of(stage)
        counts.append(count_step(stage, trained, 0, [BatchSlice()]))
        torch.stack(list(stage.losses(0).values())).sum().backward()
        gradients.append([parameter.grad for parameter in stage.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert counts[1].peak_bytes < 0.95 * counts[0].peak_bytes
    assert counts[1].flops > counts[0].flops


def test_a_checkpointed_block_keeps_little_more_than_its_input(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured: 2.2 times its input, keys and values of the context included; 5.1 with its local term, too."""
    diffusion = stages.MODEL.diffusion
    assert diffusion is not None
    kept = []
    for depth in (2, 6):
        dit = replace(diffusion.dit, depth=depth)
        monkeypatch.setattr(stages, "MODEL", replace(stages.MODEL, diffusion=replace(diffusion, dit=dit)))
        stage = STAGES["pretrain"](workspace, "train.batch=16")
        work_by_blocks(stage.model, compiled=False, checkpointed=True)
        with StepCounter() as counter:
            terms = stage.losses(0)
            kept.append(counter.live)
        assert terms
    frames = stage.latents.train.plan(0).frames  # type: ignore[attr-defined]
    block_input = 16 * (frames + diffusion.dit.memory_tokens) * diffusion.dit.width * 4
    assert (kept[1] - kept[0]) / 4 < 2.7 * block_input


@pytest.mark.usefixtures("deep")
def test_checkpointed_blocks_are_a_setting(workspace: Path) -> None:
    plain, less = planned("pretrain", workspace), planned("pretrain", workspace, "train.checkpoint_blocks=true")
    assert less.memory.activations < plain.memory.activations


def test_what_cannot_be_is_refused(workspace: Path) -> None:
    plan = planned("pretrain", workspace)
    plan.check()
    small = replace(plan, device=replace(DEVICE, memory=1e6))
    with pytest.raises(
        ValueError, match=r"memory: a process of pretrain needs .* more than the 1.0 MB that a test has"
    ):
        small.check()
    with pytest.raises(ConfigError, match="batch is 4: 3 parts"):
        planned("pretrain", workspace, processes=3)


def test_speed_is_modelled_or_timed(workspace: Path) -> None:
    plan = planned("pretrain", workspace)
    assert plan.seconds == pytest.approx(plan.flops / 0.4e12)
    assert "modelled: 40% of the nominal 1 TFLOPS of a test" in str(plan)
    stage = STAGES["game"](workspace)
    timed = make_plan(stage, stage.config.train, processes=1, device=DEVICE, timed=True)  # type: ignore[attr-defined]
    assert timed.timed is not None and timed.timed > 0 and "timed with a test, one process" in str(timed)


def test_steps_that_are_timed_are_shown(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar for each precision and each group: on a terminal, after a second."""
    bars = dict[str, int]()

    def bar(steps: range, *, desc: str, unit: str, disable: bool | None, delay: float, leave: bool) -> range:
        assert (unit, disable, leave) == ("step", None, False) and delay >= 1
        bars[desc] = len(steps)
        return steps

    monkeypatch.setattr(timing, "tqdm", bar)
    stage = STAGES["pretrain"](workspace, "train.precision='auto'")
    config = stage.config.train  # type: ignore[attr-defined]
    make_plan(stage, config, processes=1, device=DEVICE, timed=True)
    assert bars == {"time fp32": timing.TIMED_STEPS, "time bf16": timing.TIMED_STEPS, "time diffusion": TIMED_STEPS + 1}
    bars.clear()
    make_plan(stage, config, processes=1, device=DEVICE, timed=False)
    assert not bars


def test_what_breaks_first_is_named(workspace: Path) -> None:
    plan = planned("pretrain", workspace)
    assert 0 < plan.memory.weights + plan.memory.optimizer < plan.validation < plan.memory.peak == plan.peak
    slow = replace(plan, reading=2 * plan.seconds)
    assert slow.loads["reading of data"] == pytest.approx(2) and "first to break: reading of data, at 200%" in str(slow)
    full = replace(slow, device=replace(DEVICE, memory=plan.peak / 4))
    assert "first to break: memory of a step, at 400%" in str(full)
    measuring = replace(full, validation=2 * plan.peak)
    assert measuring.peak == 2 * plan.peak and "first to break: memory of validation, at 800%" in str(measuring)


def test_a_preset_says_what_it_is_for() -> None:
    config = load_settings(PretrainConfig, "pretrain", "large", ())
    assert config.machine is not None and (config.machine.device, config.machine.processes) == ("H200", 8)
    assert load_settings(PretrainConfig, "pretrain", "first", ()).machine is None
    with pytest.raises(ConfigError, match="processes is 0"):
        load_settings(PretrainConfig, "pretrain", "large", ("machine.processes=0",))


def test_devices() -> None:
    assert Device.find("H200").memory == 141e9
    with pytest.raises(ValueError, match="--device H300: allowed are H100, H200"):
        Device.find("H300")


def arguments(workspace: Path, *more: str) -> list[str]:
    folders = ("--latents", str(workspace / "latents"), "--autoencoder", str(workspace / "run" / "model"))
    return ["pretrain", *folders, "--device", "H200", "--set", "train.compile=false", *more]


@pytest.fixture
def command(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, pytest.MonkeyPatch]:
    """The tiny model under the name of the demo, in an empty folder."""
    from sa3_torch.train.flow import pretrain

    monkeypatch.setattr(pretrain, "PRESETS", {**pretrain.PRESETS, "first": stages.MODEL})
    monkeypatch.chdir(tmp_path)
    return workspace, monkeypatch


def test_the_command_writes_nothing(
    command: tuple[Path, pytest.MonkeyPatch], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace, _ = command
    before = snapshot(workspace, tmp_path)
    after = sa3(capfd, "train", *arguments(workspace, "--dry-run", "--processes", "2", "--out", str(tmp_path / "run")))
    assert after.code == 0, after
    said = ("pretrain: ", "trained", "memory of a process", "activations", "train ", "items", "steps/s")
    for words in (*said, "while it validates", "CPU-seconds a step and process", "first to break: "):
        assert words in after.out
    assert "2 process(es) x 1 micro-batch(es)" in after.out and "nothing was started or written" in after.out
    group = sa3(capfd, "train", "--dry-run", *arguments(workspace))
    assert group.code == 0 and "1 process(es)" in group.out
    assert snapshot(workspace, tmp_path) == before


def test_the_command_refuses(
    command: tuple[Path, pytest.MonkeyPatch], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace, monkeypatch = command

    def line(*args: str) -> str:
        return refused_line(capfd, tmp_path, "train", *args)

    assert "batch is 5: 2 parts" in line(
        *arguments(workspace, "--dry-run", "--processes", "2", "--set", "train.batch=5")
    )
    assert "give the folder of the run" in line("pretrain", *arguments(workspace)[1:5])
    assert "are only for --dry-run" in line(*arguments(workspace, "--out", "x"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without torchrun" in line(*arguments(workspace, "--dry-run"))
    monkeypatch.delenv("WORLD_SIZE")
    latents = tmp_path / "other"
    latents.mkdir()
    for path in (workspace / "latents").iterdir():
        (latents / path.name).write_bytes(path.read_bytes())
    index = json.loads((latents / "index.json").read_text())
    (latents / "index.json").write_text(json.dumps({**index, "autoencoder": "sha256:0"}))
    other = ["--latents", str(latents)]
    assert "was encoded by autoencoder sha256:0" in line(*arguments(workspace, "--dry-run", *other))
    (latents / "index.json").write_text(json.dumps(index))
    for path in latents.glob("shard-*.json"):
        path.write_text(path.read_text().replace('"validation"', '"train"'))
    alone = [
        other[1] if word == str(workspace / "latents") else word
        for word in arguments(workspace, "--dry-run", "--ungated")
    ]
    assert "no item of split validation" in line(*alone)
