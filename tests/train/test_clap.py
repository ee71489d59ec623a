"""Test latent CLAP: its losses, its measures, what it does with padding and noise, its folder [T6]."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.files.safetensors import tensors_hash
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.clap import add_clap
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.quant.format import check_folder
from sa3_mlx.common.schema import ConfigError
from sa3_torch.clap.network import AudioTower
from sa3_torch.train.clap.contrastive import alignment, draw_times, equal_pairs, info_nce, retrieval, uniformity
from sa3_torch.train.clap.network import MAX_SCALE, LatentClap
from sa3_torch.train.clap.stage import ClapStage
from sa3_torch.train.flow.path import interpolate
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.weights import load_model, save_checkpoint
from tests.support.stages import MODEL, clap_stage, train
from tests.support.twins import Twin

C = MODEL.same.latent_channels


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(noise(*shape, seed=seed), dim=-1)


@pytest.fixture(scope="module")
def stage(workspace: Path) -> ClapStage:
    return clap_stage(workspace)


@pytest.fixture(scope="module")
def made(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that a short run exported."""
    out = tmp_path_factory.mktemp("clap")
    train(clap_stage(workspace, "train.steps=3", "train.validate_every=3"), out)
    return out / "model"


@pytest.fixture(scope="module")
def clap(made: Path) -> LatentClap:
    return LatentClap.load(made)


# losses


def test_info_nce_by_hand() -> None:
    """Take two pairs whose cosines are 1 and 0, scale ln 3: the right one has 3/4 of the softmax."""
    x = torch.eye(2)
    loss = info_nce(x, x, torch.tensor([math.log(3)]), torch.eye(2, dtype=torch.bool))
    assert float(loss) == pytest.approx(-math.log(0.75), abs=1e-6)


def test_texts_that_say_nothing_give_ln_b() -> None:
    """Give equal vectors of all sounds; and shuffled captions, where the best that a scale can do is to vanish."""
    b, distinct = 32, torch.eye(32, dtype=torch.bool)
    same = units(1, 8).expand(b, -1)
    assert float(info_nce(same, same, torch.tensor([14.0]), distinct)) == pytest.approx(math.log(b), abs=1e-5)
    audio = units(b, 64)
    shuffled = audio.roll(1, dims=0)
    losses = [float(info_nce(audio, shuffled, torch.tensor([scale]), distinct)) for scale in (0.0, 1.0, 5.0)]
    assert losses[0] == pytest.approx(math.log(b), abs=1e-5)
    assert losses == sorted(losses)


def test_duplicate_captions_do_not_increase_the_loss() -> None:
    """Put everything in twice: as equal captions it is the same loss, as false negatives ln 2 more."""
    audio, text, scale = units(6, 8), units(6, 8, seed=1), torch.tensor([10.0])
    once, twice = float(info_nce(audio, text, scale, torch.eye(6, dtype=torch.bool))), list(range(6)) * 2
    equal = torch.tensor([[a == b for b in twice] for a in twice])
    assert float(info_nce(audio[twice], text[twice], scale, equal)) == pytest.approx(once, abs=1e-5)
    distinct = torch.eye(12, dtype=torch.bool)
    assert float(info_nce(audio[twice], text[twice], scale, distinct)) == pytest.approx(once + math.log(2), abs=1e-5)
    every = torch.ones(6, 6, dtype=torch.bool)
    assert float(info_nce(audio, text, scale, every)) == pytest.approx(0.0, abs=1e-5)


