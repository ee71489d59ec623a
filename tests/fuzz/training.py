"""Readers of what training reads: caches, latents, shards, sidecars, settings, checkpoints of runs."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from sa3_mlx.common.files.audio import write_audio
from sa3_torch.evaluate.stored import open_latents, split_latents
from sa3_torch.train.autoencoder.stage import AutoencoderConfig
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.data.encode.public_latents import export_public, import_public
from sa3_torch.train.data.encode.sources import open_source, whole
from sa3_torch.train.data.latents import LatentItem, LatentSet, write_latents
from sa3_torch.train.data.packing import write_shards
from sa3_torch.train.data.recordings import find_audio, inspect, read_sidecar
from sa3_torch.train.data.shards import index_shards, open_index, read_shard
from sa3_torch.train.flow.pretrain import PretrainConfig
from sa3_torch.train.lora.stage import LoraConfig
from sa3_torch.train.run.checkpoints import Checkpoints, RunProgress
from sa3_torch.train.run.settings import PRESETS, keep_settings, load_settings
from tests.support.command import tone
from tests.support.stages import write_tiny_clips

from .target import Given, Target

_DATA = "sa3_torch/train/data"
_RUN = "sa3_torch/train/run"
_HASH = "sha256:" + "0" * 64
_KINDS = {"autoencoder": AutoencoderConfig, "pretrain": PretrainConfig, "lora": LoraConfig}


def _latents(folder: Path) -> LatentSet:
    random = torch.Generator().manual_seed(0)

    def item(number: int) -> tuple[LatentItem, torch.Tensor]:
        latents = torch.randn(5 + number, 4, generator=random)
        about = LatentItem(
            id=f"{number}.wav",
            captions=("low kick", "kick"),
            seconds=1.5,
            shard=0,
            offset=0,
            frames=0,
            kind="user",
            label="user",
            midi=None if number else 60,
            split="train" if number else "validation",
            source=_HASH,
            licence="CC0",
            fields={"bpm": 90},
        )
        return about, latents

    return write_latents(folder, map(item, range(3)), silence=torch.zeros(4), autoencoder=_HASH)


def _latent_set(folder: Path) -> dict[str, str]:
    _latents(folder)
    return {
        "index.json": "json",
        "shard-00000.json": "json",
        "shard-00000.safetensors": "safetensors",
        "silence.safetensors": "safetensors",
    }


def _read_latent_set(given: Given) -> None:
    """As training and evaluation read them."""
    latents = LatentSet(given.folder, autoencoder=_HASH)
    for item in latents.items:
        assert isinstance(item.id, str) and item.seconds >= 0 and item.frames > 0
        assert all(isinstance(text, str) for text in item.captions)
        assert latents.read(item).shape == (item.frames, latents.channels)
    latents.statistics(None)
    split_latents(open_latents(given.folder), 8)


def _public(folder: Path) -> dict[str, str]:
    export_public(_latents(folder / "made"), folder / "public", 8000)
    shutil.rmtree(folder / "made")
    first = f"public/{0:010d}"
    return {f"{first}.json": "json", f"{first}.npy": "npy", "public/silence.npy": "npy"}


def _read_public(given: Given) -> None:
    try:
        latents = import_public(given.folder / "public", given.folder / "out", autoencoder=_HASH)
        LatentSet(given.folder / "out", autoencoder=_HASH)
        assert latents.items
    finally:
        shutil.rmtree(given.folder / "out", ignore_errors=True)


def _recordings(folder: Path) -> Path:
    folder.mkdir()
    for number, name in enumerate(("a", "b", "c")):
        write_audio(folder / f"{name}.wav", tone(0.1, rate=44_100, level=0.1 * (number + 1)), 44_100)
    about = {"prompt": ["low kick", "kick"], "seconds_start": 1, "seconds_total": 2.5, "bpm": 90, "key": "A minor"}
    (folder / "a.json").write_text(json.dumps({**about, "licence": "CC0", "tags": ["x", "y"]}))
    (folder / "b.txt").write_text("snare\nsnare drum\n")
    (folder / "c.json").write_text(json.dumps({"title": "Bell", "genre": "ambient", "mood": ["soft", "low"]}))
    return folder


def _sidecars(folder: Path) -> dict[str, str]:
    _recordings(folder / "sounds")
    return {"sounds/a.json": "json", "sounds/b.txt": "text", "sounds/c.json": "json", "sounds/a.wav": "bytes"}


def _read_sidecars(given: Given) -> None:
    """As import, lint and packing read a folder; they name the file themselves."""
    for path in find_audio(given.folder / "sounds"):
        try:
            sidecar, facts = read_sidecar(path), inspect(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        assert all(isinstance(text, str) and text for text in sidecar.captions) and facts.samples > 0
        json.dumps(sidecar.fields)
    source = open_source(given.folder / "sounds", 44_100, 2)
    for number in range(len(source.names)):
        whole(source.recording(number))


def _shards(folder: Path) -> dict[str, str]:
    write_shards(_recordings(folder / "sounds"), folder / "shards", shard_bytes=1 << 20, captions_required=True)
    shutil.rmtree(folder / "sounds")
    return {"shards/index.json": "json", "shards/audio-000000.tar": "bytes"}


def _read_shards(given: Given) -> None:
    index = open_index(str(given.folder / "shards"))
    for shard in index.shards:
        with closing(read_shard(shard.name)) as samples:  # type: ignore[type-var]
            for sample in samples:
                if not sample.problem:
                    list(sample.blocks(44_100, 2))
                    sample.read(0, sample.facts()[0])
    index_shards(str(given.folder / "shards" / "audio-000000.tar"), given.folder / "out.json")
    source = open_source(given.folder / "shards", 44_100, 2)
    for number in range(len(source.names)):
        whole(source.recording(number))


def _patterns(folder: Path) -> dict[str, str]:
    (folder / "input.txt").write_text("audio-{000000..000001}.tar")
    return {"input.txt": "text"}


def _read_pattern(given: Given) -> None:
    pattern = given.path.read_bytes().decode("utf-8", "surrogateescape").replace("\0", "")
    if "://" in pattern:
        return  # nothing is fetched here
    index_shards(f"{given.folder}/{pattern}", given.folder / "out.json")


def _clip_cache(folder: Path) -> dict[str, str]:
    clips = write_tiny_clips(folder / "full")
    few = [asdict(clip) for clip in clips.clips[:3]]
    (folder / "index.json").write_text(
        json.dumps({"format": "sa3-clips/1", "sample_rate": 44_100, "about": {}, "clips": few})
    )
    np.save(folder / "audio.npy", clips.audio[: 3 * 16_000])
    del clips
    shutil.rmtree(folder / "full")
    return {"index.json": "json", "audio.npy": "npy"}


def _read_clip_cache(given: Given) -> None:
    clips = ClipSet(given.folder)
    for clip in clips.clips:
        assert isinstance(clip.id, str) and all(isinstance(text, str) for text in clip.captions)
        assert clips.read(clip).shape == (clip.samples, clips.channels)
    clips.select("train")
    source = open_source(given.folder, 44_100, 2)
    for number in range(len(source.names)):
        whole(source.recording(number))


def _settings(folder: Path) -> dict[str, str]:
    for stage in _KINDS:
        preset = "demo" if stage == "lora" else "first"
        shutil.copy(PRESETS / stage / f"{preset}.toml", folder / f"{stage}.toml")
    return {f"{stage}.toml": "toml" for stage in _KINDS}


def _read_settings(given: Given) -> None:
    stage = given.path.stem
    try:
        load_settings(_KINDS[stage], stage, str(given.path), ())
    except ValueError as error:
        if str(error).startswith(stage):  # the name of the table that the file is
            raise ValueError(f"{given.path}: {error}") from error
        raise


def _changes(folder: Path) -> dict[str, str]:
    (folder / "input.txt").write_text("train.steps=100")
    return {"input.txt": "text"}


def _read_changes(given: Given) -> None:
    text = given.path.read_bytes().decode("utf-8", "surrogateescape").replace("\0", "")
    load_settings(PretrainConfig, "pretrain", "first", (text,))


def _run_settings(folder: Path) -> dict[str, str]:
    keep_settings(folder, _demo(), {"data": _HASH}, resumed=False)
    return {"settings.json": "json"}


def _demo() -> PretrainConfig:
    return load_settings(PretrainConfig, "pretrain", "first", ())


def _read_run_settings(given: Given) -> None:
    """They stay as they are where the run is refused; one that goes on longer writes its own."""
    stored = given.path.read_bytes() if given.path.is_file() else b""
    try:
        keep_settings(given.folder, _demo(), {"data": _HASH}, resumed=True)
    except ValueError:
        assert not stored or given.path.read_bytes() == stored, "settings of a run that is refused were changed"
        raise
    assert json.loads(given.path.read_bytes())["data"] == _HASH


def _tensors() -> dict[str, dict[str, torch.Tensor]]:
    return {"ema": {"a": torch.ones(3, 2)}, "weights/x": {"a": torch.zeros(3, 2)}}


def _run(folder: Path) -> dict[str, str]:
    progress = RunProgress(step=3, updates={"x": 3}, bad_steps={"x": 0}, precision="fp32", revision="x", checksums={})
    checkpoints = Checkpoints(folder, 0)
    checkpoints.save(_tensors(), progress)
    checkpoints.wait()
    names = [path.name for path in checkpoints.path(3).iterdir()]
    step = f"checkpoints/{checkpoints.path(3).name}"
    return {f"{step}/{name}": "json" if name.endswith(".json") else "bytes" for name in names}


def _read_run(given: Given) -> None:
    checkpoints = Checkpoints(given.folder, 0)
    progress, _ = checkpoints.load(_tensors())
    assert (progress is None and not checkpoints.steps()) or (progress is not None and progress.step == 3)


TARGETS = (
    Target(
        "latent-set",
        _latent_set,
        _read_latent_set,
        (f"{_DATA}/latents.py", f"{_DATA}/entries.py", "sa3_torch/evaluate/stored.py"),
    ),
    Target("public-latents", _public, _read_public, (f"{_DATA}/encode/public_latents.py",)),
    Target("sidecars", _sidecars, _read_sidecars, (f"{_DATA}/recordings.py", f"{_DATA}/encode/sources.py")),
    Target("shards", _shards, _read_shards, (f"{_DATA}/shards.py", f"{_DATA}/urls.py", f"{_DATA}/encode/sources.py")),
    Target("shard-patterns", _patterns, _read_pattern, (f"{_DATA}/urls.py",), names_file=False, forms=False),
    Target("clip-cache", _clip_cache, _read_clip_cache, (f"{_DATA}/clip_cache.py", f"{_DATA}/encode/sources.py")),
    Target("settings", _settings, _read_settings, (f"{_RUN}/settings.py",)),
    Target("changes", _changes, _read_changes, (f"{_RUN}/settings.py",), names_file=False, forms=False),
    Target("run-settings", _run_settings, _read_run_settings, (f"{_RUN}/settings.py",)),
    Target("run-checkpoints", _run, _read_run, (f"{_RUN}/checkpoints.py", f"{_RUN}/checkpoint_index.py")),
)
