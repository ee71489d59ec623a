"""Write WAV headers and samples, and read back their tags.

libsndfile cannot do two things that provenance needs: it reads back no WAV comment of more than 2 kB, and it stamps
float files with the time of day, so that equal audio gives different files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

Subtype = Literal["pcm16", "pcm24", "float", "mp3", "vorbis", "opus", "aac"]

_BITS = {"pcm16": 16, "pcm24": 24, "float": 32}
_FORMAT_PCM, _FORMAT_FLOAT = 1, 3
_MAX_LIST_BYTES = 1 << 24  # of a chunk of tags, whatever its header says


def quantise(audio: NDArray[np.float32], bits: int) -> NDArray[np.int32]:
    """Return integers of ``bits`` for samples with full scale 1.0, clipped.

    Samples read from a file of at most these bits come back as they were: reading divides by the same power of two.
    """
    scale = 2.0 ** (bits - 1)
    return np.clip(np.rint(audio.astype(np.float64) * scale), -scale, scale - 1).astype(np.int32)


def sample_bytes(audio: NDArray[np.float32], subtype: Subtype) -> bytes:
    """Return audio (n, channels) as it stands in the data chunk of a WAV file."""
    if subtype == "float":
        return audio.astype("<f4").tobytes()
    if subtype == "pcm16":
        return quantise(audio, 16).astype("<i2").tobytes()
    words = quantise(audio, 24).astype("<i4")
    return words.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()


def wav_header(samples: int, channels: int, sample_rate: int, subtype: Subtype, comment: str) -> bytes:
    """Return all that stands before the samples of a RIFF/WAVE file; ``comment`` goes to LIST/INFO/ICMT as UTF-8.

    The length is known before the first sample, so that a file can be sent on while it is made.
    Raises ValueError for audio beyond the 4 GiB of a WAV file and for samples that it cannot hold.
    """
    if subtype not in _BITS:
        raise ValueError(f"wav cannot hold {subtype!r}; allowed: {', '.join(_BITS)}")
    bits = _BITS[subtype]
    block = channels * bits // 8
    code = _FORMAT_FLOAT if subtype == "float" else _FORMAT_PCM
    chunks = [_chunk(b"fmt ", struct.pack("<HHIIHH", code, channels, sample_rate, sample_rate * block, block, bits))]
    if subtype == "float":
        chunks.append(_chunk(b"fact", struct.pack("<I", samples)))
    if comment:
        chunks.append(_chunk(b"LIST", b"INFO" + _chunk(b"ICMT", comment.encode() + b"\0")))
    data = samples * block
    size = 4 + sum(len(chunk) for chunk in chunks) + 8 + data + data % 2
    if size >= 2**32:
        raise ValueError(f"audio of {samples} samples does not fit into a WAV file (4 GiB); write flac")
    return b"".join([b"RIFF", struct.pack("<I", size), b"WAVE", *chunks, b"data", struct.pack("<I", data)])


def read_wav_comment(path: str | Path) -> str:
    """Return the ICMT tag of a WAV file, "" without one or for a file of another kind."""
    with Path(path).open("rb") as file:
        for name, size in _chunks(file):
            if name == b"LIST":
                body = file.read(min(size, _MAX_LIST_BYTES))
                for tag, value in _subchunks(body[4:]):
                    if body[:4] == b"INFO" and tag == b"ICMT":
                        return value.rstrip(b"\0").decode("utf-8", errors="replace")
    return ""


def map_wav(path: Path) -> NDArray[np.float32]:
    """Return the samples (L, channels) of a float WAV that we wrote, read-only; the system reads what is looked at.

    Raises ValueError for any other file.
    """
    with path.open("rb") as file:
        channels = 0
        for name, size in _chunks(file):
            if name == b"fmt " and size == 16:
                code, channels, *_, bits = struct.unpack("<HHIIHH", file.read(16))
                channels = channels if (code, bits) == (_FORMAT_FLOAT, 32) else 0
            elif name == b"data" and channels:
                shape = (size // (4 * channels), channels)
                return np.memmap(file, np.dtype("<f4"), "r", file.tell(), shape).view(np.ndarray)
    raise ValueError(f"{path}: is no float WAV of ours")


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Yield name and size of every chunk of a WAV, with the file at its first byte; nothing of another file."""
    head = file.read(12)
    if head[:4] != b"RIFF" or head[8:] != b"WAVE":
        return
    while len(header := file.read(8)) == 8:
        size = struct.unpack("<I", header[4:])[0]
        start = file.tell()
        yield header[:4], size
        file.seek(start + size + size % 2)


def _chunk(name: bytes, body: bytes) -> bytes:
    return name + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)


def _subchunks(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position + 8 <= len(body):
        size = struct.unpack("<I", body[position + 4 : position + 8])[0]
        yield body[position : position + 4], body[position + 8 : position + 8 + size]
        position += 8 + size + size % 2
