"""Render the set "music": parts in several processes, kept as they are finished, then put together to a clip cache."""

from __future__ import annotations

import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from sa3_mlx.common.files.atomic import locked, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_torch.train.data.clip_cache import ClipSet, Draft, check_place, write_clips
from sa3_torch.train.data.recordings import hash_file

from .parts import PartJob, read_part, render_part
from .samples import find_samples
from .scores import check_fluidsynth

RECIPE = "sa3 music 1"  # changes when clips of the same seed do
PART_HOURS = 0.2  # a little less than parts have on average
HELD_OUT_SHARE, HELD_OUT_LEAST = 1 / 24, 3  # parts for validation, and for the test


def jobs(*, hours: float, seed: int, font: Path, samples: Path, test: bool) -> list[PartJob]:
    """List the parts of about ``hours`` hours of training clips and what is held out of them, or of the test set."""
    train = math.ceil(hours / PART_HOURS)
    held = max(HELD_OUT_LEAST, math.ceil(train * HELD_OUT_SHARE))
    counts = {"test": held} if test else {"train": train, "validation": held}
    return [
        PartJob(seed=seed, split=split, number=number, font=font, samples=samples)
        for split, count in counts.items()
        for number in (*range(count), None)
    ]


def render_music(
    folder: Path,
    *,
    hours: float,
    seed: int,
    font: Path,
    samples: Path,
    test: bool = False,
    processes: int | None = None,
    advance: Callable[[int, int], None] = lambda _done, _all: None,
    overwrite: bool = False,
) -> ClipSet:
    """Render the set into a cache folder and open it; parts lie in ``FOLDER.parts`` until it is complete.

    A run that was stopped goes on with the parts that are there; more ``hours`` only add parts. ``advance`` gets the
    number of finished parts and of all. Raises FileNotFoundError when fluidsynth, the font or the samples are
    missing, RuntimeError when rendering fails, ValueError as ``check_place``, or for parts of another recipe.
    """
    check_place(folder, overwrite=overwrite)
    check_fluidsynth(font)
    find_samples(samples)
    about = {
        "recipe": RECIPE,
        "seed": seed,
        "font": font.name,
        "font_sha256": hash_file(font).removeprefix("sha256:"),
        "test": test,
    }
    todo = jobs(hours=hours, seed=seed, font=font, samples=samples, test=test)
    parts = folder.with_name(f"{folder.name}.parts")
    parts.mkdir(parents=True, exist_ok=True)
    with locked(parts):
        _check_parts(parts, about)
        for done, _ in enumerate(_rendered(todo, parts, processes or os.cpu_count() or 1), 1):
            advance(done, len(todo))
        made = write_clips(folder, _read(todo, parts), channels=2, about=about | {"hours": hours}, overwrite=overwrite)
    shutil.rmtree(parts)
    return made


def _check_parts(parts: Path, about: dict[str, object]) -> None:
    path = parts / "recipe.json"
    if path.is_file() and read_object(path) != about:
        raise ValueError(f"{parts}: holds parts of another set; remove the folder, or choose another place")
    write_json(path, about)


def _rendered(todo: list[PartJob], parts: Path, processes: int) -> Iterator[float]:
    """Yield the seconds of each part as it is finished."""
    if processes == 1:
        for job in todo:
            yield render_part(job, parts)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_end_quietly) as pool:
        running = [pool.submit(render_part, job, parts) for job in todo]
        try:
            for each in as_completed(running):
                yield each.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_quietly() -> None:
    """Let a process of the pool end at once when Ctrl-C is pressed; the parent says what there is to say."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read(todo: list[PartJob], parts: Path) -> Iterator[Draft]:
    for job in todo:
        yield from read_part(job, parts)
