"""Keep jobs, sounds and their files together: a row and its file appear together and go together."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from sa3_mlx.cli.output.outlet import Outlet, check_delivery
from sa3_mlx.cli.output.provenance import OutputRecord, Provenance
from sa3_mlx.common.delivery.settings import Delivery
from sa3_mlx.common.files.atomic import locked
from sa3_mlx.common.files.audio import peak_db, read_blocks
from sa3_mlx.common.files.audio_file import BLOCK_SAMPLES, Audio, open_audio_file
from sa3_mlx.common.files.encoders import SUBTYPES
from sa3_mlx.common.files.wav import Subtype, map_wav

from .database import Database
from .pool import Pool, Upload
from .records import KEPT, SECONDS_MAX, SoundRecord, State

_DATABASE = "studio.sqlite"
_EXPORTS_MAX = 2 << 30  # bytes of converted copies
_WHOLE_SECONDS = 600.0  # of a sound that is finished in memory
_AS_IT_IS = Delivery()


class Store:
    """Hold what a server keeps. One process has a folder; what a killed one left unfinished is marked and swept."""

    def __init__(self, folder: Path, *, disk_free: int, upload_max: int) -> None:
        """Open a folder, made where there is none. Raises OSError where another server has it."""
        folder.mkdir(parents=True, exist_ok=True)
        self._stack, self._lock = ExitStack(), threading.Lock()
        self._exporting, self.drawing = threading.Lock(), threading.Lock()  # a copy is made once
        self._said: dict[Path, tuple[str, ...]] = {}  # about copies
        self._stack.enter_context(locked(folder))
        self.folder, self._upload_max = folder, upload_max
        self.pool = Pool(folder, disk_free)
        self.database = Database(folder / _DATABASE)
        self._stack.callback(self.database.close)
        self.interrupted = self.database.interrupt_jobs(time.time())
        self.pool.sweep(self.database.files())

    def close(self) -> None:
        """Close the database and let others have the folder."""
        self._stack.close()

    def upload(self) -> Upload:
        """Begin to take a file. Raises Full where the disk is."""
        self.pool.check_room()
        return Upload(self.pool, self._upload_max)

    def add_upload(self, upload: Upload, name: str) -> SoundRecord:
        """Keep a file that came whole, if all of it can be decoded; one that is there already is returned.

        Raises ValueError, one line that names ``name``, for what is no sound or is damaged.
        """
        path = upload.finish()
        try:
            record = _measure(path, name)
        except (ValueError, OSError) as error:
            raise ValueError(str(error).replace(str(path), name or "the file")) from error
        with self._lock:
            record = replace(record, file=upload.take())
            known = self.database.upload_of(record.file)
            if known is None:
                self.database.add_sound(record)
        return known or record

    def keep(self, job_id: str, made: Sequence[tuple[Path, SoundRecord]]) -> list[SoundRecord]:
        """Keep the files that a job made, and mark it as done: all of it or nothing."""
        with self._lock:
            records = [replace(record, file=self.pool.add(path)) for path, record in made]
            self.database.finish_job(job_id, "done", time.time(), sounds=records)
        return records

    def finish(self, job_id: str, state: State, error: str | None = None) -> None:
        """Mark a job as over, without a result."""
        self.database.finish_job(job_id, state, time.time(), error)

    def delete(self, sound_id: str) -> None:
        """Remove a sound, and its file where no other sound has it."""
        with self._lock:
            unused = self.database.delete_sound(sound_id)
            if unused is not None:
                self.pool.remove(unused)

    def path(self, sound: SoundRecord) -> Path:
        """Return the file of a sound as it is kept."""
        return self.pool.path(sound.file)

    def audio(self, sound: SoundRecord) -> Audio:
        """Return the samples (L, channels) of a sound as it is kept; those of its own files stay on the disk until they
        are looked at."""
        if sound.subtype == KEPT:
            return map_wav(self.path(sound))
        return np.concatenate(list(read_blocks(self.path(sound), sound.sample_rate, sound.channels)))

    def export(self, sound: SoundRecord, suffix: str, subtype: Subtype | None, delivery: Delivery = _AS_IT_IS) -> Path:
        """Return a file of a sound, finished and in another format, with its provenance in the tags: what a command
        would write.

        Raises ValueError for what cannot be done, ImportError where a library is missing, Full where the disk is.
        """
        if suffix not in SUBTYPES:
            raise ValueError(f"format is {suffix.removeprefix('.')}: allowed are wav, flac, mp3, ogg, opus and m4a")
        subtype = subtype or SUBTYPES[suffix][0]
        if subtype not in SUBTYPES[suffix]:
            raise ValueError(
                f"{suffix.removeprefix('.')} cannot hold {subtype}; allowed: {', '.join(SUBTYPES[suffix])}"
            )
        if suffix == ".wav" and subtype == sound.subtype and sound.provenance is not None and delivery == _AS_IT_IS:
            return self.path(sound)
        output = OutputRecord(format=subtype, **delivery.for_file(subtype, sound.sample_rate).to_dict())
        check_delivery(output, None, sound.seconds, sound.sample_rate, kept=bool(sound.regions))
        if output.whole and sound.seconds > _WHOLE_SECONDS:
            raise ValueError(
                f"{output.whole[0]} needs the whole sound in memory: up to {_WHOLE_SECONDS:g} s, this one has "
                f"{sound.seconds:.0f} s"
            )
        digest = hashlib.sha256(repr(output).encode()).hexdigest()[:16]
        target = self.pool.export(f"{sound.id}-{digest}{suffix}")
        with self._exporting:
            if not target.exists():
                self.pool.check_room(sound.samples * sound.channels * 4)
                try:
                    self._said[target] = self._write(sound, target, output)
                except (ValueError, ImportError) as error:
                    raise type(error)(str(error).replace(str(target), f"{sound.name}{suffix}")) from error
                for gone in self.pool.trim_exports(_EXPORTS_MAX):
                    self._said.pop(gone, None)
        return target

    def said(self, export: Path) -> tuple[str, ...]:
        """Return what there is to say about a file that ``export`` gave, such as a loudness that was not reached."""
        return self._said.get(export, ())

    def _write(self, sound: SoundRecord, target: Path, output: OutputRecord) -> tuple[str, ...]:
        """Write a copy as the commands do, piece by piece where that can be; return what there is to say about it."""
        comment = ""
        if sound.provenance is not None:
            comment = replace(Provenance.from_dict(sound.provenance), output=output).to_json()
        with Outlet(target, output, sound.samples, sound.channels, sound.sample_rate, comment=comment) as outlet:
            if output.whole:
                return outlet.finish(self.audio(sound)).notes
            for block in read_blocks(self.path(sound), sound.sample_rate, sound.channels):
                outlet.take(block)
        return ()


def new_id() -> str:
    """Return an id that nobody can guess."""
    return secrets.token_hex(8)


def _measure(path: Path, name: str) -> SoundRecord:
    """Decode all of a file; what it says of itself is not believed. Raises ValueError for what is no whole sound."""
    peak, samples = 0.0, 0
    with open_audio_file(path) as file:
        rate, channels, subtype = file.samplerate, file.channels, str(file.subtype)
        for block in file.blocks(BLOCK_SAMPLES):
            samples += len(block)
            peak = max(peak, float(np.abs(block).max()))
            if samples > SECONDS_MAX * rate:
                raise ValueError(f"{path}: longer than {SECONDS_MAX / 60:.0f} minutes; cut it first")
    level = peak_db(np.array([[peak]], np.float32))
    return SoundRecord(
        id=new_id(),
        created=time.time(),
        kind="upload",
        name=name,
        file="",
        seconds=samples / rate,
        samples=samples,
        sample_rate=rate,
        channels=channels,
        subtype=subtype,
        peak_db=level if np.isfinite(level) else None,
    )
