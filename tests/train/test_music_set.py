"""Test the set "music": what is planned, played, finished and held out, and that a stopped run goes on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
from click.testing import CliRunner

from sa3_mlx.cli.train.data import data
from sa3_torch.evaluate.judge.pitch import judge_note
from sa3_torch.train.data.clip_cache import SAMPLE_RATE
from sa3_torch.train.demo_set.music import parts, render, scores
from sa3_torch.train.demo_set.music.bands import BANDS
from sa3_torch.train.demo_set.music.beats import STYLES, bar_seconds
from sa3_torch.train.demo_set.music.effects import EFFECTS, noise
from sa3_torch.train.demo_set.music.finish import LONGEST, Ending, finish
from sa3_torch.train.demo_set.music.instruments import INSTRUMENTS
from sa3_torch.train.demo_set.music.parts import COUNTS, PartJob, plan_part
from sa3_torch.train.demo_set.music.samples import describe
from sa3_torch.train.demo_set.music.scores import LEAD_SECONDS, Score, Tone, Voice
from sa3_torch.train.demo_set.music.theory import CHORDS, KEYS, MusicalKey
from sa3_torch.train.demo_set.music.wordings import TEMPLATES, captions, templates
from sa3_torch.train.demo_set.sets import build_tokenizer
from sa3_torch.train.demo_set.sounds import DEFAULT_FONT

NO_FLUIDSYNTH = shutil.which("fluidsynth") is None or not DEFAULT_FONT.is_file()


def _combinations(plan):
    """Return what may be held out of a clip, by what is written of it."""
    f, kind = plan.fields, plan.kind
    if kind == "note":
        return {(kind, plan.instrument, plan.midi)}
    if kind == "chord":
        return {(kind, plan.instrument, f["chord"])}
    if kind == "line":
        return {(plan.label, plan.instrument, f["key"])}
    if kind == "loop":
        return {(kind, f["style"], f["bpm"] // 4)}
    if kind == "music":
        return {(kind, f["style"], f["key"]), (kind, f["style"], f["bpm"] // 4)}
    if kind == "drum" and "kit" in f:
        return {(kind, plan.label, f["kit"], f["hit"])}
    return set()


@pytest.fixture(scope="module")
def planned():
    return {
        split: [plan for number in range(count) for plan in plan_part(3, split, number)]
        for split, count in (("train", 6), ("validation", 2), ("test", 2))
    }


def test_combinations_that_are_held_out_are_in_no_training_clip(planned):
    trained = set().union(*map(_combinations, planned["train"]))
    held = {
        split: [_combinations(plan) for plan in planned[split] if plan.fields["held_out"] == "combination"]
        for split in ("validation", "test")
    }
    for split, found in held.items():
        known = [each for each in found if each]
        assert len(known) > 50
        assert all(not each <= trained for each in known), split
    one, other = (set().union(*found) - trained for found in held.values())
    assert not one & other  # what validation shows is nothing of the test


def test_other_held_out_clips_are_new_takes_and_wordings_of_what_was_trained(planned):
    for split in ("validation", "test"):
        reasons = Counter(plan.fields["held_out"] for plan in planned[split])
        assert reasons.keys() == {"take", "combination", "wording"} and min(reasons.values()) > 0.25 * reasons.total()
        (held,) = {templates("loop", split)}
        for plan in planned[split]:
            if plan.kind == "loop" and plan.fields["held_out"] == "wording":
                words = held[0].format(style=plan.fields["style"], bpm=plan.fields["bpm"])
                assert plan.captions == (words,)
    assert all("held_out" not in plan.fields for plan in planned["train"])


def test_no_wording_is_on_two_sides():
    for kind, every in TEMPLATES.items():
        sides = [set(templates(kind, side)) for side in ("train", "validation", "test")]
        assert set.union(*sides) == set(every) and sum(map(len, sides)) == len(set(every)), kind


def test_a_part_has_all_kinds_and_follows_from_its_place(planned):
    again, other = plan_part(3, "train", 0), plan_part(4, "train", 0)
    first = planned["train"][: len(again)]
    assert [plan.captions for plan in first] == [plan.captions for plan in again]
    assert [plan.captions for plan in first] != [plan.captions for plan in other]
    labels = Counter(plan.label if plan.kind == "line" else plan.kind for plan in first)
    assert labels == {kind: count for kind, (count, _) in COUNTS.items()}
    assert {plan.fields["style"] for plan in planned["train"] if plan.kind == "loop"} == set(STYLES)
    assert {plan.fields["style"] for plan in planned["train"] if plan.kind == "music"} == set(BANDS)
    assert len(STYLES) >= 8 and len(INSTRUMENTS) >= 24


def test_notes_come_in_turn_so_that_each_pair_has_as_many_takes():
    _, plan = COUNTS["note"]
    pairs: Counter[tuple[str, int]] = Counter()
    total = len({(name, m) for name, i in INSTRUMENTS.items() for m in range(i.low, i.high + 1)})
    for number in range(total):
        rng = np.random.default_rng(number)
        made = plan(parts.ClipPlace(rng=rng, seed=0, split="train", reason="", number=number))
        pairs[made.instrument, made.midi] += 1
    assert max(pairs.values()) - min(pairs.values()) <= 1
    assert 0.85 * total < len(pairs) < 0.95 * total  # a tenth is held out


def test_tones_lie_within_ranges_and_bars(planned):
    for plan in planned["train"]:
        if plan.score is None:
            continue
        assert sum(voice.drums for voice in plan.score.voices) <= 1
        assert all(tone.start + 1e-6 < plan.score.seconds for tone in plan.score.tones), plan.captions
        if plan.kind == "line":
            instrument = INSTRUMENTS[plan.instrument]
            assert all(instrument.low <= tone.key <= instrument.high for tone in plan.score.tones)
            end = plan.fields["bars"] * bar_seconds(plan.fields["bpm"])
            assert all(tone.start < end for tone in plan.score.tones)
            scale = {MusicalKey(*_key(plan.fields["key"])).pitch(degree, 60) % 12 for degree in range(7)}
            assert {tone.key % 12 for tone in plan.score.tones} <= scale
        if plan.kind == "loop":
            assert 70 <= plan.fields["bpm"] <= 170 and plan.fields["bpm"] % 2 == 0
            assert plan.ending.exact
            assert all(tone.start < plan.ending.seconds for tone in plan.score.tones)
            assert plan.ending.seconds == pytest.approx(240 * plan.fields["bars"] / plan.fields["bpm"])
        assert plan.ending.seconds <= LONGEST + 1e-6


def _key(name):
    root, mode = name.split()
    return next((key.root, key.mode) for key in KEYS if key.name == f"{root} {mode}")


def test_arrangements_are_panned(planned):
    pans = [[voice.pan for voice in plan.score.voices] for plan in planned["train"] if plan.kind == "music"]
    assert np.mean([max(each) > 0.2 and min(each) < -0.2 for each in pans]) > 0.7
    assert all(pan == 0 for each in pans for pan in each[-1:])  # bass or drums


def test_chords_and_keys():
    assert MusicalKey(9, "minor").triad(0, 60) == (57, 60, 64)
    assert MusicalKey(0, "major").chord_name(4) == "G major" and MusicalKey(9, "minor").chord_name(1) == "B diminished"
    assert MusicalKey(6, "major").name == "F# major" and len(KEYS) == 24
    assert all(steps[0] == 0 and list(steps) == sorted(steps) for steps in CHORDS.values())


def test_every_word_of_the_captions_is_known_but_for_fillers(planned):
    tokenizer = build_tokenizer("music")
    unknown: Counter[bool] = Counter()
    for plan in [plan for split in planned.values() for plan in split]:
        for text in plan.captions:
            tokens = tokenizer.encode(text).tokens
            assert 1 <= len(tokens) <= 32, text
            unknown["<unk>" in tokens] += 1
        assert "<unk>" not in tokenizer.encode(plan.captions[0]).tokens, plan.captions[0]
    assert 0.02 < unknown[True] / unknown.total() < 0.1  # the model learns to pass over them


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("A slow sad piano melody in A minor, 80 bpm", "slow sad piano melody a minor 80 bpm"),
        ("a piano note, A4!", "piano note a 4"),
        ("Bb3 violin", "a# 3 violin"),
        ("an A minor chord on organ", "a minor chord organ"),
        ("B flat major sax solo 121bpm", "a# major saxophone solo 120 bpm"),
        ("a Hi-Hat hit", "hat hit"),
        ("piano note A", "piano note a"),
        ("dnb, 8s", "drum and bass 8 second"),
        ("fast C sharp minor arpeggios on ukulele", "fast c# minor arpeggio <unk>"),
        ("", ""),
    ],
)
def test_spellings(prompt, words):
    assert " ".join(build_tokenizer("music").encode(prompt).tokens) == words


def test_vocabulary_fits_the_model():
    from sa3_mlx.common.model.presets import PRESETS

    size = build_tokenizer("music").get_vocab_size()
    assert 280 <= size <= PRESETS["music"].require_diffusion().text_encoder.vocab_size


def test_captions_leave_out_what_is_not_known_and_take_articles():
    rng = np.random.default_rng(0)
    facts = {"instrument": "oboe", "pitch": "C4"}
    found = {text for _ in range(300) for text in captions(rng, "note", facts, "train")}
    assert "oboe note C4" in found and len(found) > 15
    assert not any("{" in text or "[" in text or "a oboe" in text or ", ," in text for text in found)
    assert captions(rng, "note", facts, "validation") == ("oboe plays C4",)
    assert captions(rng, "note", facts, "test") == ("C4 note of oboe",)


@pytest.mark.parametrize("name", [*EFFECTS, "white", "pink", "brown"])
def test_effects_are_stereo_and_follow_from_the_generator(name):
    make = EFFECTS.get(name, lambda rng: noise(rng, name))
    one, again, other = (make(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.shape[1] == 2 and 0.1 * SAMPLE_RATE < len(one) <= 10 * SAMPLE_RATE
    assert np.isfinite(one).all() and np.abs(one).max() > 1e-3
    assert np.array_equal(one, again)
    assert one.shape != other.shape or not np.array_equal(one, other)


def test_finishing_cuts_at_the_onset_and_at_whole_bars_and_sets_the_level():
    t = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    tone = np.stack([np.sin(2 * np.pi * 440 * t), 0.5 * np.sin(2 * np.pi * 440 * t)], axis=1) * 0.1
    late = np.pad(tone, ((5000, 30_000), (0, 0)))
    rng = np.random.default_rng
    one_shot = finish(late, Ending(seconds=3.0, onset=True), rng(0)).astype(np.float32)
    assert abs(len(one_shot) - len(tone)) < 0.03 * SAMPLE_RATE
    assert np.argmax(np.abs(one_shot).max(axis=1) > 0.02) < 0.01 * SAMPLE_RATE
    assert 10 ** (-12.1 / 20) <= np.abs(one_shot).max() <= 10 ** (-0.9 / 20)
    exact = finish(late, Ending(seconds=1.5, exact=True), rng(0))
    assert len(exact) == round(1.5 * SAMPLE_RATE) and exact.dtype == np.float16
    kept = finish(late, Ending(seconds=3.0, onset=True, silence=True), rng(0))
    assert len(kept) > len(one_shot) + 20_000 and np.abs(kept[-10_000:]).max() < 1e-6
    faded = finish(tone, Ending(seconds=1.0, fade="out"), rng(0)).astype(np.float32)
    level = [np.abs(part).max() for part in np.array_split(faded, 4)]
    assert level == sorted(level, reverse=True) and level[-1] < 0.3 * level[0]
    assert len(finish(tone[:50], Ending(seconds=1.0), rng(0))) == int(0.3 * SAMPLE_RATE)
    with pytest.raises(ValueError, match="nothing sounds"):
        finish(np.zeros((100, 2)), Ending(seconds=1.0), rng(0))


def test_midi_keeps_every_score_in_its_slot(tmp_path):
    mido = pytest.importorskip("mido")
    made = [
        Score(voices=(Voice(program=3), Voice(program=0, drums=True)), tones=(_tone(0, 60), _tone(1, 36)), seconds=1.0),
        Score(voices=(Voice(program=5, pan=-1.0),), tones=(_tone(0, 62, 0.5),), seconds=2.0),
    ]
    scores._write_midi(made, tmp_path / "a.mid")
    now, notes, pans = 0, [], []
    for message in mido.MidiFile(tmp_path / "a.mid").tracks[0]:
        now += message.time
        if message.type == "note_on":
            notes.append((now / 1000, message.channel, message.note))
        if message.type == "control_change" and message.control == 10:
            pans.append(message.value)
    second = 1.0 + LEAD_SECONDS + scores.GAP_SECONDS
    assert sorted(notes) == [(0.1, 0, 60), (0.1, 9, 36), (pytest.approx(second + 0.6), 0, 62)]
    assert pans == [64, 64, 0]


def _tone(voice, key, start=0.0):
    return Tone(voice=voice, key=key, start=start, seconds=0.3, velocity=90)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Play noise in place of fluidsynth, and few clips a part; return the arguments of a run."""

    def play(played, _font, _place):
        for score in played:
            yield np.full(
                (round((LEAD_SECONDS + score.seconds) * SAMPLE_RATE), 2), 0.1 + 0.01 * len(score.tones), np.float32
            )

    monkeypatch.setattr(parts, "play", play)
    monkeypatch.setattr(parts, "COUNTS", {name: (1, COUNTS[name][1]) for name in ("note", "drum", "chord")})
    monkeypatch.setattr(render, "check_fluidsynth", lambda _font: None)
    samples, font = tmp_path / "samples", tmp_path / "font.sf2"
    samples.mkdir()
    font.write_bytes(b"font")
    import soundfile

    for i in range(8):
        audio = np.random.default_rng(i).uniform(-0.5, 0.5, (9000, 1 + i % 2))
        soundfile.write(samples / f"bd_number{i}.flac", audio, SAMPLE_RATE)
    return {"hours": 0.6, "seed": 1, "font": font, "samples": samples, "processes": 1}


