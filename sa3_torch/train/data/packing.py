"""Pack the recordings of a folder into WebDataset shards, whole or cut into pieces [T11e].

A recording lies in one shard with all its pieces, so whatever holds out shards holds out recordings.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.common.files.atomic import new_folder
from sa3_mlx.common.files.audio_file import Audio, open_audio_file
from sa3_mlx.common.files.encoders import open_encoder
from sa3_mlx.common.files.wav import Subtype

from .recordings import (
    ATTRIBUTION,
    TOLERATED,
    Credit,
    Facts,
    check_apart,
    check_empty,
    find_audio,
    hash_file,
    inspect,
    read_sidecar,
    refuse_failures,
    write_attribution,
)
from .shards import PIECE, Piece, Shard, ShardIndex, library, open_index, write_index

OVERLAP_SECONDS = 5.0  # longer than the crops of all presets
# libsndfile's names of what FLAC holds as it is; what a lossy format decodes to is rounded to 16 bits
_EXACT: dict[str, Subtype] = dict.fromkeys(("PCM_S8", "PCM_U8", "PCM_16", "ULAW", "ALAW"), "pcm16")
_EXACT |= {"PCM_24": "pcm24", **dict.fromkeys(("PCM_32", "FLOAT", "DOUBLE"), "float")}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Cut recordings into equal pieces, one of which begins every ``seconds`` at most; each goes on for ``overlap``
    seconds in which the next one has begun, so that crops up to that length lie anywhere in a recording."""

    seconds: float
    overlap: float = OVERLAP_SECONDS

    def __post_init__(self) -> None:
        if not (1 <= self.seconds <= 3600 and 0 <= self.overlap <= 3600):
            raise ValueError(
                f"pieces of {self.seconds:g} s that overlap by {self.overlap:g} s: 1 to 3600 and 0 to 3600 are allowed"
            )

    def edges(self, samples: int, rate: int) -> list[int]:
        """Return where the pieces of a recording begin, and where the overlap of the last one would."""
        rest = samples - round(self.overlap * rate)
        count = max(1, math.ceil(rest / (self.seconds * rate)))
        return [rest * number // count for number in range(count + 1)]


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """A sample for the library's writer; ``begins``: it is the first of its recording."""

    sample: dict[str, Any]
    begins: bool


def write_shards(
    folder: Path,
    out: Path,
    *,
    shard_bytes: int,
    captions_required: bool,
    tolerated: float = TOLERATED,
    cut: Cut | None = None,
    progress: Callable[[list[Path]], Iterable[Path]] = iter,
) -> ShardIndex:
    """Pack the recordings of ``folder`` into shards of about ``shard_bytes``, with index and attribution list.

    Equal files give equal shards. ``progress`` goes through the files, with a bar for example. Unreadable files and,
    where required, those without a caption are left out and named in the index; raises ValueError with the list when
    more than a share ``tolerated`` of the files are unreadable or more than 1 % without a caption, or when nothing is
    left; then nothing is left in ``out``, either.
    """
    wds, files = library(), find_audio(folder)
    check_apart(folder, out)
    check_empty(out)
    shards: list[Shard] = []
    credits: list[Credit] = []
    unreadable, without_caption = list[str](), list[str]()
    wanted = without_caption if captions_required else None
    pending = _samples(folder, progress(files), cut, unreadable, wanted, credits)
    with new_folder(out) as partial:
        packed = next(pending, None)
        while packed is not None:
            path, count, size = partial / f"audio-{len(shards):06d}.tar", 0, 0
            with wds.TarWriter(str(path), encoder=False, mtime=0, user="", group="", compress=False) as writer:
                while packed is not None and (not count or size < shard_bytes or not packed.begins):
                    size += writer.write(packed.sample)
                    count += 1
                    packed = next(pending, None)
            digest = hash_file(path)
            shards.append(Shard(name=path.name, samples=count, bytes=path.stat().st_size, hash=digest))
        refuse_failures(unreadable, len(files), "unreadable", tolerated)
        refuse_failures(without_caption, len(files), "without a caption")
        if not shards:
            raise ValueError(f"nothing to pack in {folder}")
        left_out = {"unreadable": unreadable, "without a caption": without_caption}
        write_index(partial / "index.json", shards, left_out, None if cut is None else cut.overlap)
        write_attribution(partial / ATTRIBUTION, credits)
    return open_index(str(out))


def _samples(
    folder: Path,
    files: Iterable[Path],
    cut: Cut | None,
    unreadable: list[str],
    without_caption: list[str] | None,
    credits: list[Credit],
) -> Iterator[_Packed]:
    """Yield what is packed, and list what is not; ``without_caption`` None: captions are not needed."""
    for number, path in enumerate(files):
        name = path.relative_to(folder).as_posix()
        try:
            facts, sidecar = inspect(path), read_sidecar(path)
        except (ValueError, OSError) as error:
            unreadable.append(f"{name}: {error}")
            continue
        if without_caption is not None and not sidecar.captions:
            without_caption.append(name)
            continue
        about = {
            **sidecar.fields,
            "id": name,
            "source": facts.digest,
            "licence": sidecar.licence,
            "prompt": list(sidecar.captions),
            "seconds_start": sidecar.seconds_start,
            "seconds_total": sidecar.seconds_total or facts.seconds,
        }
        credits.append(Credit(id=name, licence=sidecar.licence, source=facts.digest, fields=sidecar.fields))
        edges = [] if cut is None else cut.edges(facts.samples, facts.sample_rate)
        if len(edges) <= 2:
            sample = {"__key__": f"{number:08d}", path.suffix[1:].lower(): path.read_bytes(), "json": _json(about)}
            yield _Packed(sample=sample, begins=True)
            continue
        for piece, start, (kind, data) in _pieces(path, facts, edges):
            place = {"seconds_start": sidecar.seconds_start + start, PIECE: asdict(piece)}
            sample = {"__key__": f"{number:08d}-{piece.number:06d}", kind: data, "json": _json({**about, **place})}
            yield _Packed(sample=sample, begins=piece.number == 0)


def _json(about: dict[str, Any]) -> bytes:
    return json.dumps(about, sort_keys=True, ensure_ascii=False).encode()


def _pieces(path: Path, facts: Facts, edges: list[int]) -> Iterator[tuple[Piece, float, tuple[str, bytes]]]:
    """Yield the pieces of a recording with the second at which each begins; memory holds one of them."""
    rate, overlap = facts.sample_rate, facts.samples - edges[-1]
    with open_audio_file(path) as file:
        held = np.zeros((0, facts.channels), np.float32)
        subtype = _EXACT.get(file.subtype, "pcm16")
        for number, (start, stop) in enumerate(pairwise(edges)):
            audio = np.concatenate([held, file.take(stop + overlap - start - len(held))])
            if len(audio) != stop + overlap - start:
                raise ValueError(f"{path}: has changed while it was read; run the command again")
            piece = Piece(number=number, of=len(edges) - 1, seconds=(stop - start) / rate)
            yield piece, start / rate, _encoded(audio, rate, subtype)
            held = audio[stop - start :]


def _encoded(audio: Audio, rate: int, subtype: Subtype) -> tuple[str, bytes]:
    """Return the kind and the bytes of a file with these samples: FLAC, or WAV in float for what FLAC cannot hold."""
    if subtype != "float":
        try:
            return "flac", _file(".flac", audio, rate, subtype)
        except ValueError:  # too many channels, or another rate
            pass
    return "wav", _file(".wav", audio, rate, "float")


def _file(kind: str, audio: Audio, rate: int, subtype: Subtype) -> bytes:
    written = io.BytesIO()
    encoder = open_encoder(Path(f"piece{kind}"), written, kind, subtype, len(audio), audio.shape[1], rate, "")
    encoder.write(audio)
    encoder.close()
    return written.getvalue()
