"""Pre-encoding: every captioned recording to latents, once [T3].

Recordings are read, encoded and written piece by piece, so that memory does not grow with their length. What is done
stands in complete shards: the same command goes on after the last one, and the result is the same to the bit.

Shapes: L audio samples, T latent frames, C latent channels, R samples per latent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from sa3_mlx.common.files.atomic import WriteError, new_file, remove_partials, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.schema import Config, ConfigError, quoted
from sa3_mlx.common.version import version
from sa3_torch.same import SAME
from sa3_torch.train.data.clip_cache import Audio
from sa3_torch.train.data.latents import LatentItem, LatentSet, ShardFile, shard_path, write_index, write_silence
from sa3_torch.train.data.recordings import ATTRIBUTION, SILENT, TOLERATED, Credit, refuse_failures, write_attribution
from sa3_torch.train.data.shards import StaleIndexError
from sa3_torch.train.data.urls import FetchError
from sa3_torch.train.run.random import Purpose, generator
from sa3_torch.weights import load_part

from .done import Done, EncodeProgress
from .encoder import PRECISIONS, chunk_size, encode_alike, encode_blocks, set_precision, silence_latent
from .sources import Recording, Source, digest_rows

PLAN_FORMAT = "sa3-pre-encode/1"
_EARLIER = {"batch": 1, "precision": "float32"}  # of plans that do not say so
_NO_SAMPLE = "holds less than one sample at the model's rate"
_MOST_WAITING = 16  # sounds for each one of a batch


def load_autoencoder(folder: Path, device: str = "cpu") -> tuple[SAME, str]:
    """Load the frozen autoencoder of a checkpoint folder in fp32, and the hash of its weights."""
    same = load_part(folder, ModelConfig.load(folder), "same", torch.device(device), torch.float32)
    assert isinstance(same, SAME)
    return same, file_hash(folder / WEIGHTS_FILE)


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(Config):
    """Pre-encoding: ``copies`` - 1 versions of a training recording are shifted by part of a frame.

    With ``batch`` 1 and ``precision`` float32 the latents are those of each recording by itself, to the bit.
    """

    copies: int
    seed: int
    shard_frames: int  # a shard is closed when it has so many
    chunk_frames: int | None  # frames that are encoded at once; None: 30 s
    batch: int = 1  # chunks that are encoded together, or as many frames of shorter recordings
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.copies < 1 or self.seed < 0 or self.shard_frames < 1 or self.batch < 1:
            raise ConfigError(
                f"copies {self.copies}, seed {self.seed}, shard_frames {self.shard_frames}, batch {self.batch}: at "
                "least 1, 0, 1 and 1 are allowed"
            )
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {quoted(self.precision)}; allowed: {', '.join(PRECISIONS)}")


@dataclass(frozen=True, kw_only=True)
class _Sound:
    """A recording that waits for others of its length: ``copies`` (L, channels) with their silences."""

    recording: Recording
    number: int
    samples: int
    copies: list[Audio]

    @property
    def peak(self) -> float:
        return float(np.abs(self.copies[0]).max(initial=0))

    def frames(self, size: int) -> int:
        return sum(-(-len(copy) // size) for copy in self.copies)


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
        set_precision(self.same, config.precision)
        self.chunk = chunk_size(self.same, self.model_config.sample_rate, config.chunk_frames)
        self.size = self.same.config.samples_per_latent
        self._waiting: list[_Sound] = []
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
        found = {**_EARLIER, **read_object(path)}
        others = [name for name in plan if found.get(name) != plan[name]]
        complete = shard_path(self.out, 0).with_suffix(".json").is_file()
        if complete and others and (others != ["recordings"] or (self.out / "index.json").is_file()):
            raise self._another(others)
        progress = EncodeProgress()
        while (about := shard_path(self.out, progress.shards).with_suffix(".json")).is_file():
            done = Done.from_dict(read_object(about), where=str(about))
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
        self._waiting = []
        with new_file(path) as partial:
            shard = ShardFile(partial, self.model_config.same.latent_channels)
            while progress.next < len(self.source.names) and self._rows(shard) < self.config.shard_frames:
                self._recording(shard, progress.next)
                progress.next += 1
                self._refuse_failures()
            self._encode_waiting(shard)
            self._refuse_failures()
            rows, digest = shard.rows, shard.close()
        done = Done(
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

    def _refuse_failures(self) -> None:
        count = len(self.source.names)
        refuse_failures(self.progress.failures, count, "unreadable", self.tolerated)
        refuse_failures(self.progress.without_caption, count, "without a caption")

    def _rows(self, shard: ShardFile) -> int:
        """Return the frames of a shard, with those of the sounds that wait for it."""
        return shard.rows + sum(sound.frames(self.size) for sound in self._waiting)

    def _recording(self, shard: ShardFile, number: int) -> None:
        progress, name = self.progress, self.source.names[number]
        long: Recording | None = None
        with self._failures(shard, name):
            recording = self.source.recording(number)
            if self.source.unique and recording.source in progress.seen:
                progress.duplicates.append(name)
                return
            if not recording.captions:
                progress.without_caption.append(name)
                return
            sound = self._short(recording, number) if self.config.batch > 1 else None
            if sound is None:
                long = recording
            elif sound.peak < SILENT:
                progress.silent.append(name)
            else:
                progress.seen.add(recording.source)
                self._waiting.append(sound)
        if long is not None:
            self._encode_waiting(shard)
            with self._failures(shard, name):
                self._long(shard, long, number)
        held = sum(sound.frames(self.size) for sound in self._waiting)
        copies = sum(len(sound.copies) for sound in self._waiting)
        if held >= self.config.batch * self.chunk or copies >= _MOST_WAITING * self.config.batch:
            self._encode_waiting(shard)

    @contextmanager
    def _failures(self, shard: ShardFile, name: str) -> Iterator[None]:
        """Take back what was written of a recording that cannot be encoded, and name it."""
        rows, items = shard.rows, len(self.progress.items)
        try:
            yield
        except (WriteError, FetchError, StaleIndexError):  # of disk, connection and index, not of the recording
            raise
        except (ValueError, OSError) as error:
            shard.rollback(rows)
            del self.progress.items[items:]
            self.progress.failures.append(f"{name}: {error}")

    def _short(self, recording: Recording, number: int) -> _Sound | None:
        """Read a recording with its copies, None where one of them has more than a chunk."""
        leads, blocks, samples = self._leads(recording, number), list[Audio](), 0
        for block in recording.blocks():
            blocks.append(block)
            samples += len(block)
            if samples + max(leads) > self.chunk * self.size:
                return None
        if not samples:
            raise ValueError(_NO_SAMPLE)
        audio = np.concatenate(blocks)
        copies = [np.pad(audio, ((lead, 0), (0, 0))) for lead in leads]
        return _Sound(recording=recording, number=number, samples=samples, copies=copies)

    def _leads(self, recording: Recording, number: int) -> list[int]:
        """Return how many zeros stand before each copy of a recording.

        The first copy is the recording as it is; the others follow a random silence of less than one frame, so that
        the model meets every phase of a sound against the latent grid.
        """
        rng = generator(self.config.seed, Purpose.ENCODER_SHIFT, self.source.first + number)
        shifts = rng.integers(1, self.size, self.config.copies)
        return [0, *map(int, shifts[1:])] if recording.split == "train" else [0]

    def _encode_waiting(self, shard: ShardFile) -> None:
        """Encode the sounds that wait, and write them in their order."""
        waiting, self._waiting = self._waiting, []
        copies = [copy for sound in waiting for copy in sound.copies]
        encoded = iter(encode_alike(self.same, copies, self.chunk, self.config.batch))
        for sound in waiting:
            latents = [next(encoded) for _ in sound.copies]
            with self._failures(shard, self.source.names[sound.number]):
                for copy, frames in enumerate(latents):
                    offset = shard.rows
                    shard.append(frames, sound.recording.id)
                    self._item(sound.recording, copy, sound.samples, offset, shard.rows - offset)

    def _long(self, shard: ShardFile, recording: Recording, number: int) -> None:
        """Encode a recording of any length as it is read, once for each copy."""
        peak, samples, rows, items = 0.0, 0, shard.rows, len(self.progress.items)

        def watched() -> Iterator[Audio]:
            nonlocal peak, samples
            samples = 0
            for block in recording.blocks():
                peak, samples = max(peak, float(np.abs(block).max(initial=0))), samples + len(block)
                yield block

        for copy, lead in enumerate(self._leads(recording, number)):
            offset = shard.rows
            for latents in encode_blocks(self.same, watched(), self.chunk, lead, self.config.batch):
                shard.append(latents, recording.id)
            if shard.rows == offset:
                raise ValueError(_NO_SAMPLE)
            self._item(recording, copy, samples, offset, shard.rows - offset)
        if peak < SILENT:
            shard.rollback(rows)
            del self.progress.items[items:]
            self.progress.silent.append(self.source.names[number])
        else:
            self.progress.seen.add(recording.source)

    def _item(self, recording: Recording, copy: int, samples: int, offset: int, frames: int) -> None:
        """Describe a copy of a recording of so many samples that was written."""
        seconds = samples / self.model_config.sample_rate if recording.seconds is None else recording.seconds
        item = LatentItem(
            id=f"{recording.id}+{copy}" if copy else recording.id,
            captions=recording.captions,
            seconds=seconds,
            shard=self.progress.shards,
            offset=offset,
            frames=frames,
            kind=recording.kind,
            label=recording.label,
            midi=recording.midi,
            split=recording.split,
            source=recording.source,
            licence=recording.licence,
            fields=recording.fields,
        )
        self.progress.items.append(asdict(item))

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
            "samples_per_latent": self.size,
            "resampling": "soxr VHQ",
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
