"""Test the recipe of the demo sounds, the clip cache and the vocabulary."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
from click.testing import CliRunner

from sa3_torch.evaluate.judge.pitch import judge_note
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, ClipSet, Draft, trim, write_clips
from sa3_torch.train.demo_set import sounds
from sa3_torch.train.demo_set.synth import DRUMS, NOISES, coloured_noise
from sa3_torch.train.demo_set.vocabulary import PAD, SPECIAL, UNK, WORDS, build_tokenizer, save_tokenizer

FONT = Path("/nowhere/font.sf2")


def _draft(name: str, audio: np.ndarray) -> Draft:
    return Draft(
        id=name, captions=(name,), kind="drum", label="kick", instrument=None, midi=None, split="train", audio=audio
    )


def _fake_render(events, font):
    """Return half a second of noise per event, of a different length each, instead of fluidsynth."""
    assert font == FONT
    rng = np.random.default_rng(1)
    return [rng.uniform(-0.5, 0.5, 22_000 + i).astype(np.float32) for i in range(len(events))]


def test_validation_holds_out_whole_pairs_of_instrument_and_pitch(monkeypatch):
    monkeypatch.setattr(sounds, "render_midi", _fake_render)
    drafts = [*sounds.notes(0, FONT), *sounds.chords(0, FONT)]
    sides: dict[str, set[str]] = {}
    for draft in drafts:
        sides.setdefault(draft.captions[0], set()).add(draft.split)
    assert all(len(splits) == 1 for splits in sides.values())
    notes = [d for d in drafts if d.kind == "note"]
    assert len(notes) == 8 * 24 * sounds.NOTES_PER_PITCH
    held = {(d.instrument, d.midi) for d in notes if d.split == "validation"}
    assert len(held) == 8 * sounds.HELD_OUT_PITCHES
    trained_pitches = {d.midi for d in notes if d.split == "train"}
    assert {midi for _, midi in held} <= trained_pitches  # every held-out pitch is known from other instruments


def test_every_caption_is_made_of_known_words(monkeypatch):
    monkeypatch.setattr(sounds, "SYNTHESISED_PER_DRUM", 2)
    monkeypatch.setattr(sounds, "CLIPS_PER_NOISE", 2)
    monkeypatch.setattr(sounds, "render_midi", _fake_render)
    drafts = [*sounds.notes(0, FONT), *sounds.chords(0, FONT), *sounds.synthesised(0)]
    tokenizer = build_tokenizer()
    for caption in {caption for draft in drafts for caption in draft.captions}:
        ids = tokenizer.encode(caption, add_special_tokens=False).ids
        assert UNK not in ids and PAD not in ids, caption
        assert 1 <= len(ids) <= 4
    assert {draft.label for draft in drafts} == {"note", "chord", *DRUMS, *NOISES}


def test_a_shared_kit_sound_is_kept_once(monkeypatch):
    def same_sound(events, font):
        return [_fake_render(events[:1], font)[0]] * len(events)

    monkeypatch.setattr(sounds, "render_midi", same_sound)
    assert len(list(sounds.kit_drums(0, FONT))) == 2  # the two takes of the first hit


def test_synthesis_is_a_function_of_the_seed():
    first, again, other = (list(islice(sounds.synthesised(seed), 3)) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a.audio, b.audio)
        assert not np.array_equal(a.audio[:1000], c.audio[:1000])


@pytest.mark.parametrize("label", DRUMS)
def test_drums_start_at_once_and_are_finite(label):
    draft = next(d for d in sounds.synthesised(0) if d.label == label)
    audio = np.abs(draft.audio)
    assert np.isfinite(audio).all()
    assert np.argmax(audio > 0.1 * audio.max()) < 0.010 * SAMPLE_RATE
    assert 10 ** (-9.1 / 20) <= audio.max() <= 10 ** (-2.9 / 20)
    assert sounds.MINIMUM_SECONDS <= len(audio) / SAMPLE_RATE <= sounds.MAXIMUM_SECONDS


@pytest.mark.parametrize(("colour", "slope_db"), [("white", 0.0), ("pink", -3.0), ("brown", -6.0)])
def test_noise_falls_by_its_slope_per_octave(colour, slope_db):
    power = np.abs(np.fft.rfft(coloured_noise(np.random.default_rng(0), colour, 4.0))) ** 2
    f = np.fft.rfftfreq(4 * SAMPLE_RATE, 1 / SAMPLE_RATE)
    octaves = [10 * np.log10(power[(f >= 200 * 2**k) & (f < 400 * 2**k)].mean()) for k in range(6)]
    assert np.polyfit(range(6), octaves, 1)[0] == pytest.approx(slope_db, abs=0.3)  # measured: within 0.11


def test_trim_cuts_the_onset_and_the_tail():
    t = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    tone = (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)
    out = trim(np.pad(tone, (5000, 20_000)), maximum_seconds=4.0, minimum_seconds=0.3)
    assert abs(len(out) - len(tone)) < 0.015 * SAMPLE_RATE
    assert np.argmax(np.abs(out) > 0.1) < 0.010 * SAMPLE_RATE
    assert abs(out[-1]) < 1e-3
    assert len(trim(tone[:100], maximum_seconds=4.0, minimum_seconds=0.3)) == int(0.3 * SAMPLE_RATE)
    assert len(trim(np.tile(tone, 6), maximum_seconds=4.0, minimum_seconds=0.3)) == 4 * SAMPLE_RATE
    with pytest.raises(ValueError, match="silence"):
        trim(np.zeros(100, np.float32), maximum_seconds=4.0, minimum_seconds=0.3)


def test_cache_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    drafts = [_draft(f"clip {i}", rng.uniform(-1, 1, 100 + i).astype(np.float32)) for i in range(5)]
    clips = write_clips(tmp_path / "cache", drafts, channels=1, about={"seed": 1})
    assert clips.about == {"seed": 1}
    for draft, clip in zip(drafts, clips.clips, strict=True):
        assert clip.caption == draft.id and clip.samples == len(draft.audio)
        assert np.abs(clips.read(clip)[:, 0] - draft.audio).max() < 5e-4
    last = clips.clips[-1]
    assert np.array_equal(clips.read(last, 10, 20), clips.read(last)[10:20])
    assert [c.id for c in clips.select("train")] == [d.id for d in drafts] and clips.select("validation") == []


def test_cache_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a complete sa3-clips/1 cache"):
        ClipSet(tmp_path)
    with pytest.raises(ValueError, match="no clips"):
        write_clips(tmp_path, [], channels=1, about={})
    with pytest.raises(ValueError, match="not finite"):
        write_clips(tmp_path, [_draft("bad", np.full(10, np.nan, np.float32))], channels=1, about={})
    with pytest.raises(ValueError, match="1 channel"):
        write_clips(tmp_path, [_draft("mono", np.ones(10, np.float32))], channels=2, about={})
    assert not (tmp_path / "index.json").exists()
    clips = write_clips(tmp_path, [_draft("good", np.ones(10, np.float32))], channels=1, about={})
    with pytest.raises(ValueError, match="train or validation"):
        clips.select("test")
    index = json.loads((tmp_path / "index.json").read_text())
    index["clips"][0]["samples"] = 11
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="its index needs 11"):
        ClipSet(tmp_path)


def test_missing_program_font_and_samples_give_one_line(tmp_path, monkeypatch):
    run = CliRunner().invoke
    monkeypatch.setattr(sounds.shutil, "which", lambda _: None)
    result = run(sounds.main, [str(tmp_path / "a"), "--font", str(tmp_path / "none.sf2")])
    assert result.exit_code != 0 and "fluidsynth is not installed" in result.output
    monkeypatch.setattr(sounds.shutil, "which", lambda _: "/bin/true")
    result = run(sounds.main, [str(tmp_path / "a"), "--font", str(tmp_path / "none.sf2")])
    assert result.exit_code != 0 and "sound font" in result.output and "none.sf2 is missing" in result.output
    assert result.output.count("\n") == 1
    with pytest.raises(FileNotFoundError, match="install sonic-pi-samples"):
        next(sounds.samples(0, tmp_path))
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(
    shutil.which("fluidsynth") is None or not sounds.DEFAULT_FONT.is_file(),
    reason="needs fluidsynth and FluidR3_GM.sf2",
)
def test_fluidsynth_plays_what_is_written():
    written = [("piano", 48), ("violin", 71), ("organ", 60)]
    events = [
        sounds.MidiEvent(program=sounds.INSTRUMENTS[name], keys=(midi,), velocity=100, seconds=0.8)
        for name, midi in written
    ]
    slots = sounds.render_midi(events, sounds.DEFAULT_FONT)
    again = sounds.render_midi(events, sounds.DEFAULT_FONT)
    for (_, midi), slot, twin in zip(written, slots, again, strict=True):
        assert judge_note(slot, midi) and not judge_note(slot, midi + 1)
        assert np.array_equal(slot, twin)


def test_vocabulary_is_closed_small_and_ordered(tmp_path):
    save_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = type(build_tokenizer()).from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == len(SPECIAL) + len(WORDS) <= 128
    assert [tokenizer.token_to_id(word) for word in SPECIAL] == [0, 1, 2, 3]
    assert tokenizer.token_to_id(WORDS[0]) == 4


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A piano note, A4!", "piano note a4"),
        ("Bb3 violin", "a#3 violin"),
        ("E♭4 flute", "d#4 flute"),
        ("an organ chord A minor", "organ chord a minor"),
        ("A minor chord organ", "a minor chord organ"),
        ("the sound of a kick drum", "kick drum"),
        ("a Hi Hat", "hihat"),
        ("bass drum", "kick drum"),
        ("closed hi-hat", "closed hihat"),
        ("a tuba note A4", "a <unk> note a4"),
        ("", ""),
    ],
)
def test_spellings(prompt, words):
    assert build_tokenizer().encode(prompt, add_special_tokens=False).tokens == words.split()
