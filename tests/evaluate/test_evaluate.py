"""Test measures of generated sounds on cases whose answer is known."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sa3_torch.evaluate.judge.classifier import attack_brightness, features, tail_level
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.measures.analysis import Analyser, Analysis
from sa3_torch.evaluate.measures.by_class import by_class
from sa3_torch.evaluate.measures.diversity import diversity, pairwise_distance
from sa3_torch.evaluate.measures.faults import clip_faults, faults
from sa3_torch.evaluate.measures.features import ClapSpace
from sa3_torch.evaluate.measures.frechet import ENOUGH, frechet, frechet_with_interval
from sa3_torch.evaluate.measures.inpainting import jump, kept_error, seam
from sa3_torch.evaluate.measures.latent_clap import clap_adherence
from sa3_torch.evaluate.measures.memorisation import memorisation, nearest
from sa3_torch.evaluate.measures.one_step import one_step_error

RATE = 44_100


def burst(seed: int, *, decay_db: float, dull: float = 0.0) -> np.ndarray:
    """Return 1.5 s of white noise (L, 1) that falls by ``decay_db`` a second, without ``dull`` of what is
    above 5 kHz."""
    noise = np.random.default_rng(seed).standard_normal(RATE * 3 // 2)
    spectrum = np.fft.rfft(noise)
    spectrum[np.fft.rfftfreq(len(noise), 1 / RATE) > 5000] *= 1 - dull
    sound = np.fft.irfft(spectrum, len(noise)) * 10 ** (-decay_db / 20 * np.arange(len(noise)) / RATE)
    return (0.2 * sound[:, None]).astype(np.float32)


def normals(count: int, seed: int, size: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, size))


def test_frechet_distance_of_normals() -> None:
    """Compute |m|^2 + tr(A + B - 2 sqrt(AB)): with equal covariances the squared distance of the means."""
    a = normals(400, 0, 8)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + 3) == pytest.approx(8 * 9)
    assert frechet(a, a.mean(0) + 2 * (a - a.mean(0))) == pytest.approx(np.trace(np.cov(a, rowvar=False)))


def test_frechet_distance_has_the_closed_form_of_the_true_normals() -> None:
    """Take diagonal covariances: |m|^2 + sum (s_a - s_b)^2 (measured: within 1 %); float32 features change nothing."""
    first, second = np.array([1.0, 2.0, 0.5, 3.0]), np.array([2.0, 2.0, 1.5, 1.0])
    a, b = normals(40_000, 1, 4) * first, normals(40_000, 2, 4) * second + 0.7
    wanted = 4 * 0.49 + np.square(first - second).sum()
    assert frechet(a, b) == pytest.approx(wanted, rel=0.04)
    assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-9)
    assert frechet(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(frechet(a, b), rel=1e-5)


def test_fewer_clips_than_features_give_a_number() -> None:
    a = normals(5, 0, 20)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6) and frechet(a, normals(5, 1, 20)) > 1
    with pytest.raises(ValueError, match="at least 2 clips"):
        frechet(a[:1], a)


def test_interval_holds_the_distance_and_narrows_with_clips() -> None:
    few, many = (frechet_with_interval(normals(n, 0), normals(n, 1) + 1, resamples=60) for n in (40, 1000))
    assert few.low < few.value < few.high and many.low < 6 < many.high + 0.3
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert not few.enough and many.enough and many.clips == 1000 >= ENOUGH


def test_copies_have_no_diversity() -> None:
    real = normals(12, 0)
    prompts = ["a"] * 6 + ["b"] * 6
    copies = np.repeat(real[[0, 6]], 6, axis=0)
    assert diversity(copies, prompts, real, prompts).ratio == 0
    same = diversity(real, prompts, real, prompts)
    assert same.ratio == 1 and same.prompts == 2 and same.made == pytest.approx(same.real)
    half = diversity(0.5 * real, prompts, real, prompts)
    assert half.ratio == pytest.approx(0.5)
    assert diversity(real[:1], ["a"], real, prompts).ratio is None
    assert pairwise_distance(np.array([[0.0, 0.0], [3.0, 4.0]])) == 5
    with pytest.raises(ValueError, match="at least 2"):
        pairwise_distance(real[:1])


def analysis_of(label: str, sounds: Sequence[np.ndarray]) -> Analysis:
    clip = SimpleNamespace(caption="a sound", label=label, instrument=None, midi=None)
    return Analyser(judge=Judge(), spaces=()).analyse((sound, clip) for sound in sounds)  # type: ignore[misc]


def joined(*parts: Analysis) -> Analysis:
    return Analysis(
        clips=sum((part.clips for part in parts), ()),
        verdicts=sum((part.verdicts for part in parts), ()),
        spaces={"judge": np.concatenate([part.spaces["judge"] for part in parts])},
        detail=np.concatenate([part.detail for part in parts]),
        faults=parts[0].faults,
    )


def tail_of_decay(rate: float) -> float:
    """Return the mean power of three segments beside that of the first 15 ms, for a level that falls by ``rate`` dB a
    second."""
    a = rate * np.log(10) / 10

    def power(start: float, end: float) -> float:
        return float(np.exp(-a * start) - np.exp(-a * end)) / (a * (end - start))

    segments = ((0.18, 0.35), (0.35, 0.7), (0.7, 1.4))
    return float(np.mean([10 * np.log10(power(*edges) / power(0, 0.015)) for edges in segments]))


def test_level_of_the_tail_and_brightness_of_the_attack_are_in_db() -> None:
    """Take noise that falls by 20 and by 30 dB a second; halving what is above 5 kHz makes it 6 dB darker."""
    slow, fast = (features(burst(0, decay_db=rate)) for rate in (20, 30))
    assert tail_level(slow) == pytest.approx(tail_of_decay(20), abs=0.7)
    assert tail_level(fast) == pytest.approx(tail_of_decay(30), abs=0.7)
    bright, dull = (features(burst(0, decay_db=20, dull=part)) for part in (0, 0.5))
    assert attack_brightness(bright) - attack_brightness(dull) == pytest.approx(6, abs=0.5)
    assert tail_level(np.zeros_like(slow)) == -60


def test_classes_are_compared_with_real_clips_of_theirs() -> None:
    real = joined(*(analysis_of(name, [burst(i, decay_db=30) for i in range(3)]) for name in ("snare", "clap")))
    long = analysis_of("snare", [burst(i, decay_db=20) for i in range(3, 6)])
    same = analysis_of("clap", [burst(i, decay_db=30) for i in range(3)])
    found = by_class(joined(same, long, analysis_of("tom", [burst(1, decay_db=20)])), real)
    assert list(found) == ["clap", "snare"]  # no real tom
    assert (found["clap"].shift, found["clap"].tail, found["clap"].attack) == (0, 0, 0)
    assert found["snare"].clips == 3 and found["snare"].shift > 1
    assert found["snare"].tail == pytest.approx(tail_of_decay(20) - tail_of_decay(30), abs=0.7)
    assert abs(found["snare"].attack) < 1


def test_a_memorised_clip_is_found_and_named() -> None:
    training, held_out = normals(300, 0), normals(100, 1)
    made = normals(50, 2)
    made[17] = training[123] + 1e-6
    found = memorisation(made, training, held_out, worst=3)
    assert (found.worst[0].index, found.worst[0].nearest) == (17, 123)
    assert found.worst[0].ratio < 1e-4 and len(found.worst) == 3 and found.worst[1].ratio > 0.01
    assert found.ratio == pytest.approx(1, abs=0.2) and found.share < 0.2
    assert memorisation(training[:50], training, held_out).share == 1
    with pytest.raises(ValueError, match="training clips"):
        memorisation(made, training[:0], held_out)


def test_nearest_is_that_of_all_distances() -> None:
    a, b = normals(20, 0), normals(30, 1)
    every = np.linalg.norm(a[:, None] - b[None], axis=2)
    index, distance = nearest(a, b)
    np.testing.assert_array_equal(index, every.argmin(1))
    np.testing.assert_allclose(distance, every.min(1))


def steady(hz: float) -> np.ndarray:
    time = np.arange(RATE) / RATE
    sound = 0.3 * np.sin(2 * np.pi * hz * time)
    return np.stack([sound, sound], axis=1).astype(np.float32)


def test_a_cut_is_a_seam() -> None:
    """Compare a fading tone that becomes another one in the middle with the tone as it is."""
    edge, fade = RATE // 2, np.exp(-3 * np.arange(RATE) / RATE)[:, None]
    low, high = fade * steady(440), fade * steady(2000)
    cut = np.concatenate([low[:edge], high[edge:]])
    assert seam([cut], [low], [[edge]]) > 5
    assert seam([low], [low], [[edge]]) == 1
    assert jump(cut, [edge]) > 0.1 > jump(cut, [edge // 2])
    assert jump(cut, [10, edge]) == jump(cut, [edge])  # too near to the start
    with pytest.raises(ValueError, match="inside"):
        jump(cut, [10])


def test_error_of_kept_frames_ignores_the_others() -> None:
    source = normals(50, 0, 4)
    keep = np.arange(50) < 20
    made = np.where(keep[:, None], source, 99.0)
    assert kept_error([made], [source], [keep]) == 0
    mean = np.broadcast_to(source.mean(0), source.shape)
    assert kept_error([mean], [source], [np.ones(50, bool)]) == pytest.approx(1)


def test_one_step_error_is_relative_to_the_variance() -> None:
    wanted = [3 + 2 * normals(30, 0), 3 + 2 * normals(10, 1)]
    assert one_step_error(wanted, wanted) == 0
    mean = np.concatenate(wanted).mean(0)
    assert one_step_error([np.broadcast_to(mean, w.shape) for w in wanted], wanted) == pytest.approx(1)
    with pytest.raises(ValueError, match="as many"):
        one_step_error(wanted[:1], wanted)


def test_faults_count_each_clip_once() -> None:
    good = steady(440)
    broken = good.copy()
    broken[5] = np.nan
    found = faults([clip_faults(audio) for audio in (good, 0 * good, broken, 5 * good)])
    assert (found.silent, found.not_finite, found.clipped) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="no clips"):
        faults([])


class WordClap:
    """Give sound and text of the same letter the same vector; padding would spoil the mean if it counted."""

    def embed_audio(self, latents: torch.Tensor, valid: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.shape == (len(latents),) and not t.any()
        total = (latents * valid[..., None]).sum(1) / valid.sum(1, keepdim=True)
        return torch.nn.functional.normalize(total, dim=-1)

    def encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([["abc".index(text)] for text in texts])
        return ids, torch.ones_like(ids, dtype=torch.bool)

    def embed_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert mask.shape == ids.shape
        return torch.eye(3)[ids[:, 0]]


def test_adherence_by_a_clap_on_latents() -> None:
    def latents(letter: int, frames: int) -> np.ndarray:
        return np.tile(np.eye(3, dtype=np.float32)[letter], (frames, 1))

    right = clap_adherence(WordClap(), [latents(0, 3), latents(2, 5), latents(1, 1)], ["a", "c", "b"])
    assert (right.own, right.other, right.first, right.prompts) == (1, 0, 1, 3)
    half = clap_adherence(WordClap(), [latents(0, 3), latents(2, 5)], ["a", "a"])
    assert (half.own_of, half.first_of) == ((1, 0), (True, True))  # of one prompt, it is the nearest
    wrong = clap_adherence(WordClap(), [latents(0, 3), latents(2, 5), latents(1, 1)], ["b", "a", "c"])
    assert (wrong.own, wrong.first) == (0, 0)
    assert clap_adherence(WordClap(), [latents(0, 3)], ["a"]).other is None
    with pytest.raises(ValueError, match="as many"):
        clap_adherence(WordClap(), [], [])


def fake_transformers() -> ModuleType:
    """Make a CLAP whose features are the mean and the length of the sound, and the length of the text."""

    class FakeProcessor:
        """Turn sounds and texts into two numbers each."""

        @classmethod
        def from_pretrained(cls, folder: Path, *, local_files_only: bool) -> FakeProcessor:
            assert local_files_only and folder.is_dir()
            return cls()

        def __call__(self, *, text=None, audio=None, padding=False, sampling_rate=None, return_tensors="pt"):  # type: ignore[no-untyped-def]
            assert return_tensors == "pt" and (audio is None or sampling_rate == 48_000)
            values = [[1.0, len(x) / 48_000 if audio else float(len(x))] for x in (audio or text)]
            return {"values": torch.tensor(values), **({"padding": torch.tensor(padding)} if text else {})}

    class FakeModel(FakeProcessor):
        """Return the numbers as features."""

        def eval(self) -> FakeModel:
            return self

        def get_audio_features(self, values: torch.Tensor) -> torch.Tensor:
            return values

        def get_text_features(self, values: torch.Tensor, padding: torch.Tensor) -> SimpleNamespace:
            assert padding
            return SimpleNamespace(pooler_output=values)

    module = ModuleType("transformers")
    module.ClapModel, module.ClapProcessor = FakeModel, FakeProcessor  # type: ignore[attr-defined]
    return module


def test_clap_of_transformers_is_a_feature_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers())
    space = ClapSpace(tmp_path)
    found = space.embed([steady(440), steady(440)[: RATE // 2], np.concatenate([steady(440)] * 15)])
    assert found.shape == (3, 2) and found.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    assert found[0] == pytest.approx(np.array([1, 1]) / np.sqrt(2), abs=1e-3)
    assert found[2, 1] < 10 / np.sqrt(101)  # fifteen seconds are read as ten and five
    np.testing.assert_allclose(space.embed_text(["ab"]), np.array([[1, 2]]) / np.sqrt(5))


def test_missing_clap_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'sa3\[clap\]'"):
        ClapSpace(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ClapSpace(tmp_path / "none")
