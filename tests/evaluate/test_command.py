"""Test ``sa3 evaluate`` on a random model, the flow-matching loss beside its baselines, and what it is asked to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.command import sa3

torch = pytest.importorskip("torch")
pytest.importorskip("scipy", reason="the training extra is not installed")

from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.sampling import Sampling
from sa3_torch.evaluate.comparison import ComparisonRow, Entry, compare, compare_one_step
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.measures.analysis import Analyser
from sa3_torch.evaluate.measures.flow import LatentClip, TorchFlow, Velocity, flow_losses, other_captions
from sa3_torch.evaluate.measures.frechet import frechet
from sa3_torch.evaluate.measures.inpainting import measure_inpainting
from sa3_torch.evaluate.measures.one_step import ONE_STEP, many_steps, one_step_error, one_steps
from sa3_torch.evaluate.real import analyse_real, real_count
from sa3_torch.evaluate.report import FORMAT, _cell, draw, notes, report, table
from sa3_torch.evaluate.run import EvaluateOptions, Evaluator, batches, clip_items
from sa3_torch.evaluate.stored import split_latents
from sa3_torch.pipeline import Pipeline
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.data.encode.pre_encode import EncodeConfig, PreEncoder
from sa3_torch.train.data.encode.sources import ClipSource
from sa3_torch.train.data.latents import LatentSet
from sa3_torch.train.flow.wiener import WienerBaseline
from sa3_torch.trajectory import visit


@pytest.fixture(scope="module")
def latents(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentSet:
    """Encode the clips by the random model's autoencoder."""
    encoding = EncodeConfig(copies=1, seed=0, shard_frames=1000, chunk_frames=None)
    source = ClipSource(ClipSet(workspace / "clips"), 2)
    return PreEncoder(source, workspace / "random", tmp_path_factory.mktemp("evaluate") / "latents", encoding).run()


def test_samplings_are_written_in_one_way() -> None:
    fast = Sampling.parse("pingpong:8:1")
    assert (fast.sampler, fast.steps, fast.guidance.scale, str(fast)) == ("pingpong", 8, 1.0, "pingpong:8:1")
    assert str(Sampling.parse("euler:50:3.5")) == "euler:50:3.5"
    plain = Sampling.parse("dpmpp:15:3:0")
    assert str(plain) == "dpmpp:15:3:0" and plain.guidance.apg == 0
    for text in ("euler", "euler:x:1", "euler:1:1:x", "euler:1:1:1:1"):
        with pytest.raises(ValueError, match="expected SAMPLER:STEPS:GUIDANCE"):
            Sampling.parse(text)
    with pytest.raises(ValueError, match="sampler is 'eular': allowed are euler"):
        Sampling.parse("eular:8:1")


def test_prompts_are_as_frequent_as_in_the_real_clips(workspace: Path) -> None:
    clips = ClipSet(workspace / "clips").select("validation")
    chosen = clip_items(clips, 3 * len(clips), 0)
    assert sorted(made.clip.id for made in chosen) == sorted(3 * [clip.id for clip in clips])
    assert len({made.item.seed for made in chosen + clip_items(clips, 8, 1)}) == len(chosen) + 8
    assert [made.clip.id for made in clip_items(clips, 8, 1)] != [made.clip.id for made in clip_items(clips, 8, 2)]
    rows = batches(chosen, 5)
    assert sorted(i for part in rows for i in part) == list(range(len(chosen))) and max(map(len, rows)) == 5


class Linear:
    """Predict as the linear baseline, whatever the caption; without one, zero."""

    def __init__(self, baseline: WienerBaseline) -> None:
        self.baseline, self.seen = baseline, [[], []]  # type: ignore[var-annotated]

    def condition(
        self, captions: Sequence[str], seconds: Sequence[float], valid: np.ndarray, *, dropped: bool
    ) -> Velocity:
        self.seen[dropped].append(list(captions))
        assert len(seconds) == len(captions) == len(valid)

        def velocity(x: np.ndarray, t: float) -> np.ndarray:
            out = np.full_like(x, 1000)  # padding must not count
            for row, length in enumerate(valid.sum(1)):
                out[row, :length] = 0 if dropped else self.baseline.velocity(x[row, :length], t)
            return out

        return velocity


