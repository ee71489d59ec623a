"""Pre-encoding in batches and with fewer bits: the latents of each by itself, and what differs is known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")

import soundfile

from sa3_mlx.cli.app import run
from tests.support.command import AUTOENCODER, RATE
from tests.support.data.recordings import CONFIG, encoder_of, noise, write_recordings
from tests.support.tiny_checkpoint import write_checkpoint

BATCHED = dataclasses.replace(CONFIG, batch=4, chunk_frames=32)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("autoencoder"), AUTOENCODER)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_recordings(tmp_path / "sounds")


@pytest.mark.parametrize("chunk", [8, 32, 256])
@pytest.mark.parametrize("batch", [2, 4, 64])
def test_a_batch_gives_the_latents_of_each_by_itself(
    chunk: int, batch: int, folder: Path, autoencoder: Path, tmp_path: Path
) -> None:
    """Long ones in chunks, short ones with others of their length and with their copies. On the CPUs at hand
    the bits are the same; kernels of others may round by the size of a batch."""
    for number in range(5):
        soundfile.write(folder / f"same-{number}.wav", noise(2000, 50 + number), RATE)
        (folder / f"same-{number}.txt").write_text("noise\n")
    single = dataclasses.replace(CONFIG, chunk_frames=chunk, shard_frames=300)
    one = encoder_of(folder, autoencoder, tmp_path / "one", single)
    other = encoder_of(folder, autoencoder, tmp_path / "many", dataclasses.replace(single, batch=batch))
    calls: list[int] = []
    encode = other.same.encode
    other.same.encode = lambda audio: (calls.append(len(audio)), encode(audio))[1]  # type: ignore[method-assign]
    singles, many = one.run(), other.run()
    assert max(calls[:-1]) > 1 and many.items == singles.items and len(many.items) > 20
    assert other.progress.lists() == one.progress.lists()
    for item in many.items:
        expected = singles.read(item)
        assert (many.read(item) - expected).abs().max() < 2e-6 * expected.abs().max()


def test_one_that_breaks_off_takes_no_others_of_its_batch_with_it(tmp_path: Path, autoencoder: Path) -> None:
    for i in range(100):
        soundfile.write(tmp_path / f"{i:03d}.wav", noise(200, i), RATE)
        (tmp_path / f"{i:03d}.txt").write_text("noise\n")
    bad = np.full((3000, 2), 0.1, np.float32)
    bad[2500] = np.nan
    soundfile.write(tmp_path / "050.wav", bad, RATE, subtype="FLOAT")
    encoder = encoder_of(tmp_path, autoencoder, tmp_path / "out", dataclasses.replace(BATCHED, copies=1))
    latents = encoder.run()
    assert len(latents.items) == 99 and encoder.progress.failures[0].startswith("050.wav: ")
    assert [item.id for item in latents.items] == [f"{i:03d}.wav" for i in range(100) if i != 50]
    encoder = encoder_of(tmp_path, autoencoder, tmp_path / "out2", dataclasses.replace(BATCHED, copies=1))
    encode = encoder.same.encode

    def broken(audio: torch.Tensor) -> torch.Tensor:
        latents = encode(audio)
        latents[(audio == audio.new_tensor(noise(200, 7)[:1] / 2**15)).all(2).any(1)] = torch.nan
        return latents

    encoder.same.encode = broken  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"2 of 100 files are unreadable.*007\.wav: latents are not finite"):
        encoder.run()


def test_a_long_one_that_breaks_off_takes_none_with_it_that_waited(tmp_path: Path, autoencoder: Path) -> None:
    for i in range(100):
        soundfile.write(tmp_path / f"{i:03d}.wav", noise(200, i), RATE)
        (tmp_path / f"{i:03d}.txt").write_text("noise\n")
    bad = np.full((280_000, 2), 0.1, np.float32)
    bad[270_000] = np.nan  # in the second block that is read
    soundfile.write(tmp_path / "050.wav", bad, RATE, subtype="FLOAT")
    config = dataclasses.replace(BATCHED, copies=1, shard_frames=10_000)
    latents = encoder_of(tmp_path, autoencoder, tmp_path / "out", config).run()
    assert [item.id for item in latents.items] == [f"{i:03d}.wav" for i in range(100) if i != 50]
    assert [item.offset for item in latents.items] == list(range(0, 4 * 99, 4))


@pytest.mark.parametrize(("precision", "least", "most"), [("bfloat16", 30, 65), ("float16", 50, 85)])
def test_fewer_bits_are_asked_for_and_stand_in_the_details(
    precision: str, least: float, most: float, folder: Path, autoencoder: Path, tmp_path: Path
) -> None:
    """In dB below the latents; measured on such a random autoencoder: 51 and 67."""
    exact = encoder_of(folder, autoencoder, tmp_path / "exact").run()
    config = dataclasses.replace(CONFIG, precision=precision)
    rough = encoder_of(folder, autoencoder, tmp_path / "rough", config).run()
    pairs = [(exact.read(item), rough.read(item)) for item in exact.items]
    error = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)
    assert least < -10 * np.log10(error) < most
    assert json.loads((tmp_path / "rough" / "details.json").read_text())["precision"] == precision


def test_precisions_that_cannot_be_and_other_batches_are_refused(
    folder: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["pre-encode", "--data", str(folder), "--autoencoder", str(autoencoder), "--out", str(tmp_path / "out")]
    assert run([*line, "--precision", "tf32"]) == 2
    assert "tf32 is a precision of NVIDIA GPUs: choose --device cuda" in capsys.readouterr().err
    with pytest.raises(ValueError, match="precision is 'int8'; allowed: float32, tf32"):
        dataclasses.replace(CONFIG, precision="int8")
    assert run(line) == 0
    assert run([*line, "--batch", "2"]) == 2 and "begun with another batch" in capsys.readouterr().err
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert (plan.pop("batch"), plan.pop("precision")) == (1, "float32")
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))  # as an earlier version wrote it
    assert run(line) == 0
