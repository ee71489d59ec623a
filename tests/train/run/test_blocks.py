"""Compiled blocks: which stages compile, how many graphs there are, and what one graph cannot hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.schema import ConfigError
from sa3_torch.attention import attend
from sa3_torch.clap.network import ModulatedBlock
from sa3_torch.dit import Context, DiTBlock, LocalInput, Sequence
from sa3_torch.layers import rope
from sa3_torch.train.few_steps.ode_warmup import OdeWarmupStage
from sa3_torch.train.run.blocks import work_by_blocks
from sa3_torch.train.run.planning.device import Device
from sa3_torch.train.run.planning.plan import make_plan
from tests.support.stages import MODEL, STAGES, trainer_of

pytestmark = pytest.mark.usefixtures("no_pictures")

COMPILED = [name for name in STAGES if name != "game"]  # which has no blocks
# Graphs of the first steps; a block of the generator, of the discriminator and of a teacher are the same method. In
# "frechet" those of the discriminator are frozen, which is another one, as are those of the rollout in "own-states".
ONE = ("pretrain", "text", "lora", "clap")
GRAPHS = {**dict.fromkeys(ONE, 1), "ode-warmup": 2, "own-states": 3, "posttrain": 4, "frechet": 5, "quantize": 2}
QUICK = ("autoencoder", "pretrain", "posttrain")  # the others have the same blocks


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What PyTorch makes of blocks, which is run as it is: no compiler is needed."""
    made: list[int] = []

    def backend(module: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        made.append(len(module.graph.nodes))
        return module.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    yield made
    torch.compiler.reset()


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK)) for n in COMPILED])
def test_a_stage_compiles_few_graphs_once_and_computes_the_same(
    name: str, workspace: Path, tmp_path: Path, graphs: list[int]
) -> None:
    """Blocks are whole graphs, or compiling raises. Later steps make no others, but for sizes that were equal by chance
    in the first ones (quantize), and what is measured makes none."""
    losses = []
    for on in (False, True):
        stage = STAGES[name](workspace, f"train.compile={on}".lower())
        trainer = trainer_of(stage, tmp_path / str(on))
        trainer.precision = "fp32"
        found = dict[str, float]()
        alone = getattr(stage.config, "head_start", 0)  # type: ignore[attr-defined]  # steps of one group
        for trainer.step in range(alone + 4):
            turn = stage.turn(trainer.step)
            found |= trainer._gradients(turn)
            trainer.optimizers[turn].zero_grad()
            if trainer.step == alone + 1:
                first = len(graphs)
        losses.append(found)
    assert 0 < first == GRAPHS.get(name, first) and len(graphs) == first * (2 if name == "quantize" else 1)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-5)
    if name in ("autoencoder", "pretrain"):
        with trainer._averaged():
            stage.validate()
        assert len(graphs) == first


def run_block(block: DiTBlock, frames: int, *, masked: bool, last: bool) -> torch.Tensor:
    """Run a block forward and backward on random input."""
    torch.manual_seed(frames)
    memory, width = 2, MODEL.diffusion.dit.width  # type: ignore[union-attr]
    tokens = memory + frames
    mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool) if masked else None
    heads = block.cross_attn.prepare(torch.randn(2, 3, width))
    y: torch.Tensor = block(
        torch.randn(2, tokens, width, requires_grad=True),
        torch.randn(2, 6 * width),
        Context(keys=heads[0], values=heads[1], bias=None),
        LocalInput(torch.randn(2, frames, 1 + MODEL.same.latent_channels)),
        Sequence(memory=memory, table=rope(0, tokens, torch.device("cpu")), attend=partial(attend, mask=mask)),
        last,
    )
    y.sum().backward()
    return y.detach()


@pytest.mark.parametrize("checkpointed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_one_graph_serves_all_lengths(checkpointed: bool, graphs: list[int]) -> None:
    """For the last block and the others, with a mask and without. Sizes that are equal at first, and not later,
    take a second set, once."""
    assert MODEL.diffusion is not None
    plain = DiTBlock(MODEL.diffusion.dit, MODEL.same.latent_channels)
    network = torch.nn.ModuleList(DiTBlock(MODEL.diffusion.dit, MODEL.same.latent_channels) for _ in range(3))
    for block in network:
        block.load_state_dict(plain.state_dict())
    work_by_blocks(network, compiled=True, checkpointed=checkpointed)
    after = []
    for frames in (16, 40, 24, 8):
        for masked in (False, True):
            for number, block in enumerate(network):
                found = run_block(block, frames, masked=masked, last=number == 2)
                torch.testing.assert_close(found, run_block(plain, frames, masked=masked, last=number == 2))
        after.append(len(graphs))
    assert after[0] == 4 and after[1:] == [8] * 3


def test_blocks_of_other_networks_are_compiled_for_all_lengths(graphs: list[int]) -> None:
    block = ModulatedBlock(64)
    work_by_blocks(block, compiled=True, checkpointed=False)
    for tokens in (12, 7, 30):
        block(torch.randn(2, tokens, 64), torch.randn(2, 384), rope(0, tokens, torch.device("cpu")), attend)
    assert len(graphs) == 1


def test_the_teacher_is_compiled_too(workspace: Path, graphs: list[int]) -> None:
    stage = STAGES["ode-warmup"](workspace, "train.compile=true")
    assert isinstance(stage, OdeWarmupStage)
    stage.trajectory(0)
    assert len(graphs) == 1


def test_what_one_graph_cannot_hold_is_refused(graphs: list[int]) -> None:
    class Broken(ModulatedBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return x

    from sa3_torch.train.run import blocks

    block = Broken(64)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(blocks.METHODS, Broken, ("forward",))
        patched.setitem(blocks.ANY_LENGTH, Broken, True)
        work_by_blocks(block, compiled=True, checkpointed=False)
    with pytest.raises(
        ConfigError, match=r"Broken\.forward cannot be compiled here \(.*set train.compile=false"
    ) as error:
        block(torch.zeros(1))
    assert "\n" not in str(error.value) and not graphs


@pytest.mark.parametrize(("name", "refused"), [("pretrain", True), ("clap", False), ("autoencoder", False)])
def test_units_inside_of_blocks_are_refused(name: str, refused: bool, workspace: Path, graphs: list[int]) -> None:
    stage = STAGES[name](workspace, "train.compile=true", "train.parallel='fsdp'")
    device = Device(name="a test", gpu=False, memory=1e12, rates={"fp32": 1e12, "bf16": 1e13}, nominal=True)
    train = stage.config.train  # type: ignore[attr-defined]
    if not refused:
        assert make_plan(stage, train, processes=2, device=device, timed=False).memory.peak > 0 and not graphs
        return
    with pytest.raises(ConfigError, match=r"gathers parts of a DiTBlock by themselves: set train\.compile=false"):
        make_plan(stage, train, processes=2, device=device, timed=False)
