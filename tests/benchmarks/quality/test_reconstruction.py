"""One autoencoder decodes what another one encoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the measurement uses the clips of the training twin")

from click.testing import CliRunner

from benchmarks.quality.reconstruction import measure, reconstruction
from sa3_mlx.common.schema import ConfigError
from sa3_torch.evaluate.judge.pitch import still_voiced
from sa3_torch.train.autoencoder.metrics import sdr_by_band
from sa3_torch.train.data.clip_cache import ClipSet
from tests.support.command import AUTOENCODER
from tests.support.tiny_checkpoint import write_checkpoint


class Half:
    """Encodes to blocks of 100 samples, decodes them at half the level."""

    def encode(self, audio: np.ndarray) -> np.ndarray:
        return audio[: len(audio) // 100 * 100].reshape(-1, 200)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return 0.5 * latents.reshape(-1, 2)


class Whole(Half):
    def decode(self, latents: np.ndarray) -> np.ndarray:
        return 2 * super().decode(latents)


def test_another_decoder_reads_the_latents(workspace: Path) -> None:
    clips = ClipSet(workspace / "clips")
    alone, crossed = measure(Half(), clips), measure(Half(), clips, Whole())
    assert alone["log_mel_l1"] > 0.1
    assert crossed["notes_still_voiced"] == 1
    assert crossed["log_mel_l1"] == 0 and crossed["latent_std"] == alone["latent_std"]
    assert crossed["silent_dbfs"] == -200
    assert alone["sdr_by_band"]["mid"] == pytest.approx(6.02, abs=0.01) and alone["sdr_by_band"]["side"] is None


def test_bands_and_sides_are_told_apart() -> None:
    t = np.arange(44_100) / 44_100
    low, high = (np.sin(2 * np.pi * hz * t) for hz in (300, 5000))
    found = sdr_by_band(np.stack([low + high, low], axis=1), np.stack([low, low], axis=1), 44_100)
    assert found["200-400 Hz"] > 100 and found["3200-6400 Hz"] == pytest.approx(0) == pytest.approx(found["side"])
    assert found["800-1600 Hz"] is None and found["mid"] == pytest.approx(6.99, abs=0.01)


def test_a_decoder_of_other_latents_is_refused(workspace: Path, tmp_path: Path) -> None:
    wider = replace(AUTOENCODER, name="wider", same=replace(AUTOENCODER.same, latent_channels=16))
    folders = [str(write_checkpoint(tmp_path / config.name, config)) for config in (AUTOENCODER, wider)]
    args = [folders[0], "--decoder", folders[1], "--data", str(workspace / "clips"), "--backend", "torch"]
    with pytest.raises(ConfigError, match=r"16 channels per 64 samples.* makes 8 channels per 64 samples"):
        CliRunner().invoke(reconstruction, args, catch_exceptions=False)


def test_voiced_frames_that_are_noise_afterwards_are_counted() -> None:
    t, noise = np.arange(44_100) / 44_100, np.random.default_rng(0).standard_normal(44_100)
    tone = np.stack([np.sin(2 * np.pi * 220 * t)] * 2, axis=1)
    half = tone.copy()
    half[22_050:] = noise[22_050:, None]
    assert still_voiced(tone, tone) == still_voiced(tone, tone[:30_000]) == 1 and still_voiced(tone, 0 * tone) == 0
    assert still_voiced(tone, half) == pytest.approx(0.5, abs=0.06)
    assert still_voiced(np.stack([noise] * 2, axis=1), tone) is None and still_voiced(0 * tone, tone) is None
