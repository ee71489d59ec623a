"""Audio files come in whatever they are and go out with their provenance; lengths follow the official arithmetic."""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray
from safetensors.numpy import load_file

from sa3_mlx.common.files.audio import (
    apply_peak,
    check_audio,
    check_output,
    clipped_share,
    fit_length,
    peak_db,
    read_audio,
    read_tags,
    write_audio,
)
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.model.lengths import (
    clip_lengths,
    effective_frames,
    length_multiple,
    samples_to_frames,
    samples_to_seconds,
    seconds_to_samples,
)
from sa3_mlx.common.model.presets import PRESETS
from tests.support.tiny import TINY

KINDS: list[tuple[str, Subtype]] = [
    ("a.wav", "pcm16"),
    ("a.wav", "pcm24"),
    ("a.wav", "float"),
    ("a.flac", "pcm16"),
    ("a.flac", "pcm24"),
]
COMMENT = json.dumps({"prompt": "größe 音 " + "long " * 2000, "seed": 2**63 - 1}, ensure_ascii=False)


def _audio(samples: int = 1001, channels: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(samples).uniform(-0.95, 0.95, (samples, channels)).astype(np.float32)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- lengths


def test_thirty_recorded_lengths_of_the_released_sizes(golden: Path):
    for name in ("tiny-s", "tiny-l"):
        rows = json.loads((golden / name / "manifest.json").read_text())["lengths_real"]
        assert len(rows) == 30
        for row in rows:
            for preset in ("small-music", "medium"):
                config = PRESETS[preset]
                cap = row["sample_size_cap"] // config.same.samples_per_latent
                config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, max_frames=cap))
                ours = clip_lengths([row["seconds"]], config, 6.0)
                assert ours.frames * config.same.samples_per_latent == row["audio_samples"]
                assert ours.frames == row["latents"]
                assert (ours.effective, ours.valid) == ((row["effective"],), (row["valid"],))
                assert ours.output_samples == (row["out_samples"],)


@pytest.mark.parametrize("name", ["tiny-s", "tiny-l"])
def test_lengths_of_whole_runs_match_the_official_code(golden: Path, name: str):
    cases = json.loads((golden / name / "manifest.json").read_text())["cases"]
    tensors = load_file(golden / name / "e2e.safetensors")
    checked = 0
    for key, case in cases.items():
        if not key.startswith("e2e:") or "error" in case:
            continue
        prefix = key.split(":")[1]
        mask = tensors[f"{prefix}.padding_mask"]
        seconds = case["kwargs"]["duration"]
        ours = clip_lengths(seconds if isinstance(seconds, list) else [seconds] * mask.shape[0], TINY[name], 6.0)
        assert ours.frames == mask.shape[1], key
        valid = np.arange(ours.frames)[None] < np.array(ours.valid)[:, None]
        np.testing.assert_array_equal(valid, mask.astype(bool), err_msg=key)
        np.testing.assert_array_equal(ours.effective, tensors[f"{prefix}.effective_seq_len"], err_msg=key)
        checked += 1
    assert checked == 23


def test_samples_survive_the_way_through_seconds():
    for rate in (8000, 11025, 44100, 48000):
        for samples in [*range(1, 300), 99_999, 5_292_001, 16_777_215]:
            assert seconds_to_samples(samples_to_seconds(samples, rate), rate) == samples


def test_a_clip_costs_what_its_length_costs():
    demo = PRESETS["first"]
    assert length_multiple(demo.same) == demo.same.span
    assert clip_lengths([0.02], demo, 0.0).frames == demo.same.span
    assert effective_frames(1e-9, demo) == 1
    assert samples_to_frames(4097, PRESETS["medium"].same) == 2
    assert clip_lengths([0.5, 2.0], demo, 0.5).effective == (22, 87)


def test_an_autoencoder_alone_has_no_clip_length():
    with pytest.raises(ValueError, match="same-s is an autoencoder alone"):
        clip_lengths([1.0], PRESETS["same-s"], 6.0)


# ---- files


@pytest.mark.parametrize(("name", "subtype"), KINDS)
def test_round_trip_keeps_samples_and_comment(tmp_path: Path, name: str, subtype: Subtype):
    audio = _audio()
    write_audio(tmp_path / name, audio, 44_100, subtype, comment=COMMENT)
    back = read_audio(tmp_path / name, 44_100, 2)
    assert back.dtype == np.float32
    step = {"pcm16": 2.0**-15, "pcm24": 2.0**-23, "float": 0.0}[subtype]
    assert np.abs(back - audio).max() <= step / 2 + 1e-9
    assert read_tags(tmp_path / name) == COMMENT
    assert _names(tmp_path) == [name]


