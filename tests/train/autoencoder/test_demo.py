"""Test the sounds and pictures of a run of stage 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")
matplotlib = pytest.importorskip("matplotlib")

import soundfile

from sa3_torch.train.autoencoder import demo
from sa3_torch.train.autoencoder.demo import draw_rows, sensitivity
from tests.support.stages import autoencoder_stage, complete_stage


def test_the_demo_shows_latents_heads_and_sensitivity_and_ends_with_a_chirp(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, np.ndarray] = {}
    draw = lambda path, rows, title: (seen.update(rows), draw_rows(path, rows, title=title))  # noqa: E731
    monkeypatch.setattr(demo, "draw_rows", draw)
    with torch.no_grad():
        complete_stage(workspace).demo(tmp_path, 7)
    assert (tmp_path / "000007.png").is_file() and (tmp_path / "000007-latents.png").stat().st_size > 10_000
    names = [
        f"{name}, {what}" for name in ("chroma_1", "chroma_5", "chroma_8", "level") for what in ("targets", "outputs")
    ]
    assert list(seen) == ["latents", *names, "discriminators' sensitivity, log10"]
    frames = 4 * 16 + 44  # four clips of 16,000 samples and a second of chirp, in frames of 1024
    assert [len(seen[name]) for name in ("latents", *names)] == [frames] * 9
    assert seen["chroma_5, targets"].shape[1] == 128 and seen["level, outputs"].shape[1] == 32
    assert seen["discriminators' sensitivity, log10"].shape[1] == 257
    audio, rate = soundfile.read(tmp_path / "000007.wav")
    assert len(audio) == 2 * (4 * 16_000 + 44_100) and rate == 44_100
    chirp = audio[-2 * 44_100 : -44_100, 0]
    spectra = np.abs(np.fft.rfft(chirp[: 43 * 1024].reshape(43, 1024) * np.hanning(1024))).argmax(1)
    assert (np.diff(spectra.astype(int)) >= 0).all()
    assert spectra[0] < 10 and spectra[-1] > 200


def test_without_networks_beside_it_an_autoencoder_shows_its_latents(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(demo, "save_sound", lambda path, *_, **__: seen.append(path.name))
    monkeypatch.setattr(demo, "draw_rows", lambda path, rows, **_: seen.extend([path.name, *rows]))
    with torch.no_grad():
        autoencoder_stage(workspace).demo(tmp_path, 7)
    assert seen == ["000007.wav", "000007-latents.png", "latents"]


class LaterHalf(torch.nn.Module):
    """Return the mean of the samples beyond the middle."""

    def forward(self, audio: torch.Tensor) -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
        return [(audio[:, 4096:].mean((1, 2))[:, None], [])]


def test_sensitivity_is_where_a_discriminator_listens(workspace: Path) -> None:
    adversary = complete_stage(workspace).adversary
    adversary.discriminators = LaterHalf()
    real, fake = torch.randn(2, 1, 8192, 2, generator=torch.Generator().manual_seed(0))
    found = sensitivity(adversary, real, 0.1 * fake)[0]
    assert found.shape == (65, 257)
    assert found[40:60, 0].min() > 100 * found[:28].max()
    assert found[40:60, 0].min() > 100 * found[40:60, 4:].max()
