"""A user's folder of recordings -> the clip cache that training reads (clips.py).

Every ``clip.wav``, ``.flac`` or ``.ogg`` (recursively) may have a sidecar ``clip.txt``: one caption per line, the
lines being alternatives. Audio is resampled to 44.1 kHz stereo. Nothing is skipped silently: the report names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sa3_mlx.spec.audio import read_audio
from sa3_torch.train.clips import SAMPLE_RATE, ClipSet, Draft, write_clips

SUFFIXES = (".wav", ".flac", ".ogg")
TOLERATED = 0.01  # the share of files that may be unreadable, and that may lack a caption where one is needed
VALIDATION_SHARE = 0.1


@dataclass
class ImportReport:
    """What happened to each file; the lists hold "path: reason" or the path alone."""

    files: int = 0
    imported: int = 0
    seconds: float = 0.0
    unreadable: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.imported} of {self.files} files imported, {self.seconds / 60:.1f} min"]
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


def import_folder(folder: Path, out: Path, *, captions_required: bool) -> tuple[ClipSet, ImportReport]:
    """Import ``folder`` into the cache folder ``out``.

    ``captions_required``: files without a caption are skipped (for models with text); otherwise they are imported
    without one (for the autoencoder). Unreadable files are counted, named and skipped. Raises ValueError with the
    list when more than 1 % of the files are unreadable or, where required, without a caption, or when nothing is
    left; then ``out`` holds no complete cache. The split is by the hash of the file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"no audio files ({', '.join(SUFFIXES)}) in {folder}")
    report = ImportReport(files=len(files))
    about = {"recipe": "sa3_torch.train.user_folder", "files": len(files), "captions_required": captions_required}
    try:
        clips = write_clips(out, _drafts(folder, files, captions_required, report), channels=2, about=about)
        _refuse_losses(report, captions_required)
    except ValueError:
        for name in ("index.json", "audio.npy"):
            (out / name).unlink(missing_ok=True)
        _refuse_losses(report, captions_required)
        raise
    return clips, report


def _refuse_losses(report: ImportReport, captions_required: bool) -> None:
    for paths, what, matters in (
        (report.unreadable, "unreadable", True),
        (report.without_caption, "without a caption (a .txt file of the same name)", captions_required),
    ):
        if matters and len(paths) > TOLERATED * report.files:
            listing = "; ".join(paths[:20]) + ("; ..." if len(paths) > 20 else "")
            raise ValueError(f"{len(paths)} of {report.files} files are {what}, more than 1 %: {listing}")


def _drafts(folder: Path, files: list[Path], captions_required: bool, report: ImportReport) -> Iterator[Draft]:
    seen: set[bytes] = set()
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            audio = read_audio(path, SAMPLE_RATE, 2)  # (samples, 2)
            captions = _captions(path)
        except (ValueError, OSError) as error:
            report.unreadable.append(f"{name}: {error}")
            continue
        digest = hashlib.sha256(path.read_bytes()).digest()
        if digest in seen:
            report.duplicates.append(name)
            continue
        seen.add(digest)
        if np.abs(audio).max() < 1e-4:
            report.silent.append(name)
            continue
        if not captions:
            report.without_caption.append(name)
            if captions_required:
                continue
        report.imported += 1
        report.seconds += len(audio) / SAMPLE_RATE
        yield Draft(
            id=name, captions=captions, kind="user", label="user", instrument=None, midi=None,
            split="validation" if digest[0] < 256 * VALIDATION_SHARE else "train",
            audio=audio,
        )  # fmt: skip


def _captions(path: Path) -> tuple[str, ...]:
    sidecar = path.with_suffix(".txt")
    if not sidecar.is_file():
        return ()
    lines = (line.strip() for line in sidecar.read_text(encoding="utf-8").splitlines())
    return tuple(line for line in lines if line)
