"""Bells are what they are said to be, and what an adapter teaches and takes is counted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the measurement needs both twins")

from click.testing import CliRunner

from benchmarks.quality import new_sound
from benchmarks.quality.bells import HELD_OUT, RATIO, bell, bells
from benchmarks.quality.new_sound import SoundRun, measure, new_prompts, same_audio
from sa3_mlx.common.adapters.applied import Applied
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.quant.calibration import read_prompts
from sa3_torch.evaluate.judge import training
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.judge.training import train_classifier
from sa3_torch.evaluate.prompts import held_out_prompts
from sa3_torch.train.data.clip_cache import ClipSet, Draft, write_clips
from sa3_torch.train.data.user_folder import import_folder
from sa3_torch.train.demo_set.synth import noise_clip
from sa3_torch.train.run.random import generator
from tests.support.adapters import adapter_config, random_adapter
from tests.support.command import SMALL
from tests.support.tiny_checkpoint import write_checkpoint


def test_a_bell_is_inharmonic_when_struck_and_a_sine_at_the_end() -> None:
    audio, hz = bell(60, generator(0, 1))[:, 0], 440 * 2 ** (-9 / 12)
    assert len(audio) == 66_150 and 0.5 <= np.abs(audio).max() <= 0.8
    spectrum = np.abs(np.fft.rfft(audio[:11_025] * np.hanning(11_025)))  # bins of 4 Hz
    above = (1 + RATIO) * hz / 4
    between = 2 * hz / 4  # where a harmonic sound would have its second partial
    assert spectrum[round(above) - 1 : round(above) + 2].max() > 10 * spectrum[round(between)]
    assert not np.array_equal(audio, bell(60, generator(0, 2))[:, 0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bells, the cache of their import, and a cache of noises."""
    folder = tmp_path_factory.mktemp("bells")
    result = CliRunner().invoke(bells, [str(folder / "wavs"), "--strikes", "2"])
    assert result.exit_code == 0 and f"{2 * (24 - len(HELD_OUT))} bells" in result.output
    import_folder(folder / "wavs", folder / "set", captions_required=True)
    drafts = [
        Draft(
            id=f"{colour}-{n}",
            captions=(f"{colour} noise",),
            kind="noise",
            label=colour,
            instrument=None,
            midi=None,
            split="validation" if n == 0 else "train",
            audio=noise_clip(generator(n, i), colour),
        )
        for i, colour in enumerate(("white", "brown"))
        for n in range(6)
    ]
    write_clips(folder / "noises", iter(drafts), channels=1, about={})
    return folder


def test_held_out_pitches_are_prompts_and_no_clips(made: Path) -> None:
    prompts = read_prompts(made / "wavs" / "unseen.txt")
    captions = {clip.caption for clip in ClipSet(made / "set").clips}
    assert len(prompts) == len(HELD_OUT) and len(captions) == 24 - len(HELD_OUT)
    assert captions.isdisjoint(prompt.text for prompt in prompts)
    assert captions >= {prompt.text for prompt in read_prompts(made / "wavs" / "taught.txt")}


@pytest.fixture(scope="module")
def judge(made: Path) -> Judge:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "STEPS", 200)
        train_classifier([ClipSet(made / "noises"), ClipSet(made / "set")], made / "judge.npz", seed=0)
    return Judge(made / "judge.npz")


def test_the_judge_learns_the_new_class_beside_the_old_ones(made: Path, judge: Judge) -> None:
    assert judge.classifier.classes == ["brown", "user", "white"]
    for midi in HELD_OUT:
        assert judge.classifier.classify(bell(midi, generator(5, midi))).label == "user"
    noises = ClipSet(made / "noises")
    assert [judge.classifier.classify(noises.read(clip)).label for clip in noises.select("validation")] == [
        "white",
        "brown",
    ]


def test_sounds_are_counted_with_the_adapter_and_without(
    made: Path, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "model", SMALL)
    applied = (Applied(adapter=random_adapter(folder, adapter_config("dora-rows"), seed=0)),)
    run = SoundRun(sampling=Sampling(sampler="euler", steps=2, guidance=Guidance(scale=2.0)), seeds=1, data_seed=0)
    new = new_prompts(read_prompts(made / "wavs" / "unseen.txt"))[:2]
    some = [dataclasses.replace(prompt, seconds=0.3) for prompt in held_out_prompts(0)[-2:]]
    monkeypatch.setattr(new_sound, "held_out_prompts", lambda _: some)

    result = measure(folder, applied, run, {"unseen": new}, judge, ClipSet(made / "set"))
    assert result["new_real"] == 1
    assert {name for name in result if name.startswith("new")} == {
        "new_unseen",
        "new_unseen_without",
        "new_real",
        "new_rebuilt",
    }
    assert result["old_class_lost_points"] == 100 * (result["old_class_without"] - result["old_class"])

    ratios = same_audio(folder, applied, run, new)
    assert ratios.keys() == {"snr_mlx_merged", "snr_torch", "snr_torch_merged"}
    assert min(ratios.values()) > 40


def test_groups_of_the_same_name_are_refused(made: Path) -> None:
    taught = str(made / "wavs" / "taught.txt")
    command = ["demo", "--lora", "any", "--sounds", str(made), "--new", str(made), "--prompts", taught]
    result = CliRunner().invoke(new_sound.new_sound, [*command, "--prompts", taught])
    assert "their names, which the groups are called by, must differ" in str(result.exception)