def test_a_stopped_run_goes_on_and_more_hours_only_add(quick, tmp_path, monkeypatch):
    whole = render.render_music(tmp_path / "whole", **quick)
    done = []
    original = render.render_part

    def stopping(job, folder):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job.name)
        return original(job, folder)

    monkeypatch.setattr(render, "render_part", stopping)
    with pytest.raises(KeyboardInterrupt):
        render.render_music(tmp_path / "again", **quick)
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(render, "render_part", original)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "again.parts").glob("train-*.npy")}
    assert len(kept) == 2
    rendered = []
    monkeypatch.setattr(
        parts, "drafts", lambda job, place, make=parts.drafts: (rendered.append(job.name), make(job, place))[1]
    )
    again = render.render_music(tmp_path / "again", **quick)
    assert not {path.stem for path in kept} & set(rendered) and len(rendered) == 6
    assert again.clips == whole.clips and np.array_equal(again.audio, whole.audio)
    assert not (tmp_path / "again.parts").exists()

    longer = render.render_music(tmp_path / "longer", **{**quick, "hours": 0.8})
    ids = {clip.id: clip for clip in longer.clips}
    assert {clip.id for clip in whole.clips} < ids.keys()
    assert all(np.array_equal(longer.read(ids[clip.id]), whole.read(clip)) for clip in whole.clips)


