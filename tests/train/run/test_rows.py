"""A process reads what it trains on, once a step, and measures in pieces as small as its micro-batches."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.run.parallel import BatchSlice
from tests.support.stages import STAGES, trainer_of

pytestmark = pytest.mark.usefixtures("no_pictures")

LATENT_STAGES = ("pretrain", "lora", "ode-warmup", "posttrain", "clap")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every reading of an item's latents."""
    made, read = list[str](), LatentSet.read

    def counted(self, item, *place):
        made.append(item.id)
        return read(self, item, *place)

    monkeypatch.setattr(LatentSet, "read", counted)
    return made


@pytest.mark.parametrize("name", LATENT_STAGES)
def test_a_step_reads_each_of_its_items_once(name: str, workspace: Path, tmp_path: Path, reads: list[str]) -> None:
    """In two micro-batches; they used to read the whole batch for each in post-training, warm-up and CLAP."""
    stage = STAGES[name](workspace, "train.accumulate=2")
    trainer = trainer_of(stage, tmp_path)
    reads.clear()
    trainer._gradients(stage.turn(0))
    assert len(reads) == stage.config.train.batch  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", LATENT_STAGES)
def test_a_process_reads_its_own_items_only(name: str, workspace: Path, reads: list[str]) -> None:
    stage = STAGES[name](workspace)
    reads.clear()
    assert stage.feed is not None
    stage.feed.get(0, BatchSlice(rank=1, world=4))
    assert len(reads) == stage.config.train.batch // 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", LATENT_STAGES)
def test_validation_runs_in_micro_batches_and_gives_what_whole_batches_give(name: str, workspace: Path) -> None:
    """Measured: 2e-7."""
    stage, seen = STAGES[name](workspace), list[int]()
    network = stage.model.audio if name == "clap" else stage.networks.dit  # type: ignore[attr-defined]
    network.register_forward_pre_hook(lambda _module, arguments: seen.append(len(arguments[0])))
    batch = stage.config.train.batch  # type: ignore[attr-defined]
    with torch.no_grad():
        whole, largest = stage.validate(), max(seen)
        seen.clear()
        stage.slices = BatchSlice().micro_batches(batch)
        pieces = stage.validate()
    assert max(seen) == 1 and largest > 1
    assert pieces == pytest.approx(whole, rel=2e-5)


def test_captions_are_tokenised_when_they_are_drawn(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of them when a stage begins, on every process."""
    from sa3_mlx.common.text.tokenizer import Tokenizer

    texts, encode = list[str](), Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, given: texts.extend(given) or encode(self, given))
    stage = STAGES["pretrain"](workspace)
    assert not texts
    stage.losses(0)
    first = len(texts)
    stage.losses(0)
    assert 0 < first == len(texts) <= 4