@pytest.mark.parametrize(("name", "subtype"), KINDS)
def test_samples_that_came_from_a_file_go_back_bit_exact(tmp_path: Path, name: str, subtype: Subtype):
    bits = 24 if subtype == "pcm24" else 16
    scale = 2 ** (bits - 1)
    whole = np.random.default_rng(0).integers(-scale, scale, (5000, 2))
    audio = (whole / scale).astype(np.float32)
    write_audio(tmp_path / name, audio, 44_100, subtype)
    np.testing.assert_array_equal(read_audio(tmp_path / name, 44_100, 2), audio)
    assert soundfile.info(tmp_path / name).subtype == {"pcm16": "PCM_16", "pcm24": "PCM_24", "float": "FLOAT"}[subtype]


@pytest.mark.parametrize(("name", "subtype"), KINDS)
def test_equal_audio_gives_equal_files(tmp_path: Path, name: str, subtype: Subtype):
    files = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_audio(tmp_path / folder / name, _audio(), 8000, subtype, comment="same")
        files.append((tmp_path / folder / name).read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_32", "DOUBLE"])
def test_any_rate_depth_and_channel_count_comes_in(tmp_path: Path, channels: int, rate: int, subtype: str):
    time = np.arange(rate // 10) / rate
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "in.wav", np.stack([tone * (c + 1) / 8 for c in range(channels)], axis=1), rate, subtype)
    audio = read_audio(tmp_path / "in.wav", 44_100, 2)
    assert abs(len(audio) - 4410) <= 1 and audio.shape[1] == 2
    middle = np.arange(1000, 3400)
    expected = 0.5 / 8 * np.sin(2 * np.pi * 440 * middle / 44_100)
    quantum = 0.012 if subtype == "PCM_U8" else 2e-3
    assert np.abs(audio[middle, 0] - expected).max() < quantum
    assert np.abs(audio[middle, 1] - expected * min(2, channels)).max() < quantum


def test_float_keeps_what_is_beyond_full_scale_and_pcm_clips(tmp_path: Path):
    loud = np.array([[1.5, -2.0], [1.0, -1.0], [0.25, 0.0]], dtype=np.float32)
    write_audio(tmp_path / "f.wav", loud, 44_100, "float")
    np.testing.assert_array_equal(read_audio(tmp_path / "f.wav", 44_100, 2), loud)
    write_audio(tmp_path / "p.wav", loud, 44_100, "pcm16")
    top = 1 - 2.0**-15
    np.testing.assert_array_equal(read_audio(tmp_path / "p.wav", 44_100, 2), [[top, -1], [top, -1], [0.25, 0]])


def test_a_file_without_comment_has_an_empty_tag(tmp_path: Path):
    soundfile.write(tmp_path / "a.ogg", _audio(), 44_100)
    write_audio(tmp_path / "a.flac", _audio(), 44_100)
    write_audio(tmp_path / "a.wav", _audio(), 44_100)
    assert [read_tags(tmp_path / f"a.{kind}") for kind in ("ogg", "flac", "wav")] == ["", "", ""]


# ---- refusals


def _bad_files(folder: Path) -> dict[str, str]:
    """Name of a broken file -> what its one-line message says."""
    good = folder / "good"
    good.mkdir()
    for name, subtype in (("a.wav", "pcm16"), ("b.wav", "float"), ("c.flac", "pcm24")):
        write_audio(good / name, _audio(20_000), 44_100, subtype)
    soundfile.write(good / "d.aiff", _audio(20_000), 44_100)
    for name in ("a.wav", "b.wav", "c.flac", "d.aiff"):
        data = (good / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
    (folder / "header.wav").write_bytes((good / "a.wav").read_bytes()[:20])
    shutil.rmtree(good)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is not audio " * 50)
    (folder / "folder.wav").mkdir()
    soundfile.write(folder / "silent.wav", np.zeros((0, 2)), 44_100)
    for name, value in (("nan.wav", np.nan), ("inf.wav", np.inf)):
        audio = _audio(50)
        audio[17, 1] = value
        soundfile.write(folder / name, audio, 44_100, "FLOAT")
    return {
        "a.wav": "truncated",
        "b.wav": "truncated",
        "c.flac": "cannot be read as audio",
        "d.aiff": "truncated",
        "header.wav": "cannot be read as audio",
        "empty.wav": "cannot be read as audio",
        "text.wav": "cannot be read as audio",
        "folder.wav": "not a file",
        "silent.wav": "holds no audio",
        "nan.wav": "sample 17 is not a finite number",
        "inf.wav": "sample 17 is not a finite number",
    }


def test_every_broken_file_is_one_clear_line(tmp_path: Path):
    for name, message in _bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=message) as caught:
            read_audio(tmp_path / name, 44_100, 2)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value), name
    with pytest.raises(FileNotFoundError, match="no such audio file"):
        read_audio(tmp_path / "none.wav", 44_100, 2)
    with pytest.raises(FileNotFoundError, match="no such audio file"):
        read_tags(tmp_path / "none.wav")
    with pytest.raises(ValueError, match="cannot be read as audio"):
        read_tags(tmp_path / "text.wav")


