"""A user's folder of recordings -> the clip cache that training reads (clips.py).

Audio is resampled to 44.1 kHz stereo block by block, so that a recording may last hours. Files and sidecars are those
of recordings.py. Nothing is skipped silently: the report names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sa3_mlx.common.files.audio import read_blocks

from .clip_cache import SAMPLE_RATE, ClipSet, Draft, check_place, write_clips
from .recordings import TOLERATED, check_apart, find_audio, inspect, read_sidecar, refuse_failures

VALIDATION_SHARE = 0.1


@dataclass
class ImportReport:
    """Report on each file; the lists hold "path: reason" or only the path."""

    files: int = 0
    imported: int = 0
    held_out: int = 0  # of the imported ones
    seconds: float = 0.0
    unreadable: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.imported} of {self.files} files imported, {self.seconds / 60:.1f} min"]
        if not self.held_out:  # by chance: half of all folders of seven
            lines.append("none is held out (one in ten is, by its hash), which most trainings need: add recordings")
        for title, paths in (
            ("unreadable, skipped", self.unreadable),
            ("silent, skipped", self.silent),
            ("the same audio as another file, skipped", self.duplicates),
            ("without caption", self.without_caption),
        ):
            if paths:
                lines.append(f"{len(paths)} {title}:")
                lines += [f"  {path}" for path in paths]
        return "\n".join(lines)


def split_of(digest: str) -> str:
    """Return the split of a file by its hash "sha256:...": one in ten is held out; "train" without a hash."""
    found = re.fullmatch(r"sha256:([0-9a-f]{2})[0-9a-f]{62}", digest)
    return "validation" if found and int(found[1], 16) < 256 * VALIDATION_SHARE else "train"


def import_folder(
    folder: Path,
    out: Path,
    *,
    captions_required: bool,
    tolerated: float = TOLERATED,
    progress: Callable[[list[Path]], Iterable[Path]] = iter,
    overwrite: bool = False,
) -> tuple[ClipSet, ImportReport]:
    """Import ``folder`` into the cache folder ``out``; with ``overwrite`` a cache that is there makes room.

    ``progress`` goes through the files, with a bar for example.
    ``captions_required``: files without a caption are skipped (for models with text); otherwise they are imported
    without one (for the autoencoder). Unreadable files, and files with a sidecar that is not valid, are counted, named
    and skipped. Raises ValueError with the list when more than a share ``tolerated`` of the files are unreadable or
    more than 1 %, where required, without a caption, when nothing is left, and as ``check_place``; what ``out`` held
    before stays then. The split is by the hash of the file.
    """
    files = find_audio(folder)
    check_apart(folder, out)
    check_place(out, overwrite=overwrite)
    report = ImportReport(files=len(files))
    about = {"recipe": "sa3_torch.train.user_folder", "files": len(files), "captions_required": captions_required}

    def drafts() -> Iterator[Draft]:
        yield from _drafts(folder, progress(files), captions_required, report)
        refuse_failures(report.unreadable, report.files, "unreadable", tolerated)
        if captions_required:
            what = "without a caption (a .txt or .json file of the same name)"
            refuse_failures(report.without_caption, report.files, what)

    return write_clips(out, drafts(), channels=2, about=about, overwrite=overwrite), report


def _drafts(folder: Path, files: Iterable[Path], captions_required: bool, report: ImportReport) -> Iterator[Draft]:
    seen: set[str] = set()
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            facts, sidecar = inspect(path), read_sidecar(path)
        except (ValueError, OSError) as error:
            report.unreadable.append(f"{name}: {error}")
            continue
        if facts.digest in seen:
            report.duplicates.append(name)
            continue
        seen.add(facts.digest)
        if facts.silent:
            report.silent.append(name)
            continue
        if not sidecar.captions:
            report.without_caption.append(name)
            if captions_required:
                continue
        report.imported += 1
        report.seconds += facts.seconds
        split = split_of(facts.digest)
        report.held_out += split == "validation"
        yield Draft(
            id=name,
            captions=sidecar.captions,
            kind="user",
            label="user",
            instrument=None,
            midi=None,
            split=split,
            audio=read_blocks(path, SAMPLE_RATE, 2),
            seconds=sidecar.seconds_total,
            licence=sidecar.licence,
            source=facts.digest,
            fields=sidecar.fields,
        )