def test_the_loss_of_the_linear_model_is_the_linear_baseline() -> None:
    random = np.random.default_rng(0)
    made = [random.standard_normal((int(n), 3)).astype(np.float32) * [0.5, 1, 2] for n in random.integers(3, 7, 60)]
    clips = [
        LatentClip(latents=z.astype(np.float32), caption="ab"[i % 2], seconds=1.0) for i, z in enumerate(made[:20])
    ]
    model, done = Linear(WienerBaseline(made[20:], "frame")), []
    found = flow_losses(model, clips, made[20:], batch=8, advance=done.append)
    np.testing.assert_allclose(found.loss, found.wiener_frame, rtol=1e-5)
    assert found.shuffled_ratio == pytest.approx(1) and found.dropped_ratio > 1
    assert found.wiener_ratio >= 1 - 1e-5 and found.zero_ratio < 1 and done == [8, 8, 4] and found.clips == 20
    captions, others = (model.seen[0][i::2] for i in range(2))
    assert all(a != b for own, other in zip(captions, others, strict=True) for a, b in zip(own, other, strict=True))
    alone = [LatentClip(latents=z.astype(np.float32), caption="a", seconds=1.0) for z in made[:3]]
    assert other_captions(alone, 0) == ["a"] * 3
    assert flow_losses(model, alone, made, times=(0.5,)).shuffled_ratio is None


def test_the_velocity_is_that_of_sampling(workspace: Path) -> None:
    """Compare at the states of a run (measured: equal to 1e-6)."""
    pipeline = Pipeline.load(workspace / "random", device="cpu")
    request = Request(items=(Item(prompt="low bell", seconds=0.4, seed=3),), sampling=Sampling.parse("euler:2:2"))
    conditional, _, _, empty = visit(pipeline, request)
    flow = TorchFlow(pipeline)
    for state, dropped in ((conditional, False), (empty, True)):
        valid = np.ones(state.x.shape[:2], bool) if state.cond.valid is None else state.cond.valid.numpy()
        velocity = flow.condition(["low bell"], [0.4], valid, dropped=dropped)
        found = velocity(state.x.numpy(), float(state.t[0]))[valid]
        np.testing.assert_allclose(found, state.velocity.numpy()[valid], rtol=1e-4, atol=1e-5)


def test_one_step_of_the_teacher_itself_has_no_error(workspace: Path) -> None:
    pipeline = Pipeline.load(workspace / "random", device="cpu")
    parts = [[Item(prompt="bell", seconds=0.3, seed=1), Item(prompt="rain", seconds=0.4, seed=2)]]
    one = one_steps(pipeline, parts)
    assert len({len(z) for z in one}) == 2
    assert one_step_error(one, many_steps(pipeline, parts, ONE_STEP)) == 0
    assert one_step_error(one, many_steps(pipeline, parts, Sampling.parse("euler:4:1"))) > 1e-3


def test_inpainting_of_a_random_model_is_worse_than_its_own_autoencoder(workspace: Path) -> None:
    """Compare with its error, which would be 0; a clip too short is left out."""
    pipeline = Pipeline.load(workspace / "random", device="cpu")
    clip = ClipSet(workspace / "clips").clips[0]
    sound = np.random.default_rng(0).standard_normal((40_000, 2)).astype(np.float32) * 0.1
    pairs, done = [(sound, clip), (sound[:1000], clip), (sound[:30_000], clip)], []
    found = measure_inpainting(pipeline, pairs, Sampling.parse("euler:1:1"), seed=0, batch=1, advance=done.append)
    assert found.clips == 2 and done == [1, 1] and found.kept_error > 0.1 and found.seam > 0
    with pytest.raises(ValueError, match="at least 27000 samples"):
        measure_inpainting(pipeline, pairs[1:2], Sampling.parse("euler:1:1"), seed=0, batch=1)


def test_every_measure_of_a_run(workspace: Path) -> None:
    pipeline, clips = Pipeline.load(workspace / "random", device="cpu"), ClipSet(workspace / "clips")
    analyser, done = Analyser(judge=Judge(), spaces=()), []
    real = analyse_real(analyser, pipeline, clips, "held-out", 6, advance=done.append)
    assert sum(done) == real_count(clips, pipeline.config, "held-out", 6) == 4 + 4 + 12
    assert real.about["clips"] == 4 and real.about["judge_real"]["notes_pitch"] == 1 and not real.about["enough"]
    options, counted = EvaluateOptions(prompts="held-out", clips=6, batch=4, inpaint=0), []
    evaluator = Evaluator(analyser, real, clips, options)
    sampling = Sampling.parse("euler:1:1")
    measures, details = evaluator.run(pipeline, sampling, 0, counted.append)
    again, _ = evaluator.run(pipeline, sampling, 0)
    assert sum(counted) == 6 == evaluator.count()
    slow = SimpleNamespace(config=replace(pipeline.config, name="slow", sample_rate=8000))
    with pytest.raises(ValueError, match="slow works at 8000 Hz: evaluation is for 44100 Hz"):
        evaluator.run(slow, sampling, 0)  # type: ignore[arg-type]
    timing = "sample_seconds_per_clip"
    assert {k: v for k, v in again.items() if k != timing} == {k: v for k, v in measures.items() if k != timing}
    assert measures["frechet_judge"] > real.about["frechet_judge"]["real_halves"]  # type: ignore[operator]
    made, rebuilt = details["frechet_judge"]["value"], real.rebuilt.spaces["judge"]
    assert made == measures["frechet_judge"] != measures["frechet_judge_rebuilt"]
    assert frechet(rebuilt, real.asked.spaces["judge"]) == real.about["frechet_judge"]["autoencoder"] > 1
    clip = clips.select("validation")[0]
    audio = np.repeat(clips.read(clip)[:, :1], 2, axis=1)
    embedding = analyser.judge.classifier.embedding(pipeline.decode(pipeline.encode(audio))[: len(audio)])
    np.testing.assert_allclose(embedding, rebuilt[0], rtol=1e-4, atol=1e-4)
    assert not measures["not_finite"] and measures["diversity"] is not None
    labels = {clip.label for clip in real.asked.clips}
    assert set(details["by_class"]) <= labels and all(found["shift"] > 0 for found in details["by_class"].values())
    worst = details["memorisation"]["worst"][0]
    assert worst["training"] in {clip.id for clip in clips.select("train")} and worst["prompt"]
    entry = Entry(name="random", pipeline=pipeline, sampling=sampling)
    errors = compare_one_step([entry], entry, evaluator, 2)
    assert errors == {"random": [0, 0]}


