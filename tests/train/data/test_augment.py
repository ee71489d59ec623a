"""Augmentations: what each does, how often, and that they change no crop where they are switched off."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from sa3_mlx.common.schema import ConfigError
from sa3_torch.train.data.augment import (
    NO_AUGMENTATION,
    AugmentConfig,
    augment,
    chirp,
    draw_gain,
    is_silent,
    pan_mono,
    zero_tail,
)
from sa3_torch.train.data.clip_cache import ClipSet, Draft, write_clips
from sa3_torch.train.data.crops import AudioCrops, CropMix
from sa3_torch.train.data.drawing import draw_caption
from sa3_torch.train.run.random import generator

SAMPLES = 4096
ALL = AugmentConfig(chirps_per_16=2, silence=0.2, tail=0.5, tail_patches=4, pan=1.0)


@pytest.fixture
def clips(tmp_path: Path) -> ClipSet:
    """Six clips of a constant level that tells them apart; the last begins with silence."""
    drafts = []
    for i in range(6):
        audio = np.full(3000 * (i + 1), 0.1 * (i + 1), np.float32)
        if i == 5:
            audio[:9000] = 0
        drafts.append(
            Draft(
                id=f"clip {i}",
                captions=(f"sound {i}", f"noise {i}"),
                kind="user",
                label="user",
                instrument=None,
                midi=None,
                split="train",
                audio=audio,
            )
        )
    return write_clips(tmp_path, drafts, channels=1, about={})


def _crops(clips: ClipSet, config: AugmentConfig, batch: int = 16) -> AudioCrops:
    return AudioCrops(
        clips, split="train", samples=SAMPLES, batch=batch, seed=3, quietest_db=-12.0, shares=None, augment=config
    )


def test_without_augmentations_crops_follow_from_their_draws(clips: ClipSet) -> None:
    """The draws written out: clip, place with repeats, level, polarity, in this order from the generator of an item."""
    crops = _crops(clips, NO_AUGMENTATION, batch=8)
    for step in range(4):
        for number, row in enumerate(crops.batch(step).audio.numpy()):
            rng = generator(3, 101, step, number)
            clip = clips.clips[int(np.searchsorted(np.arange(1, 7) / 6, rng.random()))]
            for attempt in range(9):
                start = int(rng.integers(-SAMPLES // 4, max(clip.samples - SAMPLES, 0) + SAMPLES // 4 + 1))
                if attempt == 8 or rng.random() < 1 / 3:
                    start = 0
                audio = clips.read(clip, max(start, 0), max(start + SAMPLES, 0))
                lead = min(max(-start, 0), SAMPLES)
                crop = np.pad(audio, ((lead, SAMPLES - lead - len(audio)), (0, 0)))
                if np.abs(crop).max() >= 1e-3:
                    break
            gain = 10 ** (-12.0 * rng.random() ** 2 / 20) * (1.0 if rng.random() < 0.5 else -1.0)
            assert np.array_equal(row, np.repeat(crop * np.float32(gain), 2, axis=1))


def test_a_batch_has_captions_ids_and_chirps(clips: ClipSet) -> None:
    crops = _crops(clips, ALL)
    assert crops.items == 18
    batch = crops.batch(0)
    assert batch.audio.shape == (18, SAMPLES, 2) and len(batch.captions) == len(batch.ids) == 18
    assert [item for item in range(18) if batch.ids[item] == f"chirp 0 {item}" and not batch.captions[item]] == [8, 17]
    for caption, name in zip(batch.captions, batch.ids, strict=True):
        assert not caption or caption.split()[1] == name.split()[1]


def test_processes_read_slices_of_one_batch(clips: ClipSet) -> None:
    crops = _crops(clips, ALL, batch=32)
    whole = crops.batch(5)
    for rows in (slice(0, 18), slice(18, 36), slice(10, 20)):
        part = crops.batch(5, rows)
        assert np.array_equal(part.audio, whole.audio[rows])
        assert part.captions == whole.captions[rows] and part.ids == whole.ids[rows]


def test_chirps_are_spread_evenly_over_processes() -> None:
    """As with same-l on 8 GPUs: one each, and crops of one of 8 streams. There were 0, 2, 0, 2 ... and 12 streams."""
    mix = CropMix(64, 2)
    crops = [[mix.crop(item) for item in range(9 * rank, 9 * rank + 9)] for rank in range(8)]
    assert mix.items == 72 and all(part.count(None) == 1 for part in crops)
    assert [{number // 8 for number in part if number is not None} for part in crops] == [{rank} for rank in range(8)]
    assert sorted(number for part in crops for number in part if number is not None) == list(range(64))


def test_augmentations_leave_the_choice_of_crops_alone(clips: ClipSet) -> None:
    plain, changed = _crops(clips, NO_AUGMENTATION).batch(2), _crops(clips, ALL).batch(2)
    assert plain.ids == tuple(name for name in changed.ids if not name.startswith("chirp"))


def test_crops_are_not_silent(clips: ClipSet) -> None:
    crops = _crops(clips, NO_AUGMENTATION)
    assert not any(is_silent(crop) for step in range(10) for crop in crops.batch(step).audio.numpy())


def test_shares_of_silence_and_tails() -> None:
    noise = np.random.default_rng(0).uniform(0.1, 0.5, (SAMPLES, 2)).astype(np.float32)
    results = [augment(noise, ALL, generator(0, 1, i)) for i in range(400)]
    silent = sum(not result.any() for result in results)
    tails = [int(np.argmax(result[::-1, 0] != 0)) for result in results if result.any()]
    assert 50 < silent < 110  # 80 expected
    assert set(tails) == {0, 256, 512, 768, 1024} and 0.4 < np.mean(np.array(tails) > 0) < 0.6
    assert np.array_equal(augment(noise, NO_AUGMENTATION, generator(0, 1, 0)), noise)


def test_true_stereo_is_kept_and_mono_is_panned() -> None:
    mono = np.full((8, 2), 0.5, np.float32)
    stereo = mono * np.array([1, 0.5], np.float32)
    assert np.array_equal(pan_mono(stereo, 0.7), stereo) and np.array_equal(pan_mono(mono, 0.0), mono)
    assert np.allclose(pan_mono(mono, 1.0), [0, 0.5]) and np.allclose(pan_mono(mono, -0.5), [0.5, 0.25])
    panned = augment(mono, replace(NO_AUGMENTATION, pan=0.3), generator(4))
    assert np.abs(panned).max() <= 0.5 and panned.min() >= 0.5 * 0.7 - 1e-6


def test_a_tail_longer_than_the_crop_is_silence() -> None:
    assert not zero_tail(np.ones((300, 2), np.float32), 2).any()


def test_chirps_stay_in_their_band_and_level() -> None:
    for i in range(20):
        audio = chirp(generator(7, i), 16_384)
        assert audio.shape == (16_384, 2) and audio.dtype == np.float32 and np.array_equal(audio[:, 0], audio[:, 1])
        assert 10 ** (-24 / 20) - 1e-3 < np.abs(audio).max() < 10 ** (-6 / 20) + 1e-3
        power = np.abs(np.fft.rfft(audio[:, 0])) ** 2
        low = np.fft.rfftfreq(16_384, 1 / 44_100) < 60
        assert power[low].sum() < 0.05 * power.sum()
    assert np.array_equal(chirp(generator(1), 100), chirp(generator(1), 100))


def test_gain_falls_to_its_quietest_with_both_polarities() -> None:
    rng = generator(5)
    gains = np.array([draw_gain(rng, -12.0) for _ in range(400)])
    assert np.abs(gains).max() <= 1 and np.abs(gains).min() >= 10 ** (-12 / 20)
    assert 0.4 < (gains > 0).mean() < 0.6


def test_captions_are_canonical_or_alternatives() -> None:
    rng = generator(6)
    drawn = [draw_caption(("a", "b", "c"), rng) for _ in range(300)]
    assert 0.5 < drawn.count("a") / 300 < 0.7 and {"b", "c"} < set(drawn)
    assert draw_caption((), rng) == "" and draw_caption(("only",), rng) == "only"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"silence": 1.5}, "silence is 1.5"), ({"tail_patches": 0}, "tail_patches 0"), ({"pan": -0.1}, "pan is -0.1")],
)
def test_impossible_settings_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AugmentConfig.from_dict({**ALL.to_dict(), **change})


def test_chirps_need_whole_groups_of_sixteen(clips: ClipSet) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        _crops(clips, ALL, batch=8)
