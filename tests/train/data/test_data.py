"""Crops, latent shards and user folders: deterministic by (seed, step), complete, and loud about what is wrong."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
import soundfile
import torch

from sa3_mlx.common.schema import ConfigError
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_torch.train.data import user_folder
from sa3_torch.train.data.augment import NO_AUGMENTATION
from sa3_torch.train.data.batches import LatentBatches
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, CachedClip, ClipSet, Draft, write_clips
from sa3_torch.train.data.crops import ONE_SHOT, AudioCrops, draw_crop
from sa3_torch.train.data.drawing import SharesConfig, draw_weights
from sa3_torch.train.data.latents import LatentItem, LatentSet, write_latents
from sa3_torch.train.demo_set.vocabulary import save_tokenizer

SHARES = {"note": 0.7, "drum": 0.3}


def _set(folder: Path, channels: int = 1) -> ClipSet:
    """Twelve clips of 1000 to 12000 samples; a ramp from 0.25 to 0.5, so that every position can be told."""
    drafts = []
    for i in range(12):
        ramp = np.linspace(0.25, 0.5, 1000 * (i + 1), dtype=np.float32)
        note = i % 3 > 0
        drafts.append(
            Draft(
                id=f"clip {i}",
                captions=("piano note a4", "piano a4") if note else ("kick",),
                kind="note" if note else "drum",
                label="note" if note else "kick",
                instrument=None,
                midi=69 if note else None,
                split="validation" if i == 11 else "train",
                audio=np.repeat(ramp[:, None], channels, axis=1),
            )
        )
    return write_clips(folder, drafts, channels=channels, about={})


@pytest.fixture
def clips(tmp_path) -> ClipSet:
    return _set(tmp_path / "clips")


@pytest.mark.parametrize(
    ("length", "least", "most"),
    [(SAMPLE_RATE, 0.25, 0.45), (ONE_SHOT, 0.25, 0.45), (ONE_SHOT + 1, 0, 0.02), (300 * SAMPLE_RATE, 0, 0.02)],
)
def test_only_crops_of_one_shots_favour_the_onset(length: int, least: float, most: float) -> None:
    starts: list[int] = []

    def read(start: int, stop: int) -> np.ndarray:
        starts.append(start)
        return np.ones((max(0, min(stop, length) - start), 1), np.float32)

    rng = np.random.default_rng(0)
    for _ in range(300):
        draw_crop(rng, length, 4096, read)
    assert least <= sum(start == 0 for start in starts) / len(starts) <= most
    assert max(starts) > 0.9 * (length - 4096)


def _crops(clips: ClipSet, samples: int = 4096, quietest_db: float = -24.0) -> AudioCrops:
    return AudioCrops(
        clips,
        split="train",
        samples=samples,
        batch=6,
        seed=5,
        quietest_db=quietest_db,
        shares=SHARES,
        augment=NO_AUGMENTATION,
    )


def test_crops_are_a_function_of_seed_and_step(clips):
    crops = _crops(clips)
    run = [crops.batch(step).audio for step in range(4)]
    resumed = _crops(clips)
    assert run[0].shape == (6, 4096, 2) and run[0].dtype == torch.float32
    assert torch.equal(resumed.batch(3).audio, run[3]) and torch.equal(resumed.batch(0).audio, run[0])
    assert not torch.equal(run[0], run[1])
    other = AudioCrops(
        clips, split="train", samples=4096, batch=6, seed=6, quietest_db=-24.0, shares=SHARES, augment=NO_AUGMENTATION
    )
    assert not torch.equal(other.batch(0).audio, run[0])


@pytest.mark.parametrize("samples", [256, 4096, 30_000])
def test_crops_are_pieces_of_clips_between_silence(clips, samples):
    crops = _crops(clips, samples=samples, quietest_db=0.0)
    for step in range(5):
        for crop in crops.batch(step).audio.numpy():
            assert np.array_equal(crop[:, 0], crop[:, 1])  # mono becomes two equal channels
            sounding = np.flatnonzero(crop[:, 0])
            assert len(sounding) > 0  # never silent
            piece = np.abs(crop[sounding[0] : sounding[-1] + 1, 0])
            assert (piece > 0.24).all() and (np.diff(piece) >= -1e-3).all()  # one unbroken piece of a ramp


def test_stereo_stays_stereo(tmp_path):
    clips = _set(tmp_path, channels=2)
    assert _crops(clips).batch(0).audio.shape == (6, 4096, 2)


def test_gain_stays_in_its_range(clips):
    peaks = torch.cat([_crops(clips).batch(step).audio.abs().amax((1, 2)) for step in range(20)])
    assert peaks.max() <= 0.51 and peaks.min() >= 0.24 * 10 ** (-24 / 20)
    signs = torch.cat([_crops(clips).batch(step).audio.sum((1, 2)).sign() for step in range(20)])
    assert 0.3 < (signs > 0).float().mean() < 0.7


def test_shares_decide_how_often_a_kind_is_drawn():
    kinds = ["note"] * 90 + ["drum"] * 10
    weights = draw_weights(kinds, {"note": 0.5, "drum": 0.5, "noise": 1.0})
    assert weights[:90].sum() == pytest.approx(0.5) and weights.sum() == pytest.approx(1)
    assert draw_weights(kinds, None) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="drum"):
        draw_weights(kinds, {"note": 1.0})
    with pytest.raises(ValueError, match="no items"):
        draw_weights([], None)


def test_weights_of_many_items_are_counted_in_one_pass():
    class Kinds(list):
        def count(self, kind):
            raise AssertionError(f"counts {kind} again for an item")

    assert draw_weights(Kinds(["note", "drum", "note"]), {"note": 1.0, "drum": 3.0}).tolist() == [0.125, 0.75, 0.125]


def test_impossible_shares_are_refused():
    with pytest.raises(ValueError, match="the shares of drum, note are all 0; raise one"):
        draw_weights(["note", "drum"], {"note": 0.0, "drum": 0.0, "user": 1.0})
    kinds = dict.fromkeys(("note", "chord", "drum", "noise", "sample", "user"), 1.0)
    for value in (-1.0, math.nan):
        with pytest.raises(ConfigError, match="drum"):
            SharesConfig.from_dict({**kinds, "drum": value})


def test_impossible_crops_are_refused(clips):
    with pytest.raises(ValueError, match="must be positive"):
        AudioCrops(
            clips, split="train", samples=0, batch=6, seed=5, quietest_db=0.0, shares=None, augment=NO_AUGMENTATION
        )


def _item(clip: CachedClip) -> LatentItem:
    return LatentItem(
        id=clip.id,
        captions=clip.captions,
        seconds=clip.seconds,
        shard=0,
        offset=0,
        frames=0,
        kind=clip.kind,
        label=clip.label,
        midi=clip.midi,
        split=clip.split,
        source=f"sha256:{clip.id}",
    )


@pytest.fixture
def shard(clips, tmp_path) -> LatentSet:
    encoded = (
        (_item(clip), torch.full((-(-clip.samples // 256), 3), float(i + 1))) for i, clip in enumerate(clips.clips)
    )
    return write_latents(
        tmp_path / "latents", encoded, silence=torch.tensor([-1.0, -2.0, -3.0]), autoencoder="sha256:a"
    )


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    save_tokenizer(tmp_path / "tokenizer.json")
    return Tokenizer(tmp_path / "tokenizer.json", 5)


def _batches(shard: LatentSet, tokenizer: Tokenizer, max_frames: int = 100) -> LatentBatches:
    return LatentBatches(
        shard,
        tokenizer,
        split="train",
        batch=7,
        seed=2,
        max_frames=max_frames,
        head_room_frames=2,
        buckets=3,
        multiple=4,
        shares=SHARES,
    )


def test_latent_batches_hold_the_encoded_clips(shard, tokenizer):
    batches = _batches(shard, tokenizer)
    drawn: Counter[str] = Counter()
    for step in range(30):
        batch = batches.batch(step)
        frames = batch.latents.shape[1]
        assert batch.latents.shape == (7, frames, 3) and batch.ids.shape == batch.mask.shape == (7, 5)
        assert frames % 4 == 0 and frames >= max(item.frames for item in batch.items) + 2
        for row, item in enumerate(batch.items):
            number = int(item.id.split()[1])
            assert item.split == "train" and batch.seconds[row] == pytest.approx(
                1000 * (number + 1) / SAMPLE_RATE, 1e-4
            )
            assert batch.valid[row].sum() == item.frames and batch.valid[row, : item.frames].all()
            assert (batch.latents[row, : item.frames] == number + 1).all()
            assert torch.equal(batch.latents[row, -1], shard.silence)
            drawn[item.kind] += 1
            assert int(batch.mask[row].sum()) in ((2, 3) if item.kind == "note" else (1,))
    assert 0.5 < drawn["note"] / drawn.total() < 0.9
    again = _batches(shard, tokenizer).batch(29)
    assert torch.equal(again.latents, batch.latents) and torch.equal(again.ids, batch.ids)


def test_of_long_items_a_part_inside_them_is_taken(shard, tokenizer):
    batches = _batches(shard, tokenizer, max_frames=20)  # the longest clip has 43 frames
    assert batches.skipped == 0
    for step in range(20):
        batch = batches.batch(step)
        assert batch.latents.shape[1] <= 20
        for row, item in enumerate(batch.items):
            assert batch.valid[row].sum() == min(item.frames, 20)  # never starts in the padding
            assert (batch.latents[row][batch.valid[row]] == int(item.id.split()[1]) + 1).all()
            assert batch.seconds[row] == pytest.approx(item.seconds)  # the full duration


def test_statistics_cover_one_split(shard):
    mean, deviation = shard.statistics("validation")
    assert torch.equal(mean, torch.full((3,), 12.0)) and torch.equal(deviation, torch.zeros(3))


def test_latents_of_another_autoencoder_are_refused(shard, tmp_path):
    assert len(LatentSet(tmp_path / "latents", autoencoder="sha256:a").items) == len(shard.items) == 12
    with pytest.raises(ValueError, match="encode it again"):
        LatentSet(tmp_path / "latents", autoencoder="sha256:b")
    with pytest.raises(FileNotFoundError, match="not a complete sa3-latents/2 cache"):
        LatentSet(tmp_path, autoencoder="sha256:a")


def test_folders_are_read_as_one_set(shard, tmp_path):
    one = LatentItem(**{**vars(shard.items[0]), "id": "new", "kind": "user", "split": "train"})
    other = write_latents(
        tmp_path / "more", [(one, torch.full((5, 3), 99.0))], silence=shard.silence, autoencoder="sha256:a"
    )
    both = LatentSet(*shard.folders, *other.folders, autoencoder="sha256:a")
    assert [item.id for item in both.items] == [*(item.id for item in shard.items), "new"]
    assert all(torch.equal(both.read(a), shard.read(b)) for a, b in zip(both.items, shard.items, strict=False))
    assert torch.equal(both.read(both.items[-1]), torch.full((5, 3), 99.0))
    assert str(both) == f"{tmp_path / 'latents'}, {tmp_path / 'more'}"
    wrong = write_latents(tmp_path / "b", [(one, torch.zeros(5, 3))], silence=shard.silence, autoencoder="sha256:b")
    with pytest.raises(ValueError, match="b was encoded by autoencoder sha256:b"):
        LatentSet(*shard.folders, *wrong.folders, autoencoder="sha256:a")


def test_bad_latents_are_refused(clips, tmp_path):
    first = clips.clips[0]
    for latents, message in ((torch.zeros(4, 2), "must be"), (torch.full((4, 3), float("nan")), "not finite")):
        with pytest.raises(ValueError, match=message):
            write_latents(tmp_path / "bad", [(_item(first), latents)], silence=torch.zeros(3), autoencoder="a")
    assert not (tmp_path / "bad" / "index.json").exists()


def _recordings(folder: Path, count: int) -> Path:
    """Short stereo files in two formats, the first at 22050 Hz, all with captions."""
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("sub" if i % 2 else ".") / f"clip{i}.{'flac' if i % 2 else 'wav'}"
        soundfile.write(path, rng.uniform(-0.5, 0.5, (2205, 2)), 22_050 if i == 0 else SAMPLE_RATE)
        path.with_suffix(".txt").write_text("a recording\nthe same recording\n")
    return folder


def test_a_user_folder_becomes_a_cache(tmp_path):
    source = _recordings(tmp_path / "in", 6)
    soundfile.write(source / "silent.wav", np.zeros(1000), SAMPLE_RATE)
    (source / "sub" / "copy.flac").write_bytes((source / "sub" / "clip1.flac").read_bytes())
    (source / "clip2.txt").unlink()
    clips, report = user_folder.import_folder(source, tmp_path / "out", captions_required=False)
    assert clips.channels == 2 and len(clips.clips) == report.imported == 6 and report.files == 8
    assert (
        report.silent == ["silent.wav"]
        and report.duplicates == ["sub/copy.flac"]
        and report.without_caption == ["clip2.wav"]
    )
    resampled = next(clip for clip in clips.clips if clip.id == "clip0.wav")
    assert resampled.samples == 4410 and resampled.captions == ("a recording", "the same recording")
    assert "clip2.wav" in str(report) and "6 of 8 files imported" in str(report)


def test_one_unreadable_file_in_two_hundred_is_skipped_and_named(tmp_path):
    source = _recordings(tmp_path / "in", 200)
    (source / "clip4.wav").write_bytes(b"this is no audio")
    _, report = user_folder.import_folder(source, tmp_path / "out", captions_required=True)
    assert report.imported == 199 and len(report.unreadable) == 1 and report.unreadable[0].startswith("clip4.wav: ")


def test_too_many_bad_files_stop_with_the_list(tmp_path):
    source = _recordings(tmp_path / "in", 4)
    (source / "clip2.wav").write_bytes(b"this is no audio")
    with pytest.raises(ValueError, match=r"1 of 4 files are unreadable.*clip2\.wav"):
        user_folder.import_folder(source, tmp_path / "out", captions_required=False)
    (source / "clip2.wav").unlink()
    (source / "sub" / "clip1.txt").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 files are without a caption.*clip1\.flac"):
        user_folder.import_folder(source, tmp_path / "out", captions_required=True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="no audio files"):
        user_folder.import_folder(tmp_path / "out", tmp_path / "out2", captions_required=True)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        user_folder.import_folder(tmp_path / "none", tmp_path / "out2", captions_required=True)
