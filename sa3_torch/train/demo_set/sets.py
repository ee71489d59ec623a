"""Know the sets of sounds by name: "first", which the shipped demo was trained on, and "music"."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm

from sa3_mlx.common.files.atomic import new_file
from sa3_torch.train.data.clip_cache import ClipSet

from . import vocabulary
from .music import words
from .music.render import render_music
from .music.samples import DEFAULT_SAMPLES
from .sounds import DEFAULT_FONT, render_demo_set

MUSIC_HOURS = 12.0


def build_tokenizer(name: str) -> Tokenizer:
    """Build the tokenizer of a set, which knows the words of its captions."""
    return {"first": vocabulary.build_tokenizer, "music": words.build_tokenizer}[name]()


def save_tokenizer(name: str, path: Path) -> None:
    """Write ``tokenizer.json`` of a set as a whole."""
    with new_file(path) as partial:
        build_tokenizer(name).save(str(partial))


def render_set(
    name: str,
    folder: Path,
    *,
    hours: float | None,
    test: bool,
    seed: int,
    samples: Path | None,
    processes: int | None,
    overwrite: bool,
) -> ClipSet:
    """Render a set into a cache folder, with a bar of progress, and open it.

    ``hours``, ``test`` and ``processes`` are of "music" alone. Raises ValueError for what a set does not have, and as
    ``render_demo_set`` and ``render_music``.
    """
    if name == "first":
        if hours is not None or test or processes is not None:
            raise ValueError("--hours, --test and --processes are for --set music: the set first has one size")
        return render_demo_set(
            folder,
            seed=seed,
            font=DEFAULT_FONT,
            samples_folder=samples,
            progress=lambda drafts: tqdm(drafts, desc="render", unit="clip", disable=None, delay=1),
            overwrite=overwrite,
        )
    with tqdm(desc="render", unit="part", disable=None, delay=1) as bar:

        def advance(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        return render_music(
            folder,
            hours=hours or MUSIC_HOURS,
            seed=seed,
            font=DEFAULT_FONT,
            samples=samples or DEFAULT_SAMPLES,
            test=test,
            processes=processes,
            advance=advance,
            overwrite=overwrite,
        )
