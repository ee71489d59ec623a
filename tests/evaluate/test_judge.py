"""Test that the judge finds what was synthesised and rejects what was not, and that metrics obey their definitions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
from sa3_mlx.common.measures.spectra import log_mel_l1
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.evaluate.judge import training
from sa3_torch.evaluate.judge.classifier import FEATURES, WEIGHTS, features
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.judge.pitch import cents_off, chord_of, judge_note, pitch_of
from sa3_torch.evaluate.prompts import held_out_prompts, sounds
from sa3_torch.train.autoencoder.metrics import effective_rank, si_sdr, spectral_convergence
from sa3_torch.train.data.clip_cache import Draft, write_clips
from sa3_torch.train.demo_set.synth import DRUMS, NOISES, noise_clip
from sa3_torch.train.run.random import generator

RATE = 44_100


@dataclass(frozen=True)
class Written:
    """Hold what a clip was written as."""

    caption: str
    label: str
    instrument: str | None
    midi: int | None


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def tone(midi: float, seconds: float = 0.8, harmonics: tuple[float, ...] = (1, 0.6, 0.4, 0.3)) -> np.ndarray:
    t = np.arange(int(seconds * RATE)) / RATE
    hz = 440 * 2 ** ((midi - 69) / 12)
    parts = [a * np.sin(2 * np.pi * hz * (k + 1) * t + k) for k, a in enumerate(harmonics)]
    return (0.2 * np.exp(-2 * t) * np.sum(parts, axis=0)).astype(np.float32)


@pytest.mark.parametrize("midi", range(48, 72, 5))
@pytest.mark.parametrize("harmonics", [(1,), (1, 0.6, 0.4, 0.3), (0.2, 1, 0.5, 0.8, 0.3), (1, 0, 0.6, 0, 0.4)])
def test_pitch_is_right_to_a_few_cents(midi, harmonics):
    audio = tone(midi + 0.2, harmonics=harmonics)
    assert cents_off(audio, midi) == pytest.approx(20, abs=3)  # measured: within 1.2
    assert judge_note(audio, midi) and judge_note(np.stack([audio, audio], axis=1), midi)


def test_wrong_notes_octaves_and_noise_are_rejected():
    assert not judge_note(tone(60), 61) and not judge_note(tone(60), 72) and not judge_note(tone(60), 48)
    assert not judge_note(tone(60.6), 60)
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    assert pitch_of(noise).confidence < 0.05
    assert not any(judge_note(noise, midi) for midi in range(48, 72))
    assert pitch_of(np.zeros(RATE, np.float32)).confidence == 0


def test_pitch_survives_moderate_noise():
    audio = tone(64)
    noisy = audio + 0.05 * audio.std() * np.random.default_rng(0).standard_normal(len(audio))
    assert abs(cents_off(noisy, 64)) < 10


@pytest.mark.parametrize(("quality", "third"), [("major", 4), ("minor", 3)])
@pytest.mark.parametrize("root", range(48, 60))
def test_chords_are_named(root, quality, third):
    audio = tone(root) + tone(root + third) + tone(root + 7)
    names = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
    assert chord_of(audio) == (names[root - 48], quality)


def test_new_variations_of_drums_and_noises_are_recognised(judge):
    """Draw them with another seed than the one the judge was trained on."""
    clips = [
        (recipe(generator(991, 1, d, i)), Written(name, name, None, None))
        for d, (name, recipe) in enumerate(DRUMS.items())
        for i in range(4)
    ]
    clips += [
        (noise_clip(generator(991, 2, c, i), colour), Written(f"{colour} noise", colour, None, None))
        for c, colour in enumerate(NOISES)
        for i in range(4)
    ]
    result = judge.evaluate(clips)
    assert result["clips"] == 36 and result["notes_pitch"] is None
    assert result["drums_class"] >= 0.95, result["confused"]
    assert result["noises_class"] >= 0.95, result["confused"]
    shuffled = [(audio, clips[(i + 12) % len(clips)][1]) for i, (audio, _) in enumerate(clips)]
    assert judge.evaluate(shuffled)["class"] <= 0.05


def synthesised(count: int, first: int) -> Iterator[Draft]:
    """Draw ``count`` clips of every drum and noise, with numbers from ``first``; those above 100 are held out."""
    for place, (name, recipe) in enumerate(DRUMS.items()):
        for i in range(first, first + count):
            yield draft(f"{name}-{i}", name, recipe(generator(17, place, i)), held_out=first > 100)
    for place, colour in enumerate(NOISES):
        for i in range(first, first + count):
            yield draft(f"{colour}-{i}", colour, noise_clip(generator(18, place, i), colour), held_out=first > 100)


def draft(name: str, label: str, audio: np.ndarray, *, held_out: bool) -> Draft:
    kind, split = "noise" if label in NOISES else "drum", "validation" if held_out else "train"
    return Draft(
        id=name, captions=(name,), kind=kind, label=label, instrument=None, midi=None, split=split, audio=audio
    )


def test_a_classifier_that_is_trained_here_recognises_clips_it_has_not_seen(tmp_path, monkeypatch):
    """Train on six clips of each class, in a twentieth of the steps (measured: all of the held-out ones are right)."""
    monkeypatch.setattr(training, "STEPS", 150)
    monkeypatch.setattr(training, "VERSIONS", 1)
    drafts = itertools.chain(synthesised(6, 0), synthesised(3, 200))
    clips = write_clips(tmp_path / "clips", drafts, channels=1, about={})
    training.train_classifier([clips], tmp_path / "made.npz", seed=0)
    made = Judge(tmp_path / "made.npz")
    assert made.classifier.classes == sorted([*DRUMS, *NOISES])
    result = made.evaluate([(clips.read(clip), clip) for clip in clips.select("validation")])
    assert result["clips"] == 27 and result["class"] >= 0.95, result["confused"]


def test_level_and_channels_do_not_matter(judge):
    audio = DRUMS["snare"](generator(5))
    first, quiet = (judge.classifier.classify(x) for x in (audio, 0.05 * np.stack([audio, audio], axis=1)))
    assert first.label == quiet.label == "snare"
    assert first.probability == pytest.approx(quiet.probability, abs=1e-3)


def test_prompts_are_gone_through_as_asked_for():
    """With a bar for example: one step for each prompt, whose sounds are made between two steps."""

    class Quiet:
        def generate(self, request):
            return SimpleNamespace(audio=[np.zeros((10, 2), np.float32)] * len(request.items))

    prompts, seen = held_out_prompts(0)[:3], []

    def progress(given):
        assert given == prompts
        for prompt in given:
            yield prompt
            seen.append(prompt)

    sampling = Sampling(sampler="euler", steps=1)
    made = list(sounds(Quiet(), prompts, sampling=sampling, seeds=2, progress=progress))
    assert seen == prompts and [prompt for _, prompt in made] == [p for p in prompts for _ in range(2)]


def test_silence_is_silence(judge):
    for samples in (1000, 0):
        assert judge.classifier.classify(np.zeros((samples, 2), np.float32)).label == "silence"
    record = Written("piano note C4", "note", "piano", 60)
    verdict = judge.check(np.zeros((1000, 2), np.float32), record)
    assert not verdict["class"] and not verdict["pitch"] and not verdict["instrument"]


def test_features_have_a_fixed_size():
    for samples in (1, 500, 200_000):
        assert features(np.ones(samples, np.float32)).shape == (FEATURES,)


def test_weights_are_small_and_their_absence_is_explained(tmp_path):
    assert WEIGHTS.stat().st_size < 100_000
    with pytest.raises(FileNotFoundError, match=r"python -m sa3_torch\.evaluate\.judge\.training CACHE"):
        Judge(tmp_path / "none.npz")


def test_metrics_obey_their_definitions():
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((20_000, 2)), rng.standard_normal((20_000, 2))
    noise -= clean * (noise * clean).sum() / (clean * clean).sum()
    noise *= np.linalg.norm(clean) / np.linalg.norm(noise)
    assert si_sdr(clean, 3 * (clean + 0.1 * noise)) == pytest.approx(20, abs=1e-9)
    assert si_sdr(clean, 0 * clean) == -np.inf and si_sdr(clean, clean) > 200
    assert log_mel_l1(clean, clean) == 0 and log_mel_l1(clean, 0.1 * clean) == pytest.approx(1, abs=1e-6)
    assert spectral_convergence(clean, clean) == 0 and spectral_convergence(clean, 0 * clean) == pytest.approx(1)
    with pytest.raises(ValueError, match="silent"):
        si_sdr(0 * clean, clean)


def test_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    assert effective_rank(rng.standard_normal((20_000, 8))) == pytest.approx(8, rel=0.01)
    assert effective_rank(rng.standard_normal((5000, 2)) @ rng.standard_normal((2, 8))) <= 2.001
    assert effective_rank(np.ones((100, 8))) == 1
