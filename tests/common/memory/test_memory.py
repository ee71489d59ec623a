"""Memory is predicted to within 10 % of MLX's own counter, and a limit is met or refused before anything starts."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from sa3_mlx.cli.output.provenance import read_provenance
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.generation.request import InitAudio, Item, Request, Residency
from sa3_mlx.common.memory.prediction import (
    CAST,
    MARGIN,
    STREAMED_REST,
    fit,
    parse_size,
    part_bytes,
    predict,
    stored_weight_bytes,
    weight_bytes,
)
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.chunks import check_chunk_frames
from sa3_mlx.common.model.config import DiffusionConfig, DiTConfig, ModelConfig, SAMEConfig, TextEncoderConfig
from sa3_mlx.common.model.precision import Precision, allowed_precisions
from sa3_mlx.common.model.presets import LOGSNR, PRESETS, SAME_L, SAME_S
from sa3_mlx.common.model.sampling import Guidance, Sampling
from tests.support.command import make_home, refused_line, sa3, use_home, write_tone
from tests.support.tiny import with_clap
from tests.support.tiny_checkpoint import write_checkpoint

FP32 = Precision(dtype="float32", text_dtype="float32")


def _config(same: SAMEConfig, *, differential: bool) -> ModelConfig:
    """Narrow and shallow, with the shapes of the real ones otherwise."""
    return ModelConfig(
        name="narrow",
        sample_rate=44_100,
        audio_channels=2,
        same=replace(
            same,
            width=128,
            encoder_depth=3,
            decoder_depth=3,
            latent_channels=32,
            sine_gate_layers=min(2, same.sine_gate_layers),
        ),
        diffusion=DiffusionConfig(
            objective="rf_denoiser",
            max_frames=2000,
            head_room_seconds=0.5,
            shift=LOGSNR,
            text_encoder=TextEncoderConfig(
                vocab_size=500,
                width=128,
                intermediate=384,
                depth=2,
                heads=2,
                max_length=32,
            ),
            dit=DiTConfig(width=192, depth=2, memory_tokens=16, differential=differential),
        ),
    )


def _wide(config: ModelConfig) -> ModelConfig:
    """The same with larger feed-forwards."""
    assert config.diffusion is not None
    dit = replace(config.diffusion.dit, ff_mult=8)
    return replace(config, same=replace(config.same, ff_mult=6), diffusion=replace(config.diffusion, dit=dit))


CONFIGS = {"small": _config(SAME_S, differential=False), "medium": _config(SAME_L, differential=True)}
CONFIGS["wide"] = _wide(CONFIGS["small"])


def _request(seconds: float = 3.0, *, batch: int = 1, scale: float = 1.0, init: bool = False, **chunks: int) -> Request:
    audio = np.random.default_rng(0).uniform(-0.1, 0.1, (int(44_100 * seconds), 2)).astype(np.float32)
    return Request(
        items=tuple(Item(prompt="soft rain", seconds=seconds, seed=seed) for seed in range(batch)),
        sampling=Sampling(sampler="pingpong", steps=2, guidance=Guidance(scale=scale)),
        init=InitAudio(audio=audio, noise_level=0.5) if init else None,
        chunk_frames=chunks.get("decode"),
        encode_chunk_frames=chunks.get("encode"),
    )


RUNS = {
    "plain": (_request(), FP32),
    "long": (_request(8.0), FP32),
    "guided": (_request(batch=2, scale=4.0), FP32),
    "init": (_request(init=True), FP32),
    "chunks": (_request(init=True, decode=28, encode=28), FP32),
    "half": (_request(), Precision(dtype="float16", text_dtype="float32")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("narrow")
    return {name: write_checkpoint(root / name, config) for name, config in CONFIGS.items()}


def _check_prediction(folder: Path, name: str, run: str, *, runs: int, tolerance: float) -> None:
    """Against the worst of some runs: when MLX frees an array depends on its threads."""
    pytest.importorskip("mlx.core")
    from benchmarks.speed.memory import measured, predicted
    from sa3_mlx.pipeline import Pipeline

    request, precision = RUNS[run]
    pipeline = Pipeline.load(folder, dtype=precision.dtype, text_dtype="float32")
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        weights = stored_weight_bytes(file, precision)
    for residency in get_args(Residency):
        found = [measured(pipeline, request, residency=residency) for _ in range(runs)]
        plan = predict(request, CONFIGS[name], precision, residency=residency, tokens=2, weights=weights)
        wanted = predicted(plan)
        for phase in ("before", "sample", "decode"):
            ratio = getattr(wanted, phase) / max(getattr(peaks, phase) for peaks in found)
            cast = precision.dtype != "float32" and residency == "step"  # MLX is ahead by more or fewer weights
            assert abs(ratio - 1) < (2 if cast else 1) * tolerance, (
                f"{phase}, for the {residency}: predicted {ratio:.3f} of what was measured"
            )


@pytest.mark.slow  # on a busy machine a run can miss by 13 %
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["small", "medium"])
def test_prediction_is_within_ten_percent_of_the_counter(folders: dict[str, Path], name: str, run: str):
    """Measured: mostly within 5 %."""
    _check_prediction(folders[name], name, run, runs=3, tolerance=0.1)


@pytest.mark.parametrize("name", CONFIGS)
def test_prediction_is_near_the_counter_on_any_machine(folders: dict[str, Path], name: str):
    _check_prediction(folders[name], name, "chunks", runs=3, tolerance=0.25)


def test_ranking_by_a_latent_clap_is_near_the_counter(tmp_path: Path):
    """Windows of 24 frames. Measured: 0.99 to 1.02 of the counter, for widths of 128 to 384 and up to 216 frames."""
    pytest.importorskip("mlx.core")
    from sa3_mlx.pipeline import Pipeline
    from sa3_mlx.runtime import mx

    config, request = with_clap(CONFIGS["small"]), _request(20.0)
    pipeline = Pipeline.load(write_checkpoint(tmp_path, config), dtype="float32", text_dtype="float32")
    made, peaks = pipeline.generate(request), []
    for _ in range(3):
        pipeline.free(*pipeline.loaded)
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        pipeline.clap_cosines(made, residency="phase")
        assert not pipeline.loaded
        peaks.append(mx.get_peak_memory() - before)
    weights = {**weight_bytes(config, FP32), "clap": part_bytes(config, "clap", 4)}
    plan = predict(request, config, FP32, residency="phase", tokens=2, weights=weights)
    (rank,) = [phase for phase in plan.phases if phase.name == "rank"]
    assert abs(rank.peak / max(peaks) - 1) < 0.15
    stays = predict(request, config, FP32, tokens=2, weights=weights).phases[-1]
    assert stays.name == "rank" and stays.weights > rank.weights  # beside all that made the sound


def test_weights_of_a_file_are_those_of_its_configuration(folders: dict[str, Path]):
    for name, folder in folders.items():
        with TensorFile.open(folder / "model.safetensors") as file:
            for precision in (FP32, Precision(dtype="float16", text_dtype="bfloat16")):
                found = stored_weight_bytes(file, precision)
                cast = found.pop(CAST)
                assert found == weight_bytes(CONFIGS[name], precision)
                assert cast == (0 if precision == FP32 else 2 * found["dit.layers.0.ff"])


def test_packed_weights_count_as_they_are(tmp_path: Path):
    words, scales = np.zeros((192, 24), np.uint32), np.zeros((192, 3), np.float16)
    entries = [array_entry("dit.project_in.weight", words), array_entry("dit.project_in.scales", scales)]
    write_tensors(tmp_path / "q.safetensors", entries, {})
    with TensorFile.open(tmp_path / "q.safetensors") as file:
        assert stored_weight_bytes(file, FP32)["dit"] == 4 * 192 * 24 + 4 * 192 * 3


def test_real_sizes_are_those_known():
    """fp16 DiT 0.92 and 2.91 GB, SAME-L decoder 1.7 GB [P6]."""
    half = Precision(dtype="float16", text_dtype="bfloat16")
    small, medium = (weight_bytes(PRESETS[name], half) for name in ("small-music", "medium"))
    assert small["dit"] == pytest.approx(0.92e9, rel=0.01) and medium["dit"] == pytest.approx(2.91e9, rel=0.01)
    assert medium["same.decoder"] == pytest.approx(1.7e9, rel=0.01)
    assert small["text_encoder"] == pytest.approx(2 * (281.6e6 - 196.6e6), rel=0.01)


@pytest.mark.parametrize(("text", "size"), [("6GB", 6 * 10**9), ("800 mb", 8 * 10**8), ("2.5GiB", 5 * 2**29)])
def test_sizes_are_read(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "6", "GB", "-1GB", "0GB", "6 apples", "nan GB"])
def test_wrong_sizes_are_refused(text: str):
    with pytest.raises(ValueError, match="expected a number with a unit, such as 6GB"):
        parse_size(text)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_limit_is_met_by_freeing_first_and_by_smaller_chunks_then(name: str):
    config, half, request = CONFIGS[name], Precision(dtype="float16", text_dtype="bfloat16"), _request(20.0, init=True)
    generous = fit(request, config, (half,), 10**12)
    assert generous.residency == "run" and generous.chunk_frames is None
    freed = fit(request, config, (half,), int(generous.peak * MARGIN) - 1)
    assert freed.residency == "phase" and freed.chunk_frames is None and freed.peak < generous.peak
    small = fit(request, config, (half,), int(freed.peak * MARGIN) - 1)
    assert small.chunk_frames is not None and small.encode_chunk_frames is not None
    assert small.peak * MARGIN < freed.peak * MARGIN and small.residency == "phase"
    check_chunk_frames(small.chunk_frames, config.same, "decode")
    check_chunk_frames(small.encode_chunk_frames, config.same, "encode")
    assert "frames" in small.text() and "freed" in small.text() and "at most" in small.text()


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_are_read_in_every_step_where_nothing_else_fits(name: str):
    config, request = CONFIGS[name], _request(1.0)
    freed = predict(request, config, FP32, residency="phase")
    sampling = {phase.name: phase for phase in predict(request, config, FP32, residency="step").phases}["sample"]
    weights = weight_bytes(config, FP32)
    block, feed_forward = weights["dit.layers.0"], weights["dit.layers.0.ff"]
    less = {phase.name: phase for phase in freed.phases}["sample"].weights - sampling.weights
    assert less == 2 * block - int(feed_forward + STREAMED_REST * (block - feed_forward))
    plan = fit(request, PRESETS["medium"], (Precision(dtype="float16", text_dtype="bfloat16"),), int(2.6e9))
    assert plan.residency == "step" and "read in every step" in plan.text() and plan.chunk_frames is None


def test_a_refusal_says_what_would_help():
    config, request = PRESETS["small-music"], _request(30.0, batch=4)
    with pytest.raises(ValueError, match=r"small-music needs 0\.\d+ GB .phase.*; with --batch 1 it is 0\.4"):
        fit(request, config, (FP32,), 52 * 10**7)
    with pytest.raises(ValueError, match="choose a smaller model or fewer seconds"):
        fit(request, config, (FP32,), 10**8)


def test_16_bits_are_tried_where_the_type_is_free():
    config, request = PRESETS["small-music"], _request(30.0, batch=4)
    free = allowed_precisions("auto", "auto", on_gpu=False)
    assert [(p.dtype, p.text_dtype) for p in free] == [
        ("float32", "float32"),
        ("float16", "float32"),
        ("float16", "bfloat16"),
    ]
    assert allowed_precisions("float32", "float32", on_gpu=False) == (FP32,)
    assert len(allowed_precisions("auto", "auto", on_gpu=True)) == 1
    assert fit(request, config, free, 10**12).precision == FP32
    plan = fit(request, config, free, 2 * 10**9)  # refused in float32 alone
    assert plan.precision == free[1] and "float16, text in float32" in plan.text()
    with pytest.raises(ValueError) as refusal:
        fit(request, config, free, 10**8)
    assert "--dtype" not in str(refusal.value), "it was tried"


def test_chunks_of_a_limit_give_the_same_audio(folders: dict[str, Path]):
    """Measured: chunked attention 0, sliding 1e-6 of the level."""
    pytest.importorskip("mlx.core")
    from sa3_mlx.pipeline import Pipeline

    for name, folder in folders.items():
        pipeline = Pipeline.load(folder)
        audio = [pipeline.generate(request).audio[0] for request in (RUNS["init"][0], RUNS["chunks"][0])]
        np.testing.assert_allclose(audio[1], audio[0], atol=1e-4 * np.abs(audio[0]).max(), err_msg=name)


def test_the_command_prints_the_plan_and_refuses_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    home = make_home(tmp_path / "home")
    (tmp_path / "work").mkdir()
    use_home(home, monkeypatch)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("sa3_mlx.cli.backend.hold_memory", lambda *_: None)  # lasts as long as the process
    result = sa3(capfd, "generate", "rain", "--seconds", "1", "--out", "a.wav", "--max-memory", "1GB")
    assert result.code == 0 and "at most" in result.err and "all parts stay" in result.err
    write_tone(Path("in.wav"))
    result = sa3(capfd, "vary", "in.wav", "--out", "b.wav", "--max-memory", "2.4MB", "--seed", "1")
    assert result.code == 0 and "freed after use" in result.err, result
    assert "arrays of the model" in result.err and "on top" in result.err
    made = read_provenance(Path("b.wav")).request
    assert made.chunk_frames is not None and made.encode_chunk_frames is not None
    assert "byte for byte" in sa3(capfd, "rerun", "b.wav").out
    line = refused_line(capfd, home, "generate", "rain", "--seconds", "3", "--out", "c.wav", "--max-memory", "1MB")
    assert "little needs" in line and "allow" in line
    line = refused_line(capfd, home, "generate", "rain", "--out", "c.wav", "--max-memory", "much")
    assert "6GB" in line