def test_a_wav_written_to_a_pipe_is_no_truncated_file(tmp_path: Path):
    write_audio(tmp_path / "a.wav", _audio(300), 44_100)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = struct.pack("<I", 2**32 - 1)
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read_audio(tmp_path / "a.wav", 44_100, 2)) == 300


def test_outputs_are_refused_before_any_work(tmp_path: Path):
    (tmp_path / "there.wav").write_bytes(b"keep me")
    for name, subtype, message in [
        ("a.aac", "pcm16", r"unknown audio extension '\.aac'"),
        ("a.mp3", "pcm16", "cannot hold 'pcm16'; allowed: mp3"),
        ("a", "pcm16", "unknown audio extension ''"),
        ("a.flac", "float", "cannot hold 'float'; allowed: pcm16, pcm24"),
        ("a.wav", "pcm8", "cannot hold 'pcm8'"),
        ("there.wav", "pcm16", "exists already"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_output(tmp_path / name, subtype, overwrite=False)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        check_output(tmp_path / "no" / "a.wav", "pcm16", overwrite=False)
    with pytest.raises(ValueError, match="free some space"):
        check_output(tmp_path / "a.wav", "pcm16", overwrite=False, size_bytes=2**62)
    check_output(tmp_path / "there.wav", "pcm16", overwrite=True)
    assert (tmp_path / "there.wav").read_bytes() == b"keep me"


def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_audio(tmp_path / "a.wav", _audio(10), 44_100)
    before = (tmp_path / "a.wav").read_bytes()

    def full(_self: Path, _target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"could not be written \(No space left on device\)") as caught:
        write_audio(tmp_path / "a.wav", _audio(), 44_100)
    assert "\n" not in str(caught.value) and "Errno" not in str(caught.value)
    assert _names(tmp_path) == ["a.wav"] and (tmp_path / "a.wav").read_bytes() == before


def test_audio_that_is_not_finite_is_not_written(tmp_path: Path):
    audio = _audio(9)
    audio[4] = np.nan
    with pytest.raises(ValueError, match="sample 4 is not a finite number"):
        write_audio(tmp_path / "a.wav", audio, 44_100)
    assert not _names(tmp_path)


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ([[0.0, 0.0]], "got list"),
        (np.zeros((5, 2)), "got float64"),
        (np.zeros((2, 5), np.float32), "got (2, 5)"),
        (np.zeros((0, 2), np.float32), "got (0, 2)"),
        (np.zeros(5, np.float32), "got (5,)"),
        (np.full((5, 2), np.inf, np.float32), "sample 0 is not a finite number"),
    ],
)
def test_wrong_arrays_are_refused(audio: object, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        check_audio(audio, "init audio", 2)


# ---- levels


def test_clipping_is_reported_and_peak_only_turns_down():
    audio = np.array([[0.5, -0.5], [1.2, 0.0], [0.0, -2.0], [1.0, -1.0]], dtype=np.float32)
    assert clipped_share(audio) == 0.5
    lower = apply_peak(audio, -1.0)
    assert abs(peak_db(lower) + 1) < 1e-5 and lower.dtype == np.float32 and clipped_share(lower) == 0
    np.testing.assert_array_equal(apply_peak(lower, -0.5), lower)
    silence = np.zeros((4, 2), np.float32)
    assert peak_db(silence) == -np.inf and clipped_share(silence[:0]) == 0
    np.testing.assert_array_equal(apply_peak(silence, -1.0), silence)
    with pytest.raises(ValueError, match=r"peak is 3\.0 dB: allowed are -60 to 0"):
        apply_peak(audio, 3.0)


def test_audio_is_cropped_or_padded_at_the_end():
    audio = _audio(10)
    np.testing.assert_array_equal(fit_length(audio, 4), audio[:4])
    longer = fit_length(audio, 13)
    np.testing.assert_array_equal(longer[:10], audio)
    assert longer.shape == (13, 2) and not longer[10:].any()


@pytest.mark.parametrize(("name", "subtype"), [*KINDS, ("a.mp3", "mp3"), ("a.ogg", "vorbis")])
def test_a_disk_that_is_full_anywhere_is_one_line_and_leaves_the_old_file(tmp_path: Path, name: str, subtype: Subtype):
    """Limits on the size of a file, in a process of its own, which must not print a word besides."""
    program = """
import resource, sys
import numpy as np
from sa3_mlx.common.files.audio import write_audio
audio = np.random.default_rng(0).uniform(-0.9, 0.9, (100_000, 2)).astype(np.float32)
for size in (0, 10, 100, 5000, 8192, 30_000, 65_536, 150_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        write_audio(sys.argv[1], audio, 44_100, sys.argv[2], comment="x" * 3000)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error)
    else:
        assert size > 30_000 and sys.argv[2] in ("mp3", "vorbis")  # they are that small
        break
"""
    path = tmp_path / name
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", program, path, subtype], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) >= 6 and done.stderr == "" and _names(tmp_path) == [name]
    assert all(line.startswith(f"{path}: could not be written (File too large)") for line in said)
    assert path.read_bytes() == b"old" or len(said) < 8