def test_prompts_of_training_clips(workspace: Path) -> None:
    """Choose recipes by them: no held-out clip is analysed, and nothing is said about copies."""
    pipeline, clips = Pipeline.load(workspace / "random", device="cpu"), ClipSet(workspace / "clips")
    analyser, done = Analyser(judge=Judge(), spaces=()), []
    real = analyse_real(analyser, pipeline, clips, "training", 5, advance=done.append)
    assert sum(done) == real_count(clips, pipeline.config, "training", 5) == 5 + 5
    assert len(real.asked.clips) == 5 and all(clip.split == "train" for clip in real.asked.clips)
    assert real.training is None
    evaluator = Evaluator(analyser, real, clips, EvaluateOptions(prompts="training", clips=5, batch=4, inpaint=0))
    entry = Entry(name="random", pipeline=pipeline, sampling=Sampling.parse("euler:1:1"))
    row = compare(evaluator, entry, 3)
    assert "copies" not in row.mean and row.mean["frechet_judge"] is not None and row.mean["diversity"] is not None
    found = report([row], real, evaluator.options, 3, {}, {}, None)
    assert len(row.details[0]["sounds"]) == 5 and found["rows"][0]["interval"]["all"]["value"] == pytest.approx(
        row.mean["all"]
    )
    assert found["real"]["floor_clips"] == 2 and "FD: of 2 and others" in table(found)
    assert "the floor of FD is of 2 real clips" in table(found)
    assert "prompts and real clips are of the training data" in table(found) and "near copies" not in table(found)


def test_shares_are_compared_on_the_same_prompts(workspace: Path) -> None:
    """Twenty prompts of 4 sounds, right with 0 to 100 %, and 25 points less: every prompt differs by the same, so that
    the difference is exact, although either share is uncertain by far more."""
    entry = Entry(
        name="x", pipeline=Pipeline.load(workspace / "random", device="cpu"), sampling=Sampling.parse("euler:1:1")
    )

    def row(right: Sequence[int]) -> ComparisonRow:
        judged = [{"prompt": f"p{i}", "all": k < n, "class": True} for i, n in enumerate(right) for k in range(4)]
        return ComparisonRow(entry=entry, measures=({"all": 0.0},), details=({"sounds": judged},))

    first, second = row([1, 2, 3, 4] * 5), row([0, 1, 2, 3] * 5)
    alone, less = first.intervals()["all"], second.intervals(first)["all"]
    assert alone.value == 0.625 and alone.prompts == 20 and "notes_pitch" not in first.intervals()
    # the mean of 20 prompts with deviation sqrt(1.25) / 4
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * (1.25 / 16 / 20) ** 0.5, rel=0.1)
    assert (less.value, less.low, less.high) == (-0.25, -0.25, -0.25)
    found = second.to_dict(first)
    assert found["to_first"]["all"] == {"value": -0.25, "low": -0.25, "high": -0.25, "prompts": 20}
    alone = found["interval"]["all"]
    shown = f"37.5 [{100 * alone['low']:.1f}, {100 * alone['high']:.1f}]"
    assert _cell(found, "all") == f"{shown}*" and "*" not in _cell(first.to_dict(first), "all")


