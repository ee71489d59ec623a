"""Pre-encoding: every captioned recording to latents, once [T3].

Recordings are read, encoded and written piece by piece, so that memory does not grow with their length. What is done
stands in complete shards: the same command goes on after the last one, and the result is the same to the bit.

Shapes: L audio samples, T latent frames, C latent channels, R samples per latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sa3_mlx.common.files.atomic import WriteError, new_file, remove_partials, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.chunks import check_chunk_frames, default_chunk_frames, halo, pad_frames
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import Config, ConfigError
from sa3_mlx.common.version import version
from sa3_torch.same import SAME
from sa3_torch.train.data.clip_cache import Audio
from sa3_torch.train.data.entries import parse_entries
from sa3_torch.train.data.latents import LatentItem, LatentSet, ShardFile, shard_path, write_index, write_silence
from sa3_torch.train.data.recordings import ATTRIBUTION, SILENT, TOLERATED, Credit, refuse_failures, write_attribution
from sa3_torch.train.data.shards import StaleIndexError
from sa3_torch.train.data.urls import FetchError
from sa3_torch.train.run.random import Purpose, generator
from sa3_torch.weights import load_part

from .sources import Recording, Source, digest_rows

PLAN_FORMAT = "sa3-pre-encode/1"
SILENCE_FRAMES = 32
WHOLE_SECONDS = 30  # shorter recordings are encoded in one piece


def load_autoencoder(folder: Path, device: str = "cpu") -> tuple[SAME, str]:
    """Load the frozen autoencoder of a checkpoint folder in fp32, and the hash of its weights."""
    same = load_part(folder, ModelConfig.load(folder), "same", torch.device(device), torch.float32)
    assert isinstance(same, SAME)
    return same, file_hash(folder / WEIGHTS_FILE)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(Config):
    """Pre-encoding: ``copies`` - 1 versions of a training recording are shifted by part of a frame."""

    copies: int
    seed: int
    shard_frames: int  # a shard is closed when it has so many
    chunk_frames: int | None  # frames that are encoded at once; None: 30 s

    def __post_init__(self) -> None:
        if self.copies < 1 or self.seed < 0 or self.shard_frames < 1:
            raise ConfigError(
                f"copies {self.copies}, seed {self.seed}, shard_frames {self.shard_frames}: at least 1, "
                "0 and 1 are allowed"
            )


def chunk_size(same: SAME, sample_rate: int, chunk_frames: int | None) -> int:
    """Return how many frames are encoded at once. Raises ValueError for a size that cannot be exact."""
    if chunk_frames is None:
        whole = pad_frames(-(-WHOLE_SECONDS * sample_rate // same.config.samples_per_latent), same.config)
        return max(whole, default_chunk_frames(same.config, "encode"))
    check_chunk_frames(chunk_frames, same.config, "encode")
    return chunk_frames


@torch.no_grad()
def encode_blocks(same: SAME, blocks: Iterator[Audio], chunk_frames: int, lead: int = 0) -> Iterator[Tensor]:
    """Encode audio in pieces (n, channels), after ``lead`` zeros, to latents in pieces (T, C): ceil(L / R) frames.

    Chunks overlap by the halo of chunks.py, which makes them equal to the whole but for rounding. At most one
    chunk of audio is held.
    """
    size, edge = same.config.samples_per_latent, halo(same.config, "encode")
    device = same.bottleneck.running_std.device
    buffer = np.zeros((lead, same.audio_channels), np.float32)
    first = done = 0  # the frame at which the buffer begins, and frames that were given
    for block in blocks:
        buffer = np.concatenate([buffer, block])
        while len(buffer) > chunk_frames * size:  # more is to come: the right edge is dropped
            latents = same.encode(torch.from_numpy(buffer[None, : chunk_frames * size]).to(device))[0]
            keep_stop = first + chunk_frames - edge
            yield latents[done - first : keep_stop - first]
            done, start = keep_stop, keep_stop - edge
            buffer, first = buffer[(start - first) * size :], start
    if len(buffer):
        yield same.encode(torch.from_numpy(np.ascontiguousarray(buffer)[None]).to(device))[0, done - first :]


@torch.no_grad()
def silence_latent(same: SAME) -> Tensor:
    """Encode zeros: the latent away from the ends -> (C,)."""
    zeros = torch.zeros(1, SILENCE_FRAMES * same.config.samples_per_latent, same.audio_channels)
    return same.encode(zeros.to(same.bottleneck.running_std.device))[0, SILENCE_FRAMES // 2]


@dataclass(frozen=True, kw_only=True)
class _Done(Config):
    """Describe a complete shard, as it stands beside it."""

    rows: int
    hash: str
    next: int  # the first recording after it
    recordings: str = ""  # digest of those in it
    failures: tuple[str, ...]
    silent: tuple[str, ...]
    duplicates: tuple[str, ...]
    without_caption: tuple[str, ...]
    items: tuple[dict[str, Any], ...]

    def sources(self, where: str) -> set[str]:
        """Return the hashes of what is in it. Raises ValueError for entries that are no items."""
        return {item.source for item in parse_entries(LatentItem, list(self.items), f"{where}: items")}


@dataclass
class EncodeProgress:
    """Content of the complete shards; every list of names is part of the details."""

    next: int = 0  # the first recording that is not done
    shards: int = 0
    items: list[dict[str, Any]] = field(default_factory=list)  # of the open shard
    seen: set[str] = field(default_factory=set)  # hashes of sources
    failures: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)

    def lists(self) -> dict[str, list[str]]:
        return {name: getattr(self, name) for name in ("failures", "silent", "duplicates", "without_caption")}


class PreEncoder:
    """Encodes ``source`` with the autoencoder of ``folder`` into ``out``; goes on where an earlier run was stopped."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        out: Path,
        config: EncodeConfig,
        device: str = "cpu",
        tolerated: float = TOLERATED,
    ) -> None:
        """Open ``out``, in which an earlier run may have begun; ``tolerated``: the share that may be unreadable."""
        self.source, self.out, self.config, self.tolerated = source, out, config, tolerated
        self.model_config = ModelConfig.load(folder)
        self.same, self.digest = load_autoencoder(folder, device)
        self.chunk = chunk_size(self.same, self.model_config.sample_rate, config.chunk_frames)
        out.mkdir(parents=True, exist_ok=True)
        plan = {
            "format": PLAN_FORMAT,
            "autoencoder": self.digest,
            "recordings": source.listing,
            "device": device,
            **config.to_dict(),
            "chunk_frames": self.chunk,
        }
        self.progress = self._resume(plan)

    def run(self) -> LatentSet:
        """Encode what is left -> the opened latents.

        Raises ValueError with the list when more than the tolerated share of the recordings cannot be read or more than
        1 % have no caption, and WriteError where the disk refuses.
        """
        if not all((self.out / name).is_file() for name in ("details.json", "index.json")):
            names = self.source.names
            with tqdm(total=len(names), initial=self.progress.next, desc="encode", mininterval=2.0) as bar:
                while self.progress.next < len(names):
                    before = self.progress.next
                    self._shard()
                    bar.update(self.progress.next - before)
            self._finish()
        return LatentSet(self.out, autoencoder=self.digest)

    def _resume(self, plan: dict[str, Any]) -> EncodeProgress:
        path = self.out / "plan.json"
        remove_partials(self.out)
        if not path.is_file():
            if any(self.out.glob("shard-*")):
                raise ValueError(f"{self.out} holds shards without a plan.json; choose an empty folder")
            write_json(path, plan)
            return EncodeProgress()
        found = read_object(path)
        others = [name for name in plan if found.get(name) != plan[name]]
        complete = shard_path(self.out, 0).with_suffix(".json").is_file()
        if complete and others and (others != ["recordings"] or (self.out / "index.json").is_file()):
            raise self._another(others)
        progress = EncodeProgress()
        while (about := shard_path(self.out, progress.shards).with_suffix(".json")).is_file():
            done = _Done.from_dict(read_object(about), where=str(about))
            rows = digest_rows(self.source.rows[progress.next : done.next])
            if others and done.recordings != rows:
                if not done.failures:
                    raise self._another(others)
                self._forget(progress.shards)  # what it left out has been mended, so it is encoded again
                break
            progress.next, progress.shards = done.next, progress.shards + 1
            progress.seen |= done.sources(str(about))
            for name, values in progress.lists().items():
                values += getattr(done, name)
        if others:
            write_json(path, plan)
        return progress

    def _another(self, names: list[str]) -> ValueError:
        what = ", ".join(sorted(names))
        return ValueError(f"{self.out} was begun with another {what}; choose another folder or remove this one")

    def _forget(self, first: int) -> None:
        """Remove shards from ``first`` on, the last one first."""
        numbers = range(first, len(list(self.out.glob("shard-*.json"))))
        for number in reversed(numbers):
            shard_path(self.out, number).with_suffix(".json").unlink(missing_ok=True)
            shard_path(self.out, number).unlink(missing_ok=True)

    def _shard(self) -> None:
        """Encode recordings until a shard is full, and close it."""
        progress, before = self.progress, {name: len(values) for name, values in self.progress.lists().items()}
        path, progress.items, first = shard_path(self.out, progress.shards), [], progress.next
        with new_file(path) as partial:
            shard = ShardFile(partial, self.model_config.same.latent_channels)
            while progress.next < len(self.source.names) and shard.rows < self.config.shard_frames:
                self._recording(shard, progress.next)
                progress.next += 1
                refuse_failures(progress.failures, len(self.source.names), "unreadable", self.tolerated)
                refuse_failures(progress.without_caption, len(self.source.names), "without a caption")
            rows, digest = shard.rows, shard.close()
        done = _Done(
            rows=rows,
            hash=digest,
            next=progress.next,
            recordings=digest_rows(self.source.rows[first : progress.next]),
            failures=tuple(progress.failures[before["failures"] :]),
            silent=tuple(progress.silent[before["silent"] :]),
            duplicates=tuple(progress.duplicates[before["duplicates"] :]),
            without_caption=tuple(progress.without_caption[before["without_caption"] :]),
            items=tuple(progress.items),
        )
        write_json(path.with_suffix(".json"), done.to_dict())  # now it counts
        progress.shards += 1

    def _recording(self, shard: ShardFile, number: int) -> None:
        progress, name, rows = self.progress, self.source.names[number], shard.rows
        try:
            recording = self.source.recording(number)
            if self.source.unique and recording.source in progress.seen:
                progress.duplicates.append(name)
                return
            if not recording.captions:
                progress.without_caption.append(name)
                return
            items, peak = self._encode(shard, recording, number)
        except (WriteError, FetchError, StaleIndexError):  # of disk, connection and index, not of the recording
            raise
        except (ValueError, OSError) as error:
            shard.rollback(rows)
            progress.failures.append(f"{name}: {error}")
            return
        if peak < SILENT:
            shard.rollback(rows)
            progress.silent.append(name)
            return
        progress.seen.add(recording.source)
        progress.items += [asdict(item) for item in items]

    def _encode(self, shard: ShardFile, recording: Recording, number: int) -> tuple[list[LatentItem], float]:
        """Encode the copies of a recording -> their items, and the peak of the audio.

        The first copy is the recording as it is; the others follow a random silence of less than one frame, so that
        the model meets every phase of a sound against the latent grid.
        """
        copies = self.config.copies if recording.split == "train" else 1
        shifts = generator(self.config.seed, Purpose.ENCODER_SHIFT, self.source.first + number).integers(
            1, self.same.config.samples_per_latent, self.config.copies
        )
        items: list[LatentItem] = []
        peak, samples = 0.0, 0

        def watched() -> Iterator[Audio]:
            nonlocal peak, samples
            samples = 0
            for block in recording.blocks():
                peak, samples = max(peak, float(np.abs(block).max(initial=0))), samples + len(block)
                yield block

        for copy in range(copies):
            offset = shard.rows
            for latents in encode_blocks(self.same, watched(), self.chunk, int(shifts[copy]) if copy else 0):
                shard.append(latents, recording.id)
            if shard.rows == offset:
                raise ValueError("holds less than one sample at the model's rate")
            seconds = samples / self.model_config.sample_rate if recording.seconds is None else recording.seconds
            items.append(
                LatentItem(
                    id=f"{recording.id}+{copy}" if copy else recording.id,
                    captions=recording.captions,
                    seconds=seconds,
                    shard=self.progress.shards,
                    offset=offset,
                    frames=shard.rows - offset,
                    kind=recording.kind,
                    label=recording.label,
                    midi=recording.midi,
                    split=recording.split,
                    source=recording.source,
                    licence=recording.licence,
                    fields=recording.fields,
                )
            )
        return items, peak

    def _finish(self) -> None:
        """Write silence, attribution, details and, last, the index, once every recording has been seen."""
        count = self.progress.shards
        write_silence(self.out, silence_latent(self.same))
        latents = LatentSet(self.out, autoencoder=self.digest, shards=count)
        if not latents.items:
            raise ValueError(f"{self.out}: nothing could be encoded: every recording is silent or not readable")
        self._write_details(latents)
        write_index(self.out, self.digest, count)

    def _write_details(self, latents: LatentSet) -> None:
        mean, deviation = latents.statistics(None)
        originals = {item.source: item for item in reversed(latents.items)}  # without the copies
        details = {
            "autoencoder": self.digest,
            "running_std": float(self.same.bottleneck.running_std),
            "scale": 1.0,
            "model": self.model_config.name,
            "sample_rate": self.model_config.sample_rate,
            "version": version(),
            "samples_per_latent": self.same.config.samples_per_latent,
            "resampling": "soxr VHQ",
            "precision": "float32",
            **self.config.to_dict(),
            "chunk_frames": self.chunk,
            "recordings": len(self.source.names),
            "items": len(latents.items),
            "frames": sum(item.frames for item in latents.items),
            "seconds": round(sum(item.seconds for item in originals.values()), 6),
            **self.progress.lists(),
            "mean": mean.tolist(),
            "std": deviation.tolist(),
        }
        credits = [
            Credit(id=item.id, licence=item.licence, source=source, fields=item.fields)
            for source, item in originals.items()
        ]
        write_attribution(self.out / ATTRIBUTION, credits)
        write_json(self.out / "details.json", details)
