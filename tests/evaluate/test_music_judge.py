"""Test the judges of the set "music" on sounds whose tempo, key, chord and class are known, and comparisons."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from sa3_torch.evaluate.judge import independent
from sa3_torch.evaluate.judge.music import training
from sa3_torch.evaluate.judge.music.classifier import WEIGHTS, JudgeNetworks, class_of, rhythm
from sa3_torch.evaluate.judge.music.judge import MusicJudge, shares
from sa3_torch.evaluate.judge.music.tempo import keeps_tempo, tempo_of
from sa3_torch.evaluate.judge.music.tonality import best_key, chord_name, key_of
from sa3_torch.evaluate.judge.pitch import pitch_of
from sa3_torch.evaluate.measures.frechet import equal_floor, frechet
from sa3_torch.evaluate.measures.paired import paired_difference
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, CachedClip, Draft, write_clips
from sa3_torch.train.demo_set.music.theory import CHORDS, NAMES, MusicalKey


def tone(midi, seconds):
    t = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    hz = 440 * 2 ** ((midi - 69) / 12)
    return sum(np.sin(2 * np.pi * k * hz * t) / k**1.5 for k in range(1, 7)) * np.exp(-t / 0.6)


def clicks(bpm, seconds=8.0, seed=0):
    """Return a beat: low hits on the beats, bursts of noise between them."""
    rng, out = np.random.default_rng(seed), np.zeros(int(seconds * SAMPLE_RATE))
    step = 60 / bpm / 2
    for i in range(int(seconds / step)):
        start, hit = round(i * step * SAMPLE_RATE), np.exp(-np.arange(2000) / 300)
        hit = hit * (np.sin(np.arange(2000) * 0.01) if i % 2 == 0 else 0.3 * rng.standard_normal(2000))
        out[start : start + 2000] += hit[: len(out) - start]
    return out


@pytest.mark.parametrize("bpm", [70, 97, 120, 168])
def test_tempo_of_a_beat(bpm):
    beat = clicks(bpm)
    assert keeps_tempo(beat, bpm) and keeps_tempo(np.stack([beat, beat], axis=1), bpm)
    assert not keeps_tempo(beat, bpm * 1.05) and not keeps_tempo(beat, bpm * 0.95)
    assert any(tempo_of(beat) == pytest.approx(bpm * factor, rel=0.01) for factor in (0.5, 1, 2))


def test_noise_and_silence_keep_no_tempo():
    noise = np.random.default_rng(0).standard_normal(4 * SAMPLE_RATE)
    assert not keeps_tempo(noise, 120) and not keeps_tempo(np.zeros(SAMPLE_RATE), 120)
    assert tempo_of(np.zeros(SAMPLE_RATE)) == 0.0


@pytest.mark.parametrize("quality", ["major", "minor", "seventh", "minor seventh", "suspended"])
def test_chords_are_named(quality):
    for root in (48, 53, 57):
        chord = sum(tone(root + step, 1.5) for step in CHORDS[quality])
        assert chord_name(chord) == f"{NAMES[root % 12]} {quality}"


@pytest.mark.parametrize(
    "key", [MusicalKey(0, "major"), MusicalKey(9, "minor"), MusicalKey(6, "major")], ids=lambda key: key.name
)
def test_keys_are_named(key):
    degrees = (0, 4, 0, 2, 4, 3, 1, 6, 0, 2, 4, 0)
    melody = np.concatenate([tone(key.pitch(degree, 60), 0.4) for degree in degrees])
    assert key_of(melody) == key.name
    assert key_of(np.zeros(SAMPLE_RATE)) == "" and best_key(np.zeros(12)) == ""


def test_pitch_beyond_the_range_of_the_first_set():
    for midi in (29, 96):
        found = pitch_of(tone(midi, 1.0), lowest_hz=36.0, highest_hz=2400.0, frame=8192)
        assert found.midi == pytest.approx(midi, abs=0.3) and found.confidence > 0.5
    assert abs(pitch_of(tone(29, 1.0)).midi - 29) > 1  # the default range ends at 60 Hz


def clip(kind, label, *, instrument=None, midi=None, **fields):
    return CachedClip(
        id="a",
        captions=("a",),
        seconds=1.0,
        offset=0,
        samples=1,
        kind=kind,
        label=label,
        instrument=instrument,
        midi=midi,
        split="train",
        fields=fields,
    )


def test_classes_of_clips():
    assert class_of(clip("line", "melody", instrument="piano")) == ("sound", "instrument:piano")
    assert class_of(clip("drum", "kick")) == ("sound", "drum:kick")
    assert class_of(clip("loop", "loop", style="rock", bpm=100)) == ("style", "loop:rock")
    assert class_of(clip("sample", "sample")) is None


def test_rhythm_is_that_of_the_stated_tempo():
    beat = clicks(120)
    right, again, wrong = rhythm(beat, 120), rhythm(clicks(120, seed=1), 120), rhythm(beat, 100)
    folded = [x[:96].reshape(16, 6).sum(axis=1) for x in (right, again, wrong)]
    on_beats = [each[[0, 2, 4, 6, 8, 10, 12, 14]].sum() / each.sum() for each in folded]
    assert min(on_beats[:2]) > 0.8 and on_beats[2] < 0.7


def make_clips(folder, count):
    """Store sounds of four classes, ``count`` of each, every fourth held out."""
    drafts = []
    rng = np.random.default_rng(0)
    for i in range(count):
        split = "validation" if i % 4 == 3 else "train"
        made = [
            ("note", "note", "piano", 60 + i, {}, tone(60 + i, 1.0)),
            ("noise", "white", None, None, {}, rng.standard_normal(SAMPLE_RATE)),
            ("loop", "loop", None, None, {"style": "rock", "bpm": 120}, clicks(120, 4.0, i)),
            ("loop", "loop", None, None, {"style": "trap", "bpm": 140}, clicks(70, 4.0, i)),
        ]
        for number, (kind, label, instrument, midi, fields, audio) in enumerate(made):
            sound = (0.4 * audio / np.abs(audio).max()).astype(np.float32)
            drafts.append(
                Draft(
                    id=f"{i}-{number}",
                    captions=("a",),
                    kind=kind,
                    label=label,
                    instrument=instrument,
                    midi=midi,
                    split=split,
                    fields=fields,
                    audio=np.stack([sound, sound], axis=1),
                )
            )
    return write_clips(folder, drafts, channels=2, about={})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train the networks on a few sounds of four classes; return the judge, its cache and the file."""
    folder = tmp_path_factory.mktemp("judge")
    clips = make_clips(folder / "clips", 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sa3_torch.evaluate.judge.training.STEPS", 150)
        training.train_networks(clips, folder / "music.npz", 0)
    return MusicJudge(folder / "music.npz"), clips, folder / "music.npz"


def test_networks_learn_the_classes_and_the_judge_says_what_is_right(trained):
    judge, clips, _ = trained
    verdicts = [(each, judge.check(clips.read(each), each)) for each in clips.select("validation")]
    found = shares(verdicts)
    assert found["note"] == {"clips": 3, "all": 1.0, "instrument": 1.0, "family": 1.0, "pitch": 1.0}
    assert found["noise"]["noise"] == 1.0 and found["loop"]["style"] == 1.0
    other = clips.select("validation")[0]
    silent = judge.check(np.zeros((SAMPLE_RATE, 2)), other)
    assert not any(silent.values())
    wrong = judge.check(clips.read(clips.select("validation")[1]), other)
    assert not wrong["instrument"] and not wrong["pitch"]
    assert judge.networks.hidden(rhythm(clicks(120), 120.0), "style").shape == (training.HIDDEN,)


def test_networks_know_what_an_autoencoder_makes_of_a_sound(trained, tmp_path, monkeypatch):
    """An autoencoder that cuts every sound off at 800 Hz."""
    _, clips, plain = trained
    monkeypatch.setattr("sa3_torch.evaluate.judge.training.STEPS", 150)

    def rebuild(audio):
        spectrum, hz = np.fft.rfft(audio, axis=0), np.fft.rfftfreq(len(audio), 1 / SAMPLE_RATE)
        return np.fft.irfft(spectrum * (hz < 800)[:, None], len(audio), axis=0)

    rows = [len(training.table(clips, "sound", 0, each)[0]) for each in (None, rebuild)]
    assert rows == [18 * 2, 18 * 3]
    training.train_networks(clips, tmp_path / "through.npz", 0, rebuild)
    noises = [each for each in clips.select("validation") if each.kind == "noise"]
    right = [
        sum(MusicJudge(path).check(rebuild(clips.read(each)), each)["noise"] for each in noises)
        for path in (plain, tmp_path / "through.npz")
    ]
    assert right == [0, 3]


def test_the_command_trains_through_an_autoencoder(random_models, tmp_path, monkeypatch):
    clips = make_clips(tmp_path / "clips", 4)
    monkeypatch.setattr("sa3_torch.evaluate.judge.training.STEPS", 5)
    out = tmp_path / "music.npz"
    arguments = [clips.folder, "--through", random_models["autoencoder"], "--out", out]
    done = CliRunner().invoke(training.main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0 and out.is_file()
    assert [line.split(":")[0] for line in done.output.splitlines()] == [
        kind + rebuilt for rebuilt in ("", ", rebuilt") for kind in ("loop", "noise", "note")
    ]


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"missing; make it with: python -m sa3_torch\.evaluate\.judge\.music\.training"
    ):
        JudgeNetworks(tmp_path / "none.npz")


def test_paired_intervals_are_those_of_prompts_and_not_of_sounds():
    rng = np.random.default_rng(0)
    prompts = [f"prompt {i}" for i in range(30) for _ in range(8)]
    ease = np.repeat(rng.normal(0, 1, 30), 8)
    first = ease + np.repeat(rng.normal(0.3, 0.5, 30), 8)
    found = paired_difference(first, ease, prompts)
    assert found.prompts == 30 and found.low < found.value < found.high
    assert found.value == pytest.approx((first - ease).mean())
    # by sounds alone the interval would be eight times too sure
    assert found.high - found.low == pytest.approx(2 * 1.96 * (first - ease)[::8].std() / np.sqrt(30), rel=0.15)
    assert paired_difference(first + 2, ease, prompts).clear and not paired_difference(ease, ease, prompts).clear
    with pytest.raises(ValueError, match="expected one of each"):
        paired_difference(first, ease[1:], prompts)
    with pytest.raises(ValueError, match="at least 2"):
        paired_difference([1.0, 2.0], [1.0, 1.0], ["a", "a"])


def test_floor_of_equally_many_clips_falls_with_their_number():
    real = np.random.default_rng(0).standard_normal((600, 8))
    few, many = equal_floor(real, 40), equal_floor(real, 300)
    assert many < 0.3 * few
    assert equal_floor(real, 300) == pytest.approx(frechet(real[:300], real[300:]), rel=0.6)
    with pytest.raises(ValueError, match="from 2 to half"):
        equal_floor(real, 301)


@pytest.mark.skipif(
    find_spec("onnxruntime") is None or find_spec("basic_pitch") is None, reason="needs onnxruntime and basic-pitch"
)
def test_basic_pitch_hears_notes_and_keys():
    judge = independent.BasicPitch()
    assert [judge.note(tone(midi, 1.0)) for midi in (48, 60, 76)] == [48, 60, 76]
    assert judge.note(np.zeros(SAMPLE_RATE)) is None
    assert judge.notes(tone(60, 3.0)).shape == (258, 88)
    melody = np.concatenate(
        [tone(MusicalKey(7, "major").pitch(degree, 60), 0.4) for degree in (0, 2, 4, 3, 1, 6, 0, 4, 0)]
    )
    assert judge.key(melody) == "G major"


@pytest.mark.skipif(find_spec("librosa") is None, reason="needs librosa")
def test_librosa_finds_the_tempo():
    assert independent.librosa_tempo(clicks(120), 120.0) == pytest.approx(120, rel=0.02)
    assert independent.librosa_tempo(np.zeros(SAMPLE_RATE), 120.0) == 0.0


def test_missing_judges_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(independent, "find_spec", lambda _: None)
    if find_spec("onnxruntime") is None:
        with pytest.raises(ImportError, match=r"sa3\[judges\]"):
            independent.BasicPitch()
    else:
        with pytest.raises(FileNotFoundError, match="--no-deps basic-pitch"):
            independent.BasicPitch()


@pytest.mark.skipif(not Path(WEIGHTS).is_file(), reason="no weights yet")
def test_the_weights_are_those_of_the_set():
    classes = JudgeNetworks().classes
    assert sum(name.startswith("instrument:") for name in classes["sound"]) >= 24
    assert sum(name.startswith("loop:") for name in classes["style"]) >= 8