def test_the_test_set_shares_no_clip_with_the_rest(quick, tmp_path):
    rest = render.render_music(tmp_path / "rest", **quick)
    test = render.render_music(tmp_path / "test", **quick, test=True)
    assert test.about["test"] and not rest.about["test"]
    assert not {clip.id for clip in rest.clips} & {clip.id for clip in test.clips}
    assert {clip.split for clip in test.clips} == {"validation"}
    sources = [{clip.source for clip in each.clips if clip.source} for each in (rest, test)]
    assert not sources[0] & sources[1]
    assert rest.channels == 2 and all(clip.captions for clip in rest.clips)


def test_parts_of_another_set_are_refused(quick, tmp_path):
    (tmp_path / "set.parts").mkdir()
    (tmp_path / "set.parts" / "recipe.json").write_text(json.dumps({"recipe": "other"}))
    with pytest.raises(ValueError, match="holds parts of another set"):
        render.render_music(tmp_path / "set", **quick)


def test_what_is_missing_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(scores.shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match="apt install fluidsynth fluid-soundfont-gm"):
        scores.check_fluidsynth(DEFAULT_FONT)
    monkeypatch.setattr(scores.shutil, "which", lambda _: "/bin/true")
    with pytest.raises(FileNotFoundError, match=r"none\.sf2 is missing"):
        scores.check_fluidsynth(tmp_path / "none.sf2")
    monkeypatch.setattr(render, "check_fluidsynth", lambda _: None)
    with pytest.raises(FileNotFoundError, match="apt install sonic-pi-samples"):
        render.render_music(tmp_path / "a", hours=1, seed=0, font=tmp_path / "font", samples=tmp_path)