def test_uniformity_and_alignment_by_hand() -> None:
    """Take opposite vectors, |x - y|^2 = 4; equal captions are no negatives, and a batch of them gives 0."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    apart = ~torch.eye(2, dtype=torch.bool)
    assert float(uniformity(x, x, apart)) == pytest.approx(-8.0)
    assert float(alignment(x, x)) == 0.0
    assert float(alignment(x, -x)) == 2.0
    x.requires_grad_(True)
    nothing = uniformity(x, x, torch.zeros(2, 2, dtype=torch.bool))
    nothing.backward()
    assert float(nothing.detach()) == 0.0 and not x.grad.any()


def test_retrieval_by_hand() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.3], [0.1, 0.2, 0.3]])
    relevant = torch.tensor([[True, False, False], [False, True, False], [True, True, False]])
    measures = retrieval(similarity, relevant)
    assert measures["r1"] == pytest.approx(1 / 3)
    assert measures["r5"] == measures["r10"] == 1.0
    assert measures["map10"] == pytest.approx((1 + 1 / 2 + (1 / 2 + 2 / 3) / 2) / 3)


# noise and captions


def test_half_of_the_items_are_clean_and_the_others_spread_evenly() -> None:
    t = draw_times(64, 0.5, torch.Generator().manual_seed(0))
    noisy = t[t > 0].sort().values
    assert len(noisy) == 32 and not torch.equal(t[:32] > 0, t[32:] == 0)
    assert torch.equal((noisy * 32).floor(), torch.arange(32.0))  # one in each of 32 equal intervals
    assert not torch.equal(t, draw_times(64, 0.5, torch.Generator().manual_seed(1)))
    assert not draw_times(4, 0.0, torch.Generator()).any()


def test_captions_are_equal_by_the_canonical_one(stage: ClapStage) -> None:
    drawn = stage.feed.get(0, BatchSlice())
    names = [item.captions[0] for item in drawn.batch.items]
    assert equal_pairs(drawn.names, drawn.texts).tolist() == [[a == b for b in names] for a in names]
    assert len(set(names)) == 2


def test_noise_and_times_of_a_part_are_those_of_the_whole(stage: ClapStage) -> None:
    with torch.no_grad():
        whole = stage._embed(stage.feed.get(3, BatchSlice()), 3, BatchSlice())
        parts = [stage._embed(stage.feed.get(3, part), 3, part) for part in BatchSlice().micro_batches(4)]
    for i in range(2):
        torch.testing.assert_close(torch.cat([part[i] for part in parts]), whole[i])


# the model


def test_longer_sounds_than_it_was_trained_on_are_seen_in_windows(clap: LatentClap) -> None:
    """The mean over the tokens of all windows; it used to be shown 4096 frames after a training on 1292."""
    size, lengths = clap.audio.frames_per_token, list[int]()
    tower = AudioTower(clap.config.tower, C, max_frames=4 * size)
    tower.load_state_dict(clap.audio.state_dict())
    tower.layers[0].register_forward_pre_hook(lambda _module, given: lengths.append(given[0].shape[1]))
    z, t = noise(2, 11 * size, C), torch.tensor([0.0, 0.5])
    valid = torch.arange(11 * size)[None] < size * torch.tensor([11, 3])[:, None]
    found = tower.pooled(z, valid, t)
    assert lengths == [4]
    windows = [slice(0, 4 * size), slice(4 * size, 8 * size), slice(8 * size, 11 * size)]
    parts = [clap.audio.pooled(z[:1, rows], valid[:1, rows], t[:1]) for rows in windows]
    torch.testing.assert_close(found[:1], (4 * parts[0] + 4 * parts[1] + 3 * parts[2]) / 11, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1:], clap.audio.pooled(z[1:], valid[1:], t[1:]), atol=1e-5, rtol=1e-5)


def test_padding_does_not_change_the_vectors(clap: LatentClap) -> None:
    """Add frames beyond the valid ones, a longer batch and padded text. Measured: 1e-7."""
    z, t = noise(3, 10, C), torch.tensor([0.0, 0.3, 0.9])
    valid = torch.arange(10)[None] < torch.tensor([10, 7, 1])[:, None]
    wanted = clap.embed_audio(z, valid, t)
    other = torch.where(valid[..., None], z, torch.nan)
    longer = torch.cat([other, torch.full((3, 9, C), 7.0)], dim=1)
    found = clap.embed_audio(longer, torch.nn.functional.pad(valid, (0, 9)), t)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    ids, mask = clap.encode(["piano note A3", "white noise"])
    cut = clap.embed_text(ids[1:, :2], mask[1:, :2])
    torch.testing.assert_close(clap.embed_text(ids.where(mask, 5), mask)[1:], cut, atol=1e-6, rtol=0)


def test_vectors_have_unit_length_and_a_gradient_into_the_latents(clap: LatentClap) -> None:
    z = noise(2, 9, C).requires_grad_(True)
    valid = torch.arange(9)[None] < torch.tensor([9, 5])[:, None]
    audio, text = clap.embed_audio(z, valid, torch.tensor([0.0, 0.5])), clap.embed_text(*clap.encode(["kick", ""]))
    for vectors in (audio, text):
        assert vectors.shape == (2, 16) and vectors.dtype == torch.float32
        torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    (audio * text).sum().backward()
    moved = z.grad.abs().sum(-1) > 0
    assert torch.equal(moved, valid)
    assert all(parameter.grad is None for parameter in clap.parameters())


def test_the_noise_level_is_a_condition(clap: LatentClap) -> None:
    z, valid = noise(1, 8, C), torch.ones(1, 8, dtype=torch.bool)
    a, b = (clap.embed_audio(z, valid, torch.tensor([t])) for t in (0.0, 0.5))
    assert float((a - b).abs().max()) > 1e-4


def test_an_item_without_a_frame_is_refused(clap: LatentClap) -> None:
    valid = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match=r"item\(s\) 1 have no valid frame"):
        clap.embed_audio(noise(2, 2, C), valid, torch.zeros(2))


def test_the_scale_is_limited(stage: ClapStage) -> None:
    assert float(stage.model.scale.detach()) == pytest.approx(1 / 0.07, rel=1e-5)
    kept = stage.model.log_scale.data.clone()
    stage.model.log_scale.data.fill_(9.0)
    assert float(stage.model.scale.detach()) == pytest.approx(MAX_SCALE, rel=1e-5)
    stage.model.log_scale.data.copy_(kept)


# the folder


def test_a_loaded_folder_is_what_was_trained(workspace: Path, made: Path, clap: LatentClap) -> None:
    assert clap.config.text_encoder == tensors_hash(workspace / "base" / "model.safetensors", "text_encoder.")
    log = [json.loads(line) for line in (made.parent / "log.jsonl").read_text().splitlines()]
    measures = next(row for row in log if "validation/scale" in row)
    assert measures["validation/scale"] == pytest.approx(float(clap.scale), rel=1e-6)
    kinds = [
        f"{query}_query_{name}_t{t:g}"
        for query in ("text", "audio")
        for name in ("r1", "r5", "r10", "map10")
        for t in (0, 0.25, 0.5)
    ]
    assert all(0 <= measures[f"validation/{kind}"] <= 1 for kind in kinds)
    model = load_model(workspace / "base", torch.device("cpu"))
    ids, mask = clap.encode(["white noise"])
    states = model.get_submodule("text_encoder")(ids, mask)
    torch.testing.assert_close(clap.embed_states(states, mask), clap.embed_text(ids, mask), atol=1e-6, rtol=0)
    assert list((made.parent / "demo").glob("*.png"))


@pytest.mark.parametrize("name", ["torch", "mlx"])
def test_a_model_ranks_by_the_one_that_was_trained_for_it(
    workspace: Path, made: Path, clap: LatentClap, tmp_path: Path, name: str
) -> None:
    """Put it into the model: both twins find the cosines that training measures. Measured: 1e-4, fp16 texts."""
    pytest.importorskip("mlx.core" if name == "mlx" else "torch")
    model = shutil.copytree(workspace / "base", tmp_path / "model")
    add_clap(model, made)
    pipeline = Twin(name).pipeline(model)  # type: ignore[arg-type]
    items = tuple(Item(prompt=prompt, seconds=0.5, seed=seed) for seed, prompt in enumerate(("piano note A3", "kick")))
    result = pipeline.generate(Request(items=items))
    frames = math.ceil(0.5 * MODEL.frames_per_second)
    z = torch.from_numpy(np.stack([latents[:frames] for latents in result.latents]))
    sound = clap.embed_audio(z, torch.ones(z.shape[:2], dtype=torch.bool), torch.zeros(2))
    wanted = (sound * clap.embed_text(*clap.encode([item.prompt for item in items]))).sum(1)
    np.testing.assert_allclose(pipeline.clap_cosines(result), wanted.numpy(), atol=5e-4)


def test_models_that_are_trained_from_one_that_has_it_have_none(workspace: Path, made: Path, tmp_path: Path) -> None:
    """It belongs to the weights that it was trained with; its section would name a file that is not there."""
    model = shutil.copytree(workspace / "base", tmp_path / "model")
    add_clap(model, made)
    loaded = load_model(model, torch.device("cpu"))
    assert loaded.config.clap is not None
    save_checkpoint(tmp_path / "later", loaded.config, loaded.state_dict(), "F16")
    check_folder(tmp_path / "later", ModelConfig.load(tmp_path / "later"))
    assert (tmp_path / "later" / "config.json").read_text() == (workspace / "base" / "config.json").read_text()


def test_another_autoencoder_is_refused(workspace: Path, made: Path, tmp_path: Path) -> None:
    """Recognise its own one in any model, whatever else is there and in whatever float type."""
    assert LatentClap.load(made, autoencoder=workspace / "base").config.latent_channels == C
    state = load_model(workspace / "base", torch.device("cpu")).state_dict()
    save_checkpoint(
        tmp_path / "later", MODEL, {k: v if k.startswith("same.") else v + 1 for k, v in state.items()}, "F32"
    )
    LatentClap.load(made, autoencoder=tmp_path / "later")
    with pytest.raises(ValueError, match="was trained on latents of autoencoder sha256"):
        LatentClap.load(made, autoencoder=workspace / "random")


def test_the_hash_of_a_part_does_not_depend_on_the_file(workspace: Path, tmp_path: Path) -> None:
    """Hash an autoencoder in single precision, and in half precision in a diffusion model; one weight moved
    is another."""
    paths = [workspace / name / "model.safetensors" for name in ("run/model", "base")]
    assert len({tensors_hash(path, "same.") for path in paths}) == 1
    state = load_model(workspace / "base", torch.device("cpu")).state_dict()
    state["same.decoder.new_token"][0] += 0.1
    save_checkpoint(tmp_path, MODEL, state, "F32")
    assert tensors_hash(tmp_path / "model.safetensors", "same.") != tensors_hash(paths[0], "same.")
    with pytest.raises(ValueError, match=r"has no tensors other\.\*"):
        tensors_hash(paths[0], "other.")


def test_bad_folders_are_refused(made: Path, workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder made by 'sa3 train clap'"):
        LatentClap.load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="format is 'sa3/1', expected 'sa3-clap/1'"):
        LatentClap.load(workspace / "base")
    shutil.copytree(made, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    config["tower"]["embedding"] = 8
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"wrong shape: audio\.projection\.fc2\.weight"):
        LatentClap.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("train.batch=1", "train.batch is 1: other clips of the batch are needed, at least 2"),
        ("tower.width=96", "tower.width is 96: expected a multiple of 64"),
        ("noisy_share=1.5", "noisy_share is 1.5: allowed is 0 to 1"),
        ("validation_captions=1", "validation_captions is 1: allowed is at least 2"),
    ],
)
def test_bad_settings_are_refused(change: str, message: str, workspace: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        clap_stage(workspace, change)


def test_clean_latents_do_not_change_and_noise_replaces_them() -> None:
    z, eps = noise(2, 3, 4), noise(2, 3, 4, seed=1)
    mixed = interpolate(z, eps, torch.tensor([0.0, 1.0]))
    assert torch.equal(mixed[0], z[0]) and torch.equal(mixed[1], eps[1])
