"""Measure what the CPUs do for a step of training at full scale: reading, cropping, masks, texts, without any network.

The data are made: long latents of noise that 20,000 items with captions of their own share, or clips of noise. They lie
in memory after the first steps, so that disks are left out. What a GPU draws for itself, the noise, is counted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch

from benchmarks.options import show
from sa3_mlx.assets import DEMO
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.audio import write_audio
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_torch.train.autoencoder.stage import AutoencoderConfig
from sa3_torch.train.clap.stage import ClapConfig, ClapData
from sa3_torch.train.data.batches import LatentBatches
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, ClipSet, Draft, write_clips
from sa3_torch.train.data.crops import AudioCrops, Crops, ShardCrops
from sa3_torch.train.data.latents import LatentItem, LatentSet, shard_path, write_latents
from sa3_torch.train.data.packing import Cut, write_shards
from sa3_torch.train.few_steps.ode_warmup import OdeWarmupConfig, TeacherData
from sa3_torch.train.few_steps.posttrain import PosttrainConfig
from sa3_torch.train.few_steps.scenes import SceneData
from sa3_torch.train.flow.latent_data import ClipsConfig, LatentData
from sa3_torch.train.flow.matching import FlowMatching
from sa3_torch.train.flow.pretrain import PretrainConfig
from sa3_torch.train.run.parallel import BatchSlice
from sa3_torch.train.run.random import Purpose, item_noise
from sa3_torch.train.run.settings import load_settings
from sa3_torch.train.run.stage import TrainConfig

CHANNELS, FRAMES, LONG, ITEMS = 256, 4096, 32, 20_000  # of the latents; LONG of them are stored
CLIPS, CLIP_SECONDS = 16, 60
TRACKS, TRACK_SECONDS = 8, 240
WORDS = ("piano", "guitar", "kick", "snare", "rain", "bell", "calm", "fast", "minor", "major", "low", "high")
AUTOENCODER = "sha256:made"


@dataclass(frozen=True, kw_only=True)
class DataPath:
    """Say how a preset reads a slice of a step, and how many normal numbers its step draws on the device."""

    train: TrainConfig
    items: int  # of a batch
    read: Callable[[int, BatchSlice], object]
    noise: Callable[[int], int]  # for so many items
    every: int = 1  # steps for which one reading serves
    stored: int = 0  # bytes of a shard that are read for a crop


def make_latents(folder: Path) -> LatentSet:
    """Write latents of noise, then an index in which many items share them."""
    random = torch.Generator().manual_seed(0)

    def item(number: int, split: str) -> LatentItem:
        words = ", ".join(np.random.default_rng(number).choice(WORDS, 8))
        place = {"shard": 0, "offset": number % LONG * FRAMES, "frames": FRAMES}
        about = {"kind": "user", "label": "user", "midi": None, "split": split, "source": ""}
        return LatentItem(id=f"{number}", captions=(f"{words}, take {number}",), seconds=380.0, **place, **about)  # type: ignore[arg-type]

    stored = ((item(k, "train"), torch.randn(FRAMES, CHANNELS, generator=random)) for k in range(LONG))
    write_latents(folder, stored, silence=torch.zeros(CHANNELS), autoencoder=AUTOENCODER)
    described = shard_path(folder, 0).with_suffix(".json")
    items = [item(k, "validation" if k % 100 == 0 else "train") for k in range(ITEMS)]
    write_json(described, {**read_object(described), "items": [vars(each) for each in items]})
    return LatentSet(folder, autoencoder=AUTOENCODER)


def make_clips(folder: Path) -> ClipSet:
    """Write stereo clips of noise."""
    random = np.random.default_rng(0)

    def draft(number: int) -> Draft:
        audio = (0.1 * random.standard_normal((CLIP_SECONDS * SAMPLE_RATE, 2))).astype(np.float32)
        about = {"kind": "user", "label": "user", "instrument": None, "midi": None, "split": "train"}
        return Draft(id=f"{number}", captions=(f"take {number}",), audio=audio, **about)  # type: ignore[arg-type]

    return write_clips(folder, map(draft, range(CLIPS)), channels=2, about={})


def _latent_data(folder: Path, clips: ClipsConfig, train: TrainConfig) -> LatentData:
    model = PRESETS["medium-base"]
    return LatentData(make_latents(folder), _tokenizer(), model, clips, train)


def _tokenizer() -> Tokenizer:
    """Return that of the demo model: the weights of no other are at hand everywhere."""
    return Tokenizer(DEMO / TOKENIZER_FILE, 256)


def _clip_noise(items: int) -> int:
    return items * FRAMES * CHANNELS


def pretrain_medium(folder: Path) -> DataPath:
    config = load_settings(PretrainConfig, "pretrain", "medium", ())
    flow = FlowMatching(config, PRESETS["medium-base"], _latent_data(folder, config.clips, config.train))
    return DataPath(train=config.train, items=config.train.batch, read=flow.read, noise=_clip_noise)


def warmup(folder: Path) -> DataPath:
    config = load_settings(OdeWarmupConfig, "ode-warmup", "medium", ())
    every, data = config.teacher.refresh_rate, TeacherData(config, _latent_data(folder, config.clips, config.train))
    return DataPath(
        train=config.train,
        items=config.train.batch,
        read=data.read,
        noise=lambda items: _clip_noise(items) // every,
        every=every,
    )


def posttrain(folder: Path) -> DataPath:
    config = load_settings(PosttrainConfig, "posttrain", "medium", ())
    data = SceneData(config, _latent_data(folder, config.clips, config.train))
    return DataPath(
        train=config.train, items=config.train.batch, read=data.read, noise=lambda items: _clip_noise(items) * 7 // 2
    )


def clap(folder: Path) -> DataPath:
    config, latents = load_settings(ClapConfig, "clap", "full", ()), make_latents(folder)
    batches = LatentBatches(
        latents,
        _tokenizer(),
        split="train",
        batch=config.train.batch,
        seed=config.train.seed,
        max_frames=config.max_frames,
        head_room_frames=0,
        buckets=config.buckets,
        multiple=config.tower.frames_per_token,
        shares=config.shares.to_dict(),
    )
    return DataPath(
        train=config.train,
        items=config.train.batch,
        read=ClapData(config, batches).read,
        noise=lambda items: items * config.max_frames * CHANNELS,
    )


def autoencoder_same_l(folder: Path) -> DataPath:
    config = load_settings(AutoencoderConfig, "autoencoder", "same-l", ())
    crops = AudioCrops(
        make_clips(folder),
        split="train",
        samples=config.crop_samples,
        batch=config.train.batch,
        seed=config.train.seed,
        quietest_db=config.quietest_db,
        shares=config.shares.to_dict(),
        augment=config.augment,
    )
    return _stage_0(config, crops)


def _stage_0(config: AutoencoderConfig, crops: Crops, stored: int = 0) -> DataPath:
    frames = math.ceil(config.crop_samples / PRESETS["same-l"].same.samples_per_latent)
    return DataPath(
        train=config.train,
        items=crops.items,
        read=lambda step, part: crops.batch(step, part.rows(crops.items)),
        noise=lambda items: 2 * items * frames * CHANNELS,  # of the decoder and of the alignment network
        stored=stored,
    )


def make_tracks(folder: Path) -> Path:
    """Write FLAC files of four minutes: two partials a channel in noise that falls with frequency."""
    folder.mkdir(parents=True)
    time_axis = np.arange(TRACK_SECONDS * SAMPLE_RATE)[:, None] / SAMPLE_RATE
    for number in range(TRACKS):
        random = np.random.default_rng(number)
        noise = np.cumsum(random.standard_normal((len(time_axis), 2)), axis=0)
        noise -= np.concatenate([np.zeros((200, 2)), noise[:-200]])  # no drift
        tones = np.sin(2 * np.pi * random.uniform(80, 2000, 2) * time_axis)
        audio = (0.2 * tones + 0.015 * noise).astype(np.float32)
        write_audio(folder / f"{number}.flac", audio, SAMPLE_RATE)
    return folder


def _of_shards(folder: Path, cut: Cut | None) -> DataPath:
    """Read crops of shards, a stream for each of eight processes; a window is what a step takes of a stream."""
    config = load_settings(AutoencoderConfig, "autoencoder", "same-l", ())
    assert config.shards is not None
    tracks, streams = make_tracks(folder / "tracks"), config.shards.streams
    packed = write_shards(tracks, folder / "shards", shard_bytes=1 << 40, captions_required=False, cut=cut)
    crops = ShardCrops(
        replace(packed, shards=packed.shards * streams),  # the same one for every stream
        samples=config.crop_samples,
        batch=config.train.batch,
        streams=streams,
        window=config.train.batch // streams,
        seed=config.train.seed,
        quietest_db=config.quietest_db,
        augment=config.augment,
    )
    return _stage_0(config, crops, packed.shards[0].bytes // packed.samples)


def same_l_tracks(folder: Path) -> DataPath:
    return _of_shards(folder, None)


def same_l_pieces(folder: Path) -> DataPath:
    return _of_shards(folder, Cut(seconds=20.0))


MADE: dict[str, Callable[[Path], DataPath]] = {
    "pretrain-medium": pretrain_medium,
    "warmup": warmup,
    "posttrain": posttrain,
    "clap": clap,
    "autoencoder-same-l": autoencoder_same_l,
    "same-l-tracks": same_l_tracks,
    "same-l-pieces": same_l_pieces,
}


@click.command()
@click.option("--preset", type=click.Choice(list(MADE)), required=True, help="A stage at full scale.")
@click.option("--processes", type=click.IntRange(1), default=8, show_default=True, help="One for each GPU.")
@click.option("--steps", type=click.IntRange(1), default=4, show_default=True)
def data_path(preset: str, processes: int, steps: int) -> None:
    """Measure CPU-seconds of the data path per step and process. The last line is JSON."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        path = MADE[preset](Path(folder) / "data")
        slices = BatchSlice(world=processes).micro_batches(path.train.accumulate)
        read_step(path, 0, slices)  # files come to memory
        taken = [read_step(path, step * path.every, slices) for step in range(1, steps + 1)]
    items = path.items // processes
    begun = time.process_time()
    item_noise(slice(0, 1), (FRAMES, CHANNELS), 0, Purpose.TRAINING_NOISE, 0)
    each = (time.process_time() - begun) / (FRAMES * CHANNELS)
    result: dict[str, object] = {
        "cpu_seconds": sum(taken) / len(taken) / path.every,
        "most_cpu_seconds": max(taken) / path.every,
        "bytes_a_crop": path.stored,
        "noise_values": path.noise(items),
        "noise_cpu_nanoseconds": 1e9 * each,  # where there is no GPU to draw it
    }
    show(result)
    click.echo(json.dumps({"preset": preset, "processes": processes, "items": items, "steps": steps, **result}))


def read_step(path: DataPath, step: int, slices: list[BatchSlice]) -> float:
    """Read a step of the first process; return the seconds of its CPUs."""
    begun = time.process_time()
    for part in slices:
        path.read(step, part)
    return time.process_time() - begun
