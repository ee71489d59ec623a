"""What pre-training draws, shows, starts from and refuses [T4.1], [T4.2], [T4.5], [T4.8], [T4.9]."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.data.batches import LatentBatch
from sa3_torch.train.data.drawing import draw_parts
from sa3_torch.train.data.latents import LatentItem
from sa3_torch.train.flow.conditioning import Networks
from sa3_torch.train.flow.masks import Masks
from sa3_torch.train.flow.matching import FlowDraw, velocity_errors
from sa3_torch.train.flow.pretrain import PretrainConfig, PretrainStage
from sa3_torch.train.flow.times import truncated_logit_normal
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.settings import load_settings, preset_names
from sa3_torch.weights import load_model
from tests.support.stages import MODEL, pretrain_stage, text_stage


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", preset_names("pretrain"))
def test_presets_name_a_model_and_fit_it(name: str) -> None:
    config = load_settings(PretrainConfig, "pretrain", name, ())
    ours, size = name.startswith(("first", "music")), name.removesuffix("-short").removesuffix("-middle")
    model = PRESETS[size if ours else {"small": "small-music-base"}.get(size, f"{size}-base")]
    assert model.diffusion is not None and config.times.shift_max_frames <= 4096
    assert config.train.batch % (config.train.accumulate * (1 if ours else 8)) == 0


def test_dropout_takes_prompt_and_seconds_token_and_leaves_the_duration(workspace: Path) -> None:
    stage = pretrain_stage(workspace)
    batch = stage.latents.train.batch(0)
    draw = stage.latents.masks(batch, slice(0, 4), 0)
    drop = torch.tensor([True, False, True, False])
    with torch.no_grad():
        plain, dropped = stage.networks.conditioning(batch, draw), stage.networks.conditioning(batch, draw, drop)
    assert dropped.context.shape[1] == MODEL.diffusion.text_encoder.max_length + 1
    assert not dropped.context[drop].any() and torch.equal(dropped.context[~drop], plain.context[~drop])
    assert torch.equal(dropped.seconds, plain.seconds) and torch.equal(dropped.local, plain.local)
    share = torch.cat([stage.flow.read(step, BatchSlice()).drop for step in range(250)]).float().mean()
    assert float(share) == pytest.approx(0.1, abs=0.03)


def test_nothing_kept_is_zeros_for_the_local_input(workspace: Path) -> None:
    stage = pretrain_stage(workspace, "clips.mask_shares=[0.0, 1.0, 0.0]")
    batch = stage.latents.train.batch(0)
    assert not stage.networks.conditioning(batch, stage.latents.masks(batch, slice(0, 4), 0)).local.any()


def test_padding_changes_no_gradient(workspace: Path) -> None:
    """Neither through attention nor through the loss."""
    stage = pretrain_stage(workspace)
    batch = stage.latents.train.batch(0)
    draw, t = stage.latents.masks(batch, slice(0, 4), 0), torch.full((4,), 0.6)
    noise = torch.randn(batch.latents.shape, generator=generator())
    assert not draw.valid.all()
    losses = []
    for padding in (0.0, 30.0):
        z = torch.where(draw.valid[..., None], batch.latents, padding)
        changed = LatentBatch(z, batch.valid, batch.ids, batch.mask, batch.seconds, batch.items)
        drawn = FlowDraw(batch=changed, t=t, masks=draw)
        losses.append(float(sum(error.mean() for error in velocity_errors(stage.networks, drawn, noise)).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_attention_has_a_mask_only_where_a_frame_is_padding(whole: bool, workspace: Path) -> None:
    stage = pretrain_stage(workspace)
    batch = stage.latents.train.batch(0)
    valid = torch.ones_like(batch.valid) if whole else batch.valid
    draw = Masks.nothing_kept(valid)
    inputs = stage.networks.inputs(batch, draw)
    assert (inputs.valid is None) == whole
    drawn = FlowDraw(batch=batch, t=torch.full((4,), 0.6), masks=draw)
    noise = torch.ones_like(batch.latents)
    found = [error.detach() for error in velocity_errors(stage.networks, drawn, noise)]
    inputs = dataclasses.replace(inputs, valid=valid)
    with patch.object(Networks, "inputs", return_value=inputs):  # with a mask that takes nothing away
        masked = [error.detach() for error in velocity_errors(stage.networks, drawn, noise)]
    torch.testing.assert_close(found, masked, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("length", "expected"), [("duration", 0.75951), ("valid", 0.62246)])
def test_times_are_shifted_by_the_asked_length(workspace: Path, length: str, expected: float) -> None:
    """Items that are parts of long pieces: the full duration counts, or the valid frames."""
    stage = pretrain_stage(
        workspace, f"times.length={length}", "times.shift_min_frames=48", "times.shift_max_frames=96"
    )
    batch = stage.latents.train.batch(0)
    long = dataclasses.replace(batch, seconds=torch.full((4,), 10.0))
    u = torch.rand(4, generator=generator())
    t, shifted = truncated_logit_normal(u), stage.config.times.draw(long, MODEL, u)
    odds = shifted * (1 - t) / (t * (1 - shifted))
    torch.testing.assert_close(odds, torch.full((4,), expected / (1 - expected)), rtol=1e-3, atol=0)


def test_long_clips_are_cut_to_the_asked_frames(workspace: Path) -> None:
    """Of a clip that is longer, parts from anywhere in it are taken, and all of their frames are valid."""
    whole, short = pretrain_stage(workspace), pretrain_stage(workspace, "clips.max_frames=16")
    shapes = {short.latents.train.batch(step).latents.shape[1] for step in range(8)}
    starts = {start for step in range(8) for start in short.latents.train.plan(step).starts}
    assert shapes == {16} and whole.latents.train.batch(0).latents.shape[1] > 16 and len(starts) > 1
    assert bool(short.latents.train.batch(0).valid.all())


def test_settings_that_mean_nothing_are_refused(workspace: Path) -> None:
    for change, message in (
        ("times.shift_max_frames=8", "shift_max_frames is 8"),
        ("clips.mask_shares=[1.0, 1.0]", "mask_shares"),
        (f"clips.max_frames={MODEL.diffusion.max_frames + 1}", f"at most {MODEL.diffusion.max_frames} frames"),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain_stage(workspace, change)


def _means(notes: dict[str, torch.Tensor]) -> dict[str, float]:
    """What the log shows of notes that were added up."""
    pairs = {name: value.tolist() if value.ndim else (float(value), 1.0) for name, value in notes.items()}
    return {name: total / count for name, (total, count) in pairs.items() if count}


def test_notes_of_parts_add_up_to_those_of_the_batch(workspace: Path) -> None:
    """Errors by time are means over the whole batch, whoever computed them."""
    stage = pretrain_stage(workspace, "train.batch=16", "clips.mask_shares=[0.25, 0.5, 0.25]")
    slices = [BatchSlice(), *(BatchSlice(rank=rank, world=2) for rank in range(2))]
    notes = []
    for stage.batch_slice in slices:
        stage.notes = {}
        loss = stage.losses(1)["flow"].detach()
        notes.append({**stage.notes, "flow": loss})
    notes[1:] = [{name: value if value.ndim else value / 2 for name, value in part.items()} for part in notes[1:]]
    whole, both = _means(notes[0]), _means({name: notes[1][name] + notes[2][name] for name in notes[0]})
    assert whole.keys() == both.keys()
    for name in whole:
        if not name.endswith("/std"):
            assert both[name] == pytest.approx(whole[name], rel=1e-5), name
    drawn = stage.flow.read(1, BatchSlice())
    shares = [whole[f"times/t{k / 10}"] for k in range(10)]
    assert sum(shares) == pytest.approx(1)
    assert sum(whole[f"masks/{kind}"] for kind in ("segments", "full", "causal")) == pytest.approx(1)
    used = {f"flow/t{int(t * 10) / 10}" for t in drawn.t.tolist() if t < 1}
    assert used == {name for name in whole if name.startswith("flow/t")}
    errors = [whole[f"flow/t{k / 10}"] * 16 * shares[k] for k in range(10) if f"flow/t{k / 10}" in whole]
    assert sum(errors) / 16 == pytest.approx(whole["flow/generated"], rel=1e-5)


def test_validation_compares_with_other_captions_none_and_the_best_linear_velocity(workspace: Path) -> None:
    stage = pretrain_stage(workspace)
    with torch.no_grad():
        measures, again = stage.validate(), stage.validate()
    assert measures == again  # fixed noise
    assert {"flow", "shuffled_ratio", "dropped_ratio", "wiener_ratio", "flow_t0.1", "flow_t0.9"} <= measures.keys()
    assert measures["wiener_ratio"] > 1  # of an untrained model
    assert measures["shuffled_ratio"] == pytest.approx(1) and measures["dropped_ratio"] == pytest.approx(1)


def test_text_encoder_of_a_checkpoint_stays_as_it_is(workspace: Path) -> None:
    stage = text_stage(workspace)
    theirs = load_model(workspace / "random", torch.device("cpu")).get_submodule("text_encoder").state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in stage.networks.text_encoder.state_dict().items())
    sum(stage.losses(0).values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in stage.networks.text_encoder.parameters())
    assert not stage.networks.dit.project_out.weight.any()  # a new model but for the text encoder


def started(workspace: Path, start: Path | None, *changes: str, model=MODEL) -> PretrainStage:
    base = pretrain_stage(workspace)
    config = load_settings(PretrainConfig, "pretrain", "first", ("train.batch=4", "clips.buckets=1", *changes))
    return PretrainStage(model, config, base.latents.latents, workspace / "tokenizer.json", base.same, start)


def test_all_weights_of_a_checkpoint_can_be_taken(workspace: Path) -> None:
    stage = started(workspace, workspace / "random")
    theirs = load_model(workspace / "random", torch.device("cpu")).state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in stage.model.state_dict().items())


def test_starts_that_do_not_fit_are_refused(workspace: Path) -> None:
    with pytest.raises(ValueError, match="give the checkpoint with the text encoder by --start"):
        started(workspace, None, "train_text=false")
    assert MODEL.diffusion is not None
    deeper = dataclasses.replace(MODEL.diffusion.dit, depth=2)
    text = dataclasses.replace(MODEL.diffusion.text_encoder, width=64)
    for changes, start, message in (
        ({"dit": deeper}, "all", "other sizes than test"),
        ({"text_encoder": text}, "text", "is not that of test"),
    ):
        model = dataclasses.replace(MODEL, diffusion=dataclasses.replace(MODEL.diffusion, **changes))
        with pytest.raises(ValueError, match=message):
            started(workspace, workspace / "random", f"start={start}", model=model)


def test_parts_of_captions_are_shuffled_and_dropped_never_all() -> None:
    parts = ["calm", "piano", "90 BPM", "A minor"]
    drawn = [draw_parts(parts, np.random.default_rng(seed)).split(", ") for seed in range(2000)]
    assert all(0 < len(found) == len(set(found)) and set(found) <= set(parts) for found in drawn)
    for part in parts:
        assert np.mean([part in found for found in drawn]) == pytest.approx((0.5 + 1 / 64), abs=0.04)
    both = [found.index("calm") < found.index("piano") for found in drawn if {"calm", "piano"} <= set(found)]
    assert np.mean(both) == pytest.approx(0.5, abs=0.07)


def test_captions_made_of_fields_are_made_anew(workspace: Path) -> None:
    batches = pretrain_stage(workspace).latents.train
    item = batches.batch(0).items[0]
    fields = {"title": "piano", "instrument": "note", "key": "A3"}

    def texts(made: LatentItem) -> set[str]:
        rng = np.random.default_rng(0)
        return {batches._draw_text(made, rng) for _ in range(60)}

    assert len(texts(dataclasses.replace(item, captions=("piano, note, A3",), fields=fields))) > 6
    assert len(texts(dataclasses.replace(item, fields=fields))) == 1  # a prompt of its own


def test_one_batch_is_learnt_by_heart(workspace: Path) -> None:
    """To a tenth of the error of zeros within 200 steps. Measured: after 31."""
    stage = pretrain_stage(workspace, "clips.silence_seconds=0.0")
    optimizer = torch.optim.AdamW(stage.model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    drawn, noise = stage.flow.draw(0, BatchSlice(), stage.device)
    target = (noise - drawn.batch.latents)[drawn.masks.generated]
    baseline = float(target.square().mean())
    for _ in range(200):
        loss = stage.losses(0)["flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.1 * baseline:
            return
    pytest.fail(f"{float(loss.detach())} of {baseline}")
