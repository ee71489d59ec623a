"""Headers that say nothing, or what cannot be, and damaged data: read to their end, or refused in our words."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from sa3_mlx.common.files.audio import read_audio, read_blocks, read_tags, write_audio
from sa3_mlx.common.files.audio_file import BLOCK_SAMPLES


def _audio(samples: int = 1001, channels: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(samples).uniform(-0.95, 0.95, (samples, channels)).astype(np.float32)


def _stream(path: Path, size: int) -> None:
    """Make a WAV look as if it was written to a pipe."""
    data = bytearray(path.read_bytes())
    data[4:8], data[40:44] = struct.pack("<I", min(size + 36, 2**32 - 1)), struct.pack("<I", size)
    path.write_bytes(data)


def _forget_length(path: Path) -> None:
    """Take the 36 bits of the length out of a FLAC's first block."""
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)


@pytest.mark.parametrize("size", [0x7FFFF000, 0x7FFFF000 - 44, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 40])
def test_a_wav_that_gives_a_streams_length_is_read_to_its_end(tmp_path: Path, size: int):
    write_audio(tmp_path / "a.wav", _audio(300), 44_100)
    whole = read_audio(tmp_path / "a.wav", 44_100, 2)
    _stream(tmp_path / "a.wav", size)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", 44_100, 2), whole)


def test_a_flac_of_unknown_length_is_read_to_its_end_and_its_damage_is_named(tmp_path: Path):
    path = tmp_path / "a.flac"
    write_audio(path, _audio(20_001), 44_100)
    whole, half = read_audio(path, 44_100, 2), read_audio(path, 22_050, 2)
    _forget_length(path)
    np.testing.assert_array_equal(read_audio(path, 44_100, 2), whole)
    np.testing.assert_array_equal(read_audio(path, 22_050, 2), half)
    assert read_tags(path) == ""
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(ValueError, match=r"a\.flac: cannot be read as audio \(its data is damaged\)"):
        read_audio(path, 44_100, 2)


@pytest.mark.parametrize(("program", "container"), [("ffmpeg", "wav"), ("ffmpeg", "flac"), ("sox", "wav")])
def test_what_programs_write_to_a_pipe_is_read(tmp_path: Path, program: str, container: str):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    write_audio(tmp_path / "a.wav", _audio(30_000), 44_100)
    words = {
        "ffmpeg": ["-v", "error", "-i", str(tmp_path / "a.wav"), "-f", container, "-"],
        "sox": [str(tmp_path / "a.wav"), "-t", container, "-"],
    }
    done = subprocess.run([program, *words[program]], capture_output=True, check=True)
    (tmp_path / f"b.{container}").write_bytes(done.stdout)
    piped = read_audio(tmp_path / f"b.{container}", 44_100, 2)
    np.testing.assert_array_equal(piped, read_audio(tmp_path / "a.wav", 44_100, 2))


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (24, "<I", 1, "1 Hz; 1,000 to 768,000"),
        (24, "<I", 10**9, "1,000,000,000 Hz; 1,000 to 768,000"),
        (22, "<H", 200, "200 channels; 1 to 32"),
    ],
)
def test_impossible_headers_are_refused_before_anything_is_read(
    tmp_path: Path, offset: int, form: str, value: int, message: str, monkeypatch: pytest.MonkeyPatch
):
    write_audio(tmp_path / "a.wav", _audio(5000), 44_100)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    struct.pack_into(form, data, offset, value)
    if form == "<H":  # the size of a frame goes with the channels
        struct.pack_into("<H", data, 32, 2 * value)
    (tmp_path / "a.wav").write_bytes(data)
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    with pytest.raises(ValueError, match=message) as caught:
        read_audio(tmp_path / "a.wav", 44_100, 2)
    assert str(caught.value).startswith(str(tmp_path / "a.wav"))


def test_the_words_of_the_library_do_not_reach_the_user(tmp_path: Path):
    for name, message in {
        "text.wav": "its format is not known: wav, flac",
        "cut.wav": "format is not|header is",
    }.items():
        (tmp_path / name).write_bytes(b"RIFF" if name == "cut.wav" else b"this is not audio" * 9)
        with pytest.raises(ValueError, match=message):
            read_audio(tmp_path / name, 44_100, 2)


def test_pieces_are_bounded_at_either_rate(tmp_path: Path):
    """A piece of a low rate does not become dozens of times as much at a high one; where it is cut changes no bit."""
    write_audio(tmp_path / "low.wav", _audio(30_000), 1000, "float")
    pieces = list(read_blocks(tmp_path / "low.wav", 44_100, 2))
    assert len(pieces) > 4 and max(map(len, pieces)) < 1.5 * BLOCK_SAMPLES
    others = np.concatenate(list(read_blocks(tmp_path / "low.wav", 44_100, 2, 1 << 22)))
    np.testing.assert_array_equal(np.concatenate(pieces), others)


def test_damaged_mp3_frames_are_refused_without_foreign_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """libmpg123 would write notes about every frame to the terminal."""
    write_audio(tmp_path / "a.mp3", _audio(20_000), 44_100, "mp3")
    data = bytearray((tmp_path / "a.mp3").read_bytes())
    for place in range(400, len(data) - 40, 300):
        data[place : place + 30] = bytes(30)
    (tmp_path / "a.mp3").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.mp3: (cannot be read as audio|the file is truncated)"):
        read_audio(tmp_path / "a.mp3", 44_100, 2)
    assert capfd.readouterr() == ("", "")


def test_a_bad_sample_is_counted_from_the_start_of_the_file(tmp_path: Path):
    audio = _audio(5000)
    audio[4321] = np.nan
    soundfile.write(tmp_path / "a.wav", audio, 44_100, "FLOAT")
    with pytest.raises(ValueError, match="sample 4321 is not a finite number"):
        list(read_blocks(tmp_path / "a.wav", 44_100, 2, 1000))
