"""What libsndfile does not know is written and read through ffmpeg, whole, with its tags, and under limits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_mlx.common.files import ffmpeg
from sa3_mlx.common.files.audio import check_output, read_audio, read_blocks, read_tags, write_audio
from sa3_mlx.common.files.audio_file import open_audio_file
from sa3_mlx.common.files.encoders import check_rate, usual_rate
from sa3_mlx.common.files.wav import Subtype
from tests.support.command import tone

needs_ffmpeg = pytest.mark.skipif(not ffmpeg.available(), reason="needs ffmpeg")
COMMENT = json.dumps({"prompt": "größe 音 = ; # \\ \n " + "long " * 8000, "seed": 2**63 - 1}, ensure_ascii=False)
OPUS_COMMENT = COMMENT[:40_000]
LOSSY: list[tuple[str, Subtype]] = [
    ("a.mp3", "mp3"),
    ("a.ogg", "vorbis"),
    ("a.opus", "opus"),
    ("b.ogg", "opus"),
    ("a.m4a", "aac"),
]


def encode(path: Path, *options: str, seconds: float = 1.0, rate: int = 44_100) -> Path:
    """Have ffmpeg encode a sine."""
    source = ["-f", "lavfi", "-i", f"sine=440:d={seconds}:r={rate}", "-ac", "2"]
    subprocess.run(["ffmpeg", "-v", "error", "-y", *source, *options, path], check=True)
    return path


@pytest.mark.parametrize(("name", "subtype"), LOSSY)
@pytest.mark.parametrize("samples", [1, 1001, 48_000, 100_003])
def test_encoded_files_have_their_length_and_tags(tmp_path: Path, name: str, subtype: Subtype, samples: int):
    if subtype == "aac" and not ffmpeg.available():
        pytest.skip("needs ffmpeg")
    audio, comment = tone(3, rate=48_000)[:samples], OPUS_COMMENT if subtype == "opus" else COMMENT
    write_audio(tmp_path / name, audio, 48_000, subtype, comment=comment)
    back = read_audio(tmp_path / name, 48_000, 2)
    assert back.shape == audio.shape
    expected = comment if subtype != "mp3" else json.dumps(json.loads(comment))
    assert json.loads(read_tags(tmp_path / name)) == json.loads(expected) if subtype != "opus" else True
    assert subtype == "mp3" or read_tags(tmp_path / name) == comment
    if samples > 48_000:  # no shift: a sample to the side is 0.03
        middle = slice(10_000, 90_000)
        assert np.sqrt(np.mean((back[middle] - audio[middle]) ** 2)) < 0.012  # measured 0.0004 to 0.006


@needs_ffmpeg
@pytest.mark.parametrize("rate", [8000, 44_100, 96_000])
def test_m4a_is_the_same_each_time_at_any_of_its_rates(tmp_path: Path, rate: int):
    audio = tone(0.5, rate=rate)
    for name in ("a.m4a", "b.m4a"):
        write_audio(tmp_path / name, audio, rate, "aac", comment="made")
    assert (tmp_path / "a.m4a").read_bytes() == (tmp_path / "b.m4a").read_bytes()
    with open_audio_file(tmp_path / "a.m4a") as file:
        assert (file.samplerate, file.channels, file.samples, file.subtype) == (rate, 2, len(audio), "AAC")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.m4a", "b.m4a"]


INPUTS = {
    "a.m4a": ("-c:a", "alac"),
    "b.m4a": ("-c:a", "aac"),
    "a.mp4": ("-f", "lavfi", "-i", "testsrc=d=1", "-c:a", "aac"),
    "a.aac": ("-c:a", "aac"),
    "a.webm": ("-c:a", "libopus", "-ar", "48000"),
    "a.mkv": ("-c:a", "flac"),
    "a.wma": ("-c:a", "wmav2"),
    "a.wv": ("-c:a", "wavpack"),
    "a.tta": ("-c:a", "tta"),
    "a.ac3": ("-c:a", "ac3"),
}


@needs_ffmpeg
@pytest.mark.parametrize("name", INPUTS)
def test_what_ffmpeg_decodes_comes_in_at_any_rate(tmp_path: Path, name: str):
    try:
        path = encode(tmp_path / name, *INPUTS[name])
    except subprocess.CalledProcessError:
        pytest.skip("this ffmpeg does not encode it")
    audio = read_audio(path, 48_000, 2)
    assert 0 <= len(audio) - 48_000 <= 3000 or name == "a.wma", "ADTS and Matroska say no length: a frame may be added"
    assert np.abs(audio[5000:40_000]).max() == pytest.approx(0.125 / np.sqrt(2), rel=0.6)
    spectrum = np.abs(np.fft.rfft(audio[8000:40_000, 0] * np.hanning(32_000)))
    assert np.argmax(spectrum) * 48_000 / 32_000 == pytest.approx(440, abs=2)
    joined = np.concatenate(list(read_blocks(path, 48_000, 2, 1000)))
    np.testing.assert_array_equal(joined, audio)


@needs_ffmpeg
def test_of_a_long_file_as_much_is_decoded_as_is_taken(tmp_path: Path):
    path = encode(tmp_path / "a.m4a", "-c:a", "aac", seconds=60, rate=8000)
    with open_audio_file(path) as file:
        first = file.take(1000)
        process = file._decoder._process  # type: ignore[union-attr]
    assert first.shape == (1000, 2) and process.poll() is not None, "leaving ends the decoder"


@needs_ffmpeg
def test_damaged_files_are_one_line(tmp_path: Path):
    data = encode(tmp_path / "good.m4a", "-c:a", "aac").read_bytes()
    random = np.random.default_rng(0)
    start = data.index(b"mdat")
    hurt = bytearray(data)
    for place in random.integers(start + 100, start + 10_000, 60):
        hurt[place] = random.integers(256)
    cases = {
        "half.m4a": (data[: len(data) // 2], "cannot be read as audio"),
        "head.m4a": (data[:40], "cannot be read as audio"),
        "hurt.m4a": (bytes(hurt), "its data is damaged"),
        "zeros.m4a": (data[:12] + bytes(5000), "cannot be read as audio"),
        "text.webm": (b"\x1aE\xdf\xa3" + b"this is no film " * 100, "cannot be read as audio"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_audio(tmp_path / name, 44_100, 2)
        assert (
            str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
        )
    silent = tmp_path / "picture.mp4"
    subprocess.run(["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc=d=0.2", silent], check=True)
    with pytest.raises(ValueError, match="there is no sound in it"):
        read_audio(silent, 44_100, 2)


@needs_ffmpeg
def test_lists_of_other_files_and_addresses_are_not_followed(tmp_path: Path):
    """ffmpeg would open what a playlist names; it is given no such file, whatever its name ends with."""
    soundfile.write(tmp_path / "secret.wav", tone(0.1), 8000)
    lists = {
        "a.m3u8": f"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:1,\nfile://{tmp_path}/secret.wav\n",
        "b.m4a": f"ffconcat version 1.0\nfile '{tmp_path}/secret.wav'\n",
        "c.webm": "http://127.0.0.1:9/secret.wav\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        assert ffmpeg.demuxer(tmp_path / name) is None
        with pytest.raises(ValueError, match="its format is not known"):
            read_audio(tmp_path / name, 8000, 2)


@needs_ffmpeg
def test_names_that_a_program_would_take_for_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-i.m4a", "http:x.m4a", "a b;c$(d).m4a", "100%d.m4a", "pipe:1.m4a"):
        write_audio(name, tone(0.1), 8000, "aac", comment="how")
        assert len(read_audio(name, 8000, 2)) == 800 and read_tags(name) == "how"
    assert len(list(tmp_path.iterdir())) == 5


@needs_ffmpeg
def test_a_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = encode(tmp_path / "a.m4a", "-c:a", "aac")
    monkeypatch.setattr(ffmpeg, "SILENT_SECONDS", 0.2)
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("ffmpeg", "ffprobe"):
        (folder / name).write_text("#!/bin/sh\nexec sleep 600\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"cannot be read as audio \(ffmpeg did nothing for 0.2 s\)"):
        read_audio(path, 44_100, 2)
    with pytest.raises((ValueError, OSError), match="ffmpeg did nothing"):
        write_audio(tmp_path / "b.m4a", tone(8.0), 44_100, "aac")
    assert not (tmp_path / "b.m4a").exists()


@needs_ffmpeg
def test_a_program_that_fails_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, path = tmp_path / "bin", tmp_path / "b.m4a"
    folder.mkdir()
    path.write_bytes(b"old")
    for said, message in (
        ("No space left on device", "No space left on device.*free some space"),
        ("no", "ffmpeg failed"),
    ):
        for name in ("ffmpeg", "ffprobe"):
            (folder / name).write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        with pytest.raises(OSError, match=message) as caught:
            write_audio(path, tone(8.0), 44_100, "aac")
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["b.m4a", "bin"]


def test_without_ffmpeg_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.m4a").write_bytes(b"\0\0\0\x1cftypM4A \0\0\x02\0M4A isomiso2")
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(ValueError, match="it needs ffmpeg, which is not here; install ffmpeg 5 or later"):
        read_audio(tmp_path / "a.m4a", 44_100, 2)
    with pytest.raises(ValueError, match=r"b.m4a: .m4a is written by ffmpeg, which is not here; install ffmpeg"):
        check_output(tmp_path / "b.m4a", "aac", overwrite=False)


def test_rates_that_a_format_does_not_have():
    assert [usual_rate(kind, 44_100) for kind in ("pcm16", "mp3", "vorbis", "opus", "aac")] == [44_100] * 3 + [
        48_000,
        44_100,
    ]
    check_rate("opus", 24_000)
    for kind, rate in (("opus", 44_100), ("mp3", 96_000), ("aac", 192_000), ("vorbis", 300_000)):
        with pytest.raises(ValueError, match=f"sample rate is {rate} Hz: {kind} takes "):
            check_rate(kind, rate)  # type: ignore[arg-type]


def test_tags_beyond_what_opus_holds_are_refused(tmp_path: Path):
    write_audio(tmp_path / "a.opus", tone(0.1, rate=48_000), 48_000, "opus", comment="x" * 51_200)
    assert read_tags(tmp_path / "a.opus") == "x" * 51_200
    with pytest.raises(ValueError, match=r"tags of 51,201 bytes, opus holds 51,200; write .ogg with --format vorbis"):
        write_audio(tmp_path / "b.opus", tone(0.1, rate=48_000), 48_000, "opus", comment="x" * 51_201)
    assert not (tmp_path / "b.opus").exists()
