"""What the commands of a fault campaign read: tiny models, sounds, latents, adapters; made once, never changed.

``make_world(folder)`` fills ``folder/inputs`` and ``folder/home``. Commands run in ``folder/work``.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from sa3_mlx.common.adapters.format import write_adapter
from sa3_mlx.common.files.audio import write_audio
from tests.support.adapters import adapter_config, random_adapter
from tests.support.command import SMALL, tone
from tests.support.foreign import official_checkpoint
from tests.support.tiny_checkpoint import write_checkpoint

PRESET = "tiny-of-faults"  # a name for --model of the training stages


@dataclass(frozen=True)
class World:
    """Name the folders of a campaign."""

    folder: Path

    @property
    def inputs(self) -> Path:
        return (self.folder / "inputs").resolve()

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def forget(self) -> None:
        """Remove what earlier commands remembered in the home."""
        for path in self.home.iterdir():
            if path.name != "models":
                path.unlink()

    def twin(self, folder: Path) -> World:
        """Return a world with a home of its own and the same inputs."""
        folder.mkdir()
        (folder / "inputs").symlink_to(self.inputs)
        shutil.copytree(self.home, folder / "home")
        return World(folder)


def make_inference_world(world: World) -> None:
    """Make what the commands without training read."""
    inputs = world.inputs
    write_checkpoint(world.home / "models" / "little", SMALL)
    for name in ("little", "spare"):
        write_checkpoint(inputs / name, SMALL, variant=name)
    official_checkpoint.write_official(inputs / "official", official_checkpoint.TINY)
    for number in range(2):
        adapter = random_adapter(inputs / "little", adapter_config("dora-rows"), seed=number)
        write_adapter(inputs / f"bell-{number}.safetensors", adapter)
    for number in range(2):
        write_audio(inputs / f"take-{number}.wav", tone(0.5 + 0.1 * number), SMALL.sample_rate)
    for number in range(2):
        sounds = inputs / f"sounds-{number}"
        sounds.mkdir()
        for name in range(4):
            audio = tone(0.3 + 0.05 * name, rate=44_100, level=0.1 * (name + 1 + 4 * number))
            write_audio(sounds / f"{name}.wav", audio, 44_100)
            (sounds / f"{name}.txt").write_text(f"low kick {name}\n")


def make_training_world(world: World) -> None:
    """Make what training reads, and what it made before."""
    from sa3_torch.train.autoencoder.gate import check_latents
    from sa3_torch.train.data.clip_cache import ClipSet
    from sa3_torch.train.data.encode.pre_encode import load_autoencoder
    from sa3_torch.train.data.encode.public_latents import export_public
    from sa3_torch.train.data.encode.sources import ClipSource
    from sa3_torch.train.data.latents import LatentSet
    from sa3_torch.train.data.packing import write_shards
    from tests.support.stages import make_workspace

    inputs = world.inputs
    training = inputs / "training"
    make_workspace(training)
    found = check_latents(
        training / "latents", ClipSource(ClipSet(training / "clips"), 2), training / "run" / "model", items=2
    )
    assert found.good, str(found)
    latents = LatentSet(training / "latents", autoencoder=load_autoencoder(training / "run" / "model")[1])
    export_public(latents, inputs / "public", 44_100)
    for number in range(2):
        shards = inputs / f"shards-{number}"
        write_shards(inputs / f"sounds-{number}", shards, shard_bytes=1 << 20, captions_required=True)


def copy_tree(source: Path, target: Path) -> None:
    """Copy what is in a folder, hidden files too, into an existing one."""
    shutil.copytree(source, target, dirs_exist_ok=True, symlinks=True)
