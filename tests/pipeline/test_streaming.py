"""Audio that leaves while it is made: equal to the whole, in files, pipes and players."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_mlx.common.files.audio import AudioWriter, read_tags, write_audio
from sa3_mlx.common.files.wav import Subtype, wav_header
from sa3_mlx.common.model.chunks import check_chunk_frames, default_chunk_frames, stream_chunk_frames
from sa3_mlx.common.model.presets import SAME_FIRST, SAME_L, SAME_S
from tests.support.command import RATE, make_home, sa3, tone, use_home

ROOT = Path(__file__).resolve().parents[2]
AUDIO = tone(1.3, level=1.1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_home(tmp_path / "home")
    use_home(folder, monkeypatch)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return folder


def _piped(*args: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "sa3_mlx", *args], capture_output=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("name", "subtype"),
    [("a.wav", "pcm16"), ("a.wav", "pcm24"), ("a.wav", "float"), ("a.flac", "pcm16"), ("a.flac", "pcm24")],
)
def test_a_file_in_pieces_has_the_bytes_of_the_whole(tmp_path: Path, name: str, subtype: Subtype):
    write_audio(tmp_path / f"whole-{name}", AUDIO, RATE, subtype, comment="how")
    with AudioWriter(tmp_path / name, len(AUDIO), 2, RATE, subtype, comment="how") as writer:
        for start in range(0, len(AUDIO), 1234):
            writer.write(AUDIO[start : start + 1234])
            assert not (tmp_path / name).exists()
    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole-{name}").read_bytes()
    assert read_tags(tmp_path / name) == "how"


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_an_error_between_the_pieces_leaves_nothing(tmp_path: Path, name: str):
    with pytest.raises(KeyboardInterrupt), AudioWriter(tmp_path / name, len(AUDIO), 2, RATE, "pcm16") as writer:
        writer.write(AUDIO[:100])
        raise KeyboardInterrupt
    announced = pytest.raises(ValueError, match="100 samples came, 10400 were announced")
    with announced, AudioWriter(tmp_path / name, len(AUDIO), 2, RATE, "pcm16") as writer:
        writer.write(AUDIO[:100])
    assert not list(tmp_path.iterdir())


def test_streamed_chunks_are_exact_and_shorter():
    for config in (SAME_S, SAME_L, SAME_FIRST):
        size = stream_chunk_frames(config)
        check_chunk_frames(size, config, "decode")
        assert size < default_chunk_frames(config, "decode")


def test_a_pipe_gets_the_file(home: Path, capfd: pytest.CaptureFixture[str]):  # noqa: ARG001
    args = ("generate", "soft rain", "--seconds", "1.5", "--seed", "3", "--backend", "mlx", "--format", "float")
    assert sa3(capfd, *args, "--out", "whole.wav").code == 0
    done = _piped(*args, "--model", "little", "--out", "-")
    assert done.returncode == 0, done.stderr
    assert b"first sound after" in done.stderr and b"seed   3" in done.stderr
    rate, wanted = RATE, soundfile.read("whole.wav", dtype="float32")[0]
    found, found_rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    assert found_rate == rate and found.shape == (int(1.5 * rate), 2)
    np.testing.assert_allclose(found, wanted, atol=2e-6)  # measured: 0; another chunk size may round differently
    Path("piped.wav").write_bytes(done.stdout)
    assert '"chunk_frames": 32' in read_tags("piped.wav") and '"chunk_frames": null' in read_tags("whole.wav")


def test_latents_decode_to_a_pipe(home: Path, capfd: pytest.CaptureFixture[str]):  # noqa: ARG001
    write_audio("in.wav", AUDIO, RATE)
    assert sa3(capfd, "encode", "in.wav", "z.npy", "--backend", "mlx").code == 0
    assert sa3(capfd, "decode", "z.npy", "out.wav", "--backend", "mlx", "--format", "float").code == 0
    done = _piped("decode", "z.npy", "-", "--model", "little", "--backend", "mlx", "--format", "float")
    assert done.returncode == 0, done.stderr
    found = soundfile.read(io.BytesIO(done.stdout), dtype="float32")[0]
    np.testing.assert_allclose(found, soundfile.read("out.wav", dtype="float32")[0], atol=2e-6)


def test_what_a_pipe_cannot_have_is_refused(home: Path, capfd: pytest.CaptureFixture[str]):  # noqa: ARG001
    args = ("generate", "rain", "--seconds", "0.2", "--out", "-")
    assert "takes one sound" in sa3(capfd, *args, "--batch", "2").err
    assert "whole audio before its first sample" in sa3(capfd, *args, "--peak", "-1").err


def test_a_closed_pipe_is_no_traceback(home: Path):  # noqa: ARG001
    command = f"{sys.executable} -m sa3_mlx generate rain --seconds 2 --out - --quiet | head -c 100 | wc -c"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "100" and "Traceback" not in done.stderr


def test_a_header_says_the_length_before_the_samples(tmp_path: Path):
    header = wav_header(len(AUDIO), 2, RATE, "pcm16", "how")
    write_audio(tmp_path / "a.wav", AUDIO, RATE, comment="how")
    assert (tmp_path / "a.wav").read_bytes()[: len(header)] == header
    with pytest.raises(ValueError, match="4 GiB"):
        wav_header(2**30, 2, RATE, "pcm16", "")