def test_options_of_the_other_set_are_refused(tmp_path):
    result = CliRunner().invoke(data, ["render", str(tmp_path / "a"), "--hours", "2"])
    assert isinstance(result.exception, ValueError) and "for --set music" in str(result.exception)


def test_names_of_samples_are_worded():
    assert describe("bd_haus") == "haus kick" and describe("loop_amen_full") == "amen full loop"
    assert describe("elec_hi_snare") == "snare electronic sound" and describe("drum_cymbal_open") == "open hat"


@pytest.mark.skipif(NO_FLUIDSYNTH, reason="needs fluidsynth and FluidR3_GM.sf2")
def test_fluidsynth_plays_scores_where_they_are_written(tmp_path):
    made = [
        Score(voices=(Voice(program=INSTRUMENTS[name].program, pan=pan),), tones=(_tone(0, key),), seconds=1.0)
        for name, key, pan in (("piano", 48, -1.0), ("violin", 71, 0.0), ("xylophone", 72, 1.0), ("piano", 60, 0.0))
    ]
    first, again = list(scores.play(made, DEFAULT_FONT)), list(scores.play(made, DEFAULT_FONT, tmp_path))
    for audio, twin, key in zip(first[:2], again, (48, 71), strict=False):
        assert np.array_equal(audio, twin)
        assert judge_note(audio, key)
        onset = np.argmax(np.abs(audio).max(axis=1) > 0.02 * np.abs(audio).max()) / SAMPLE_RATE
        assert 0 <= onset - LEAD_SECONDS < 0.03  # measured: 0.002 and 0.011
    energy = [np.square(audio).sum(axis=0) for audio in first]
    assert energy[0][0] > 2 * energy[0][1] and energy[2][1] > 2 * energy[2][0]  # measured: 3.8 and 4.4
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(NO_FLUIDSYNTH, reason="needs fluidsynth and FluidR3_GM.sf2")
def test_a_part_is_rendered_as_it_is_planned(monkeypatch, tmp_path):
    monkeypatch.setattr(parts, "COUNTS", {name: (2, plan) for name, (_, plan) in COUNTS.items()})
    job = PartJob(seed=5, split="train", number=0, font=DEFAULT_FONT, samples=Path("/nowhere"))
    drafts = list(parts.drafts(job, tmp_path))
    assert len(drafts) == 2 * len(COUNTS)
    for draft in drafts:
        audio = np.asarray(draft.audio, np.float32)
        assert audio.shape[1] == 2 and 0.2 <= np.abs(audio).max() <= 0.9 + 1e-3
        assert 0.3 <= len(audio) / SAMPLE_RATE <= LONGEST + 0.1
        if draft.kind == "loop":
            assert len(audio) == round(240 * draft.fields["bars"] / draft.fields["bpm"] * SAMPLE_RATE)
        if draft.kind == "note" and 40 <= draft.midi <= 80:
            assert judge_note(audio, draft.midi), draft.captions