class Words:
    """Pretend to be a CLAP on latents: two channels of the sound, the length of the text."""

    def __init__(self) -> None:
        self.loaded: list[tuple[Path, Path]] = []

    def load(self, folder: Path, *, autoencoder: Path) -> Words:
        self.loaded.append((folder, autoencoder))
        return self

    def embed_audio(self, latents: torch.Tensor, valid: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert valid.shape == latents.shape[:2] and len(t) == len(latents)
        return torch.nn.functional.normalize(latents.mean(1)[:, :2], dim=-1)

    def encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([[float(len(text)), 11.0] for text in texts])
        return ids, ids > 0

    def embed_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(ids * mask, dim=-1)


def test_the_command(
    workspace: Path,
    latents: LatentSet,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Give two samplings, a teacher, latents: a table, three files; JSON where it is asked for."""
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    model = str(workspace / "random")
    common = ("--data", workspace / "clips", "--backend", "torch", "--inpaint", "0", "--clips", "4", "--seeds", "2")
    clap = Words()
    monkeypatch.setattr("sa3_torch.train.clap.network.LatentClap.load", clap.load)
    result = sa3(
        capfd,
        "evaluate",
        model,
        "--latent-clap",
        tmp_path,
        *common,
        "--latents",
        latents.folders[0],
        "--setting",
        "euler:1:1",
        "--against",
        f"{model}@pingpong:2:1",
        "--teacher",
        f"{model}@euler:2:1",
        "--out",
        tmp_path / "out",
    )
    assert result.code == 0, result
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "{" not in result.out
    less = ("--clips", "2", "--seeds", "1", "--setting", "euler:1:1", "--json", "--out", tmp_path / "json")
    printed = sa3(capfd, "evaluate", model, *common, *less)
    assert json.loads(printed.out) == json.loads((tmp_path / "json" / "report.json").read_text())
    assert [row["setting"] for row in data["rows"]] == ["euler:1:1", "pingpong:2:1"]
    assert all(len(row["seeds"]) == 2 and row["spread"]["frechet_judge"] is not None for row in data["rows"])
    assert len(data["flow"]["random"]["loss"]) == 5 and len(data["one_step"]["errors"]["random"]) == 2
    assert clap.loaded == [(tmp_path, workspace / "random")] * 2
    assert -1 <= data["real"]["latent_clap"]["own"] <= 1 and "clap cosine" in result.out
    assert all(-1 <= row["mean"]["clap_own"] <= 1 for row in data["rows"])
    assert all(row["interval"]["clap_own"]["value"] == pytest.approx(row["mean"]["clap_own"]) for row in data["rows"])
    assert len(notes(data)) == 4 and all(f"note: {note}" in result.out for note in notes(data))
    assert "FD judge" in result.out and "FD rebuilt" in result.out
    classes = set(data["rows"][0]["details"][0]["by_class"])
    lines = ("classes beside rebuilt clips", "tail, dB: random", *classes)
    assert classes and all(line in result.out for line in lines)
    assert (tmp_path / "out" / "report.txt").read_text() in result.out + "\n"
    assert (tmp_path / "out" / "report.png").stat().st_size > 10_000
    figures: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    draw(tmp_path / "again.png", data)
    ticks = {panel.get_title(): [tick.get_text() for tick in panel.get_xticklabels()] for panel in figures[0].axes}
    assert ticks["FD judge"] == ["random\neuler:1:1", "random\npingpong:2:1"]
    assert ticks["class means: squared distance to rebuilt clips"] == sorted(classes)


def test_reports_of_before_are_read() -> None:
    """Lay out every report that is kept; the first ones were made without measures by class."""
    kept = sorted((Path(__file__).parents[2] / "benchmarks" / "results" / "evaluation").rglob("evaluation-*.json"))
    assert len(kept) > 10
    for path in kept:
        data = json.loads(path.read_text())
        assert data["format"] == FORMAT
        assert f"{data['rows'][0]['model']} {data['rows'][0]['setting']}" in table(data)


def test_what_cannot_be_evaluated_is_refused(
    workspace: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    args = ("evaluate", workspace / "random", "--data", workspace / "clips", "--out", tmp_path / "out")
    for more, message in (
        (("--latents", workspace / "latents", "--backend", "torch"), "the autoencoder of test makes other latents"),
        (("--teacher", "demo"), "expected MODEL@SAMPLER:STEPS:GUIDANCE"),
        (("--setting", "fast"), "expected SAMPLER:STEPS:GUIDANCE"),
        (("--clap", tmp_path / "none"), "no such folder"),
    ):
        result = sa3(capfd, *args, *more)
        assert result.code == 2 and message in result.err, result
    assert not (tmp_path / "out").exists()


def test_latents_are_split_and_cut(latents: LatentSet) -> None:
    held_out, training = split_latents(latents, 2)
    assert len(held_out) == 4 and len(training) == 12 and {len(z) for z in training} == {2}
    assert {clip.caption for clip in held_out} == {"piano note A3", "white noise"}
