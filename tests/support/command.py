"""Running the ``sa3`` command in tests: tiny models in a home folder, input files, and what a command printed."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sa3_mlx.cli.app import run
from sa3_mlx.common import installed
from sa3_mlx.common.files.audio import write_audio
from sa3_mlx.common.model.config import DiffusionConfig, DiTConfig, ModelConfig, SAMEConfig, TextEncoderConfig
from sa3_mlx.common.model.presets import LOGSNR
from tests.support.tiny_checkpoint import write_checkpoint

RATE = 8000
SMALL = ModelConfig(
    name="little",
    sample_rate=RATE,
    audio_channels=2,
    same=SAMEConfig(
        patch_size=16,
        stride=4,
        latent_channels=8,
        width=64,
        encoder_depth=1,
        decoder_depth=2,
        attention="chunked",
        span=2,
        decoder_kernel=3,
        sine_gate_layers=0,
        token_noise=0.01,
    ),
    diffusion=DiffusionConfig(
        objective="rf_denoiser",
        max_frames=400,
        head_room_seconds=0.1,
        shift=LOGSNR,
        text_encoder=TextEncoderConfig(vocab_size=32, width=32, intermediate=48, depth=1, heads=1, max_length=8),
        dit=DiTConfig(width=64, depth=1, memory_tokens=2, differential=False),
    ),
)
AUTOENCODER = replace(SMALL, name="only-autoencoder", diffusion=None)


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[..., Result]


def ok(result: Result) -> Result:
    assert result.code == 0, result
    return result


def read(path: str | Path) -> np.ndarray:
    """Samples (L, channels) float32."""
    return soundfile.read(path, dtype="float32", always_2d=True)[0]


def make_home(folder: Path) -> Path:
    """A home with the models "little" and "only-autoencoder"."""
    write_checkpoint(folder / "models" / SMALL.name, SMALL)
    write_checkpoint(folder / "models" / AUTOENCODER.name, AUTOENCODER)
    return folder


def use_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a home the current one, with "little" and "spare" before all other default models -> the home."""
    monkeypatch.setenv("SA3_HOME", str(folder))
    monkeypatch.setattr(installed, "PREFERENCE", (SMALL.name, "spare", *installed.PREFERENCE))
    return folder


def sa3(capfd: pytest.CaptureFixture[str], *args: str | Path) -> Result:
    """Run one command line in this process."""
    capfd.readouterr()
    code = run([str(arg) for arg in args])
    captured = capfd.readouterr()
    return Result(code, captured.out, captured.err)


def tone(seconds: float, *, rate: int = RATE, channels: int = 2, level: float = 0.5) -> np.ndarray:
    """A sine of 440 Hz, each channel a little different, that 16 bits hold exactly."""
    time = np.arange(int(seconds * rate)) / rate
    audio = np.stack([np.sin(2 * np.pi * (440 + 3 * channel) * time) for channel in range(channels)], axis=1)
    return (np.rint(audio * level * 32768) / 32768).astype(np.float32)


def write_tone(path: Path, seconds: float = 1.0, *, rate: int = RATE, channels: int = 2) -> Path:
    write_audio(path, tone(seconds, rate=rate, channels=channels), rate)
    return path


def snapshot(*folders: Path) -> dict[str, str]:
    """Hash of every file below, so that a test can tell that nothing was written, changed or removed."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.name != "fingerprints.json"
    }


def truncate(path: Path, share: float) -> None:
    """Keep only this share of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def work_in_copy(original: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy a home, make the copy the current one, and go to an empty folder beside it -> the copy."""
    own = folder / "home"
    shutil.copytree(original, own)
    use_home(own, monkeypatch)
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    return own


def refused_line(capfd: pytest.CaptureFixture[str], own_home: Path, *args: str | Path) -> str:
    """Run a command that must be refused -> its one line. Checks the exit code, and that no file was touched."""
    before = snapshot(Path.cwd(), own_home)
    result = sa3(capfd, *args)
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if line.startswith("sa3: ")]
    assert len(lines) == 1 and "Traceback" not in result.err and result.out == "", result
    assert len(result.err.splitlines()) <= 2, result  # at most the line that says what is about to be made
    assert snapshot(Path.cwd(), own_home) == before
    return lines[0]
