"""Test linear probes of latents, and the measures of held-out crops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the training twin needs torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from click.testing import CliRunner

from benchmarks.__main__ import main
from sa3_torch.train.autoencoder.metrics import kurtosis, multi_stft, r_squared, stereo_correlation
from sa3_torch.train.autoencoder.probe import Probe, Ridge
from sa3_torch.train.autoencoder.semantics import ChromaBand, Regressors, RegressorsConfig
from sa3_torch.train.autoencoder.semantics.regressors import pitch_class
from sa3_torch.train.data.clip_cache import ClipSet, Draft, write_clips
from tests.support.stages import complete_stage

SMALL = RegressorsConfig(
    size=4096,
    hop=1024,
    chroma_bins=48,
    chroma_bands=(ChromaBand(octave=4.0, width=1.5, weight=1.0),),
    level_bands=8,
    level_weight=1.0,
)


def test_ridge_finds_a_linear_map_with_an_offset_in_pieces() -> None:
    random = np.random.default_rng(0)
    x, weights = random.standard_normal((300, 5)), random.standard_normal((5, 3))
    y = x @ weights + 7
    ridge = Ridge(5, 3)
    for piece in np.array_split(np.arange(200), 3):
        ridge.add(x[piece], y[piece])
    assert r_squared(y[200:], ridge.solve()(x[200:])) > 0.99999
    with pytest.raises(ValueError, match="no rows to fit"):
        Ridge(5, 3).solve()


def test_r_squared_kurtosis_and_correlation_of_known_values() -> None:
    y = np.array([[0.0, 1.0], [2.0, 5.0]])
    assert r_squared(y, y) == 1
    assert r_squared(y, np.broadcast_to(y.mean(0), y.shape)) == 0
    assert r_squared(np.ones((4, 2)), np.zeros((4, 2))) is None
    assert kurtosis(np.array([-1.0, 1.0])) == pytest.approx(1)
    assert kurtosis(np.random.default_rng(0).standard_normal(100_000)) == pytest.approx(3, abs=0.1)
    sound = np.random.default_rng(0).standard_normal(4000)
    assert stereo_correlation(np.stack([sound, -0.3 * sound], 1)) == pytest.approx(-1)
    assert stereo_correlation(np.stack([sound, 0 * sound], 1)) == 0
    assert multi_stft(sound, sound) == 0
    assert multi_stft(sound, sound / 2) == pytest.approx(0.5 + np.log(2), rel=0.05)


@pytest.mark.parametrize(("midi", "expected"), [(69, 9), (60, 0), (71, 11), (61, 1)])
@pytest.mark.parametrize("bins", [48, 128])
def test_pitch_class_of_tones(midi: int, expected: int, bins: int) -> None:
    config = RegressorsConfig.from_dict({**SMALL.to_dict(), "chroma_bins": bins, "size": 16384, "hop": 4096})
    tone = torch.sin(2 * torch.pi * 440 * 2 ** ((midi - 69) / 12) * torch.arange(32768) / 44_100)
    chroma = Regressors(config, 44_100, 1024, 4).targets(tone[None, :, None].repeat(1, 1, 2), 8)["chroma_4"]
    assert pitch_class(chroma.mean((0, 1))) == expected


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> ClipSet:
    """Write sines of two octaves at two levels; one of four is held out."""

    def draft(number: int) -> Draft:
        midi, level = 60 + number % 24, 0.2 + 0.1 * (number // 24)
        audio = level * np.sin(2 * np.pi * 440 * 2 ** ((midi - 69) / 12) * np.arange(8192) / 44_100)
        return Draft(
            id=str(number),
            captions=("a tone",),
            kind="note",
            label="note",
            instrument="sine",
            midi=midi,
            split="validation" if (number + number // 24) % 4 == 1 else "train",
            audio=audio.astype(np.float32),
        )

    return write_clips(tmp_path_factory.mktemp("notes"), map(draft, range(72)), channels=1, about={})


def mixed(audio: np.ndarray) -> np.ndarray:
    """Return latents that hold the targets, mixed: (T, 56)."""
    found = Regressors(SMALL, 44_100, 1024, 56).targets(torch.from_numpy(audio)[None], len(audio) // 1024)
    targets = torch.cat([found["chroma_4"][0], found["level"][0]], dim=-1).numpy()
    return targets @ np.random.default_rng(1).standard_normal((56, 56)).astype(np.float32)


def test_probe_reads_latents_that_hold_pitch_and_level_and_not_random_ones(notes: ClipSet) -> None:
    found = Probe(notes, mixed, Regressors(SMALL, 44_100, 1024, 56), pan=0.5).measure(60, seed=0)
    assert (found["clips_fitted"], found["clips_held_out"], found["channels"]) == (54, 18, 56)
    assert found["chroma_r2"] > 0.9 and found["level_r2"] > 0.8
    assert found["pitch_class"] >= 0.9 and found["pitch_class_of_targets"] == 1
    assert found["random_chroma_r2"] < 0.1 and found["random_level_r2"] < 0.1 and found["random_pitch_class"] < 0.3


def test_mono_has_no_level_to_read(notes: ClipSet) -> None:
    found = Probe(notes, mixed, Regressors(SMALL, 44_100, 1024, 56), pan=0.0).measure(8, seed=0)
    assert found["level_r2"] is None and found["clips_held_out"] == 6


def test_command_prints_and_writes_the_measures(workspace: Path, tmp_path: Path) -> None:
    args = [str(workspace / "run" / "model"), "--backend", "torch", "--data", str(workspace / "clips")]
    done = CliRunner().invoke(main, ["latents", *args, "--out", str(tmp_path / "a.json")], catch_exceptions=False)
    last = json.loads(done.output.splitlines()[-1])
    assert last == json.loads((tmp_path / "a.json").read_text())
    assert {"std", "kurtosis", "effective_rank", "chroma_r2", "level_r2", "pitch_class", "random_chroma_r2"} <= set(
        last
    )


def test_stage_measures_its_semantic_networks_on_held_out_crops(workspace: Path) -> None:
    stage = complete_stage(workspace)
    with torch.no_grad():
        measures, again = stage.validate(), stage.validate()
    assert measures == again
    assert measures["alignment_of_zero"] == pytest.approx(1, abs=0.2)  # it begins as a predictor of zero
    assert 0 <= measures["critic_accuracy"] <= 1 and 0 <= measures["pitch_class"] <= 1
    assert {"chroma_1_r2", "chroma_5_r2", "chroma_8_r2", "softnorm", "latent_kurtosis", "multi_stft"} <= set(measures)
    assert "level_r2" in measures  # mono crops are moved to a side
    only = complete_stage(workspace, "semantics.critic_weight=0.0", "semantics.regressors_weight=0.0")
    with torch.no_grad():
        assert {"critic_accuracy", "pitch_class"}.isdisjoint(only.validate())
