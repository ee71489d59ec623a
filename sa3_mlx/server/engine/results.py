"""Turn what a run made into files and records."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from sa3_mlx.cli.output.provenance import Provenance
from sa3_mlx.common.files.audio import peak_db, write_audio
from sa3_mlx.common.generation.events import Generation
from sa3_mlx.server.store.pool import Pool
from sa3_mlx.server.store.records import KEPT, SoundRecord
from sa3_mlx.server.store.store import new_id

from .queue import Job

_NAME_LETTERS = 60


@contextmanager
def written(
    pool: Pool, job: Job, made: Provenance, result: Generation, first: int, count: int
) -> Iterator[list[tuple[Path, SoundRecord]]]:
    """Write the ``count`` sounds of one job of a batch, its clips from ``first`` on; what nobody takes is removed.

    Tags hold the whole batch, which sets the rounding: ``sa3 rerun`` makes the same bits of it.
    """
    with ExitStack() as stack:
        found = []
        for item in range(count):
            path = stack.enter_context(pool.new(".wav"))
            own = replace(made, item=first + item)
            audio = result.audio[first + item]
            pool.check_room(audio.nbytes)
            write_audio(path, audio, result.sample_rate, KEPT, comment=own.to_json())
            seams = [asdict(seam) for seam in result.seams[first + item]] if result.seams else []
            record = record_of(job, own, audio.shape, peak_db(audio), result.sample_rate, seams)
            found.append((path, replace(record, item=item)))
        yield found


def record_of(
    job: Job,
    made: Provenance,
    shape: tuple[int, ...],
    level: float,
    sample_rate: int,
    seams: Sequence[dict[str, object]] = (),
) -> SoundRecord:
    """Describe a sound of ``shape`` (samples, channels) whose peak has a ``level`` in dB."""
    clip, (samples, channels) = made.clip, shape
    return SoundRecord(
        id=new_id(),
        created=time.time(),
        kind=job.order.kind,
        name=sound_name(clip.prompt or job.order.kind, clip.seed, clip.toward),
        file="",
        seconds=samples / sample_rate,
        samples=samples,
        sample_rate=sample_rate,
        channels=channels,
        subtype=KEPT,
        job=job.id,
        parent=job.order.near or job.order.source,
        prompt=clip.prompt,
        seed=clip.seed,
        model=job.order.model,
        regions=[list(region) for region in _regions(made)],
        seams=list(seams),
        peak_db=level if np.isfinite(level) else None,
        provenance=made.to_dict(),
    )


def _regions(made: Provenance) -> list[tuple[float, float]]:
    """Return the seconds that were made anew."""
    given = made.request.inpaint
    one = given[made.item] if isinstance(given, tuple) else given
    return [] if one is None else list(one.spans)


def sound_name(text: str, seed: int | None = None, toward: int | None = None) -> str:
    """Return a name for people and for files: letters, digits and few signs; with the seeds of its noise."""
    plain = re.sub(r"[^\w .,()+#-]+", " ", text).strip(" .-")[:_NAME_LETTERS].strip() or "sound"
    return plain if seed is None else f"{plain} {seed}" if toward is None else f"{plain} {seed}-{toward}"
