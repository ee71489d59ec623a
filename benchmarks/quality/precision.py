"""Compare a model in several precisions with itself in fp32 from the same noise: ``python -m benchmarks precision``.

Per row: error of the velocity at states of the fp32 model, time by time; distance of the sounds to those of fp32 from
the same noise; Frechet distance of all sounds, in the judge's feature space, to fp32 with other seeds and to real ones;
adherence; size on disk; peak memory. A quantized diffusion model makes another plausible sound, not a noisy copy: the
distances to fp32 say how soon runs part, adherence and Frechet distance say what it costs.

Sounds come from PyTorch, which holds the values that the packed weights stand for. Memory is that of MLX, which
computes on the packed weights.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.options import RESULTS_FOLDER, SamplingChoice
from benchmarks.speed.machine import describe
from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.generation.clips import open_tokenizer
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.measures.spectra import HOP, log_mel_l1, mono
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE, expected_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.quant.calibration import requests, usual_prompts
from sa3_mlx.common.quant.format import Quantization
from sa3_mlx.common.quant.recipes import RECIPES
from sa3_torch.dit import Conditioning, DiT
from sa3_torch.evaluate.judge.judge import Judge, all_right
from sa3_torch.evaluate.measures.frechet import frechet
from sa3_torch.evaluate.prompts import held_out_prompts, sounds
from sa3_torch.pipeline import DTYPES, Pipeline
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.trajectory import State, visit

OTHER_SEEDS = 500  # from here on, for the row that shows the noise of the measurement
RESAMPLES = 2000
FLOOR_DB = -60.0
PEAK_SECONDS = 1.5  # of the clip whose memory is measured
Audio = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SoundsPlan:
    """Say which sounds are made, and how."""

    sampling: Sampling
    seeds: int
    data_seed: int


@dataclass(frozen=True, kw_only=True)
class PrecisionRow:
    """Hold one precision. Errors and distances are to fp32 with the same noise; None where nothing can be measured."""

    name: str
    bits_per_weight: float | None  # of the quantized layers
    velocity_error: float | None  # relative L2
    velocity_error_by_time: dict[str, float] | None  # "0.93" -> error, 1 is noise
    log_mel: float  # mean absolute difference of log10 mel amplitudes
    envelope_db: float  # mean absolute difference of levels
    frechet_to_fp32: float  # other seeds
    frechet_to_real: float | None
    adherence: float  # share of clips of which everything asked for is heard
    adherence_interval: tuple[float, float]  # 95 %, prompts resampled
    adherence_change: float  # to fp32, in points
    adherence_change_interval: tuple[float, float]
    class_share: float
    file_bytes: int
    peak_bytes: int | None  # MLX, one short clip


@dataclass(frozen=True, kw_only=True)
class JudgedSounds:
    """Hold the sounds of all prompts and seeds in one order, with what the judge finds in them."""

    audio: tuple[Audio, ...]
    right: NDArray[np.float64]  # (prompts, seeds): everything that was asked for is heard
    right_class: NDArray[np.float64]
    embedding: NDArray[np.float64]  # (clips, 40)


class PrecisionBench:
    """Keep the fp32 model's states and sounds; ``row`` compares another precision with them."""

    def __init__(self, folder: Path, plan: SoundsPlan, data: Path | None) -> None:
        self.folder, self.plan, self.judge = folder, plan, Judge()
        self.prompts = held_out_prompts(plan.data_seed)
        self.reference = Pipeline.load(folder)
        config = self.reference.config
        runs = requests(usual_prompts(self.reference.tokenizer), config, held_out=True)
        self.states = [state for run in runs for state in visit(self.reference, run)]
        self.sounds = self._make(self.reference, 0)
        self.others = self._make(self.reference, OTHER_SEEDS)
        self.real = None if data is None else self._real(ClipSet(data))

    def floor(self) -> PrecisionRow:
        """Compare fp32 with other seeds: what differs here is not precision."""
        return self._row("fp32, other seeds", self.folder, "float32", self.others, against=self.sounds)

    def row(self, name: str, folder: Path, dtype: str) -> PrecisionRow:
        """Compare one precision of the model."""
        pipeline = Pipeline.load(folder, dtype=dtype)
        made = self.sounds if (folder, dtype) == (self.folder, "float32") else self._make(pipeline, 0)
        found = self._row(name, folder, dtype, made, against=self.others)
        by_time = velocity_errors(self.states, cast(DiT, pipeline.load_part("dit")), DTYPES[dtype])
        return replace(found, velocity_error=by_time.pop("all"), velocity_error_by_time=by_time)

    def _row(self, name: str, folder: Path, dtype: str, made: JudgedSounds, *, against: JudgedSounds) -> PrecisionRow:
        change = 100 * (made.right - self.sounds.right)
        pairs = list(zip(self.sounds.audio, made.audio, strict=True))
        bits, size = stored(folder, dtype)
        return PrecisionRow(
            name=name,
            bits_per_weight=bits,
            velocity_error=None,
            velocity_error_by_time=None,
            log_mel=float(np.mean([log_mel_l1(a, b) for a, b in pairs])),
            envelope_db=float(np.mean([np.abs(envelope_db(a) - envelope_db(b)).mean() for a, b in pairs])),
            frechet_to_fp32=frechet(made.embedding, against.embedding),
            frechet_to_real=None if self.real is None else frechet(made.embedding, self.real),
            adherence=float(made.right.mean()),
            adherence_interval=interval(made.right),
            adherence_change=float(change.mean()),
            adherence_change_interval=interval(change),
            class_share=float(made.right_class.mean()),
            file_bytes=size,
            peak_bytes=peak_memory(folder, dtype, bits),
        )

    def _make(self, pipeline: Pipeline, first_seed: int) -> JudgedSounds:
        plan = self.plan
        made = sounds(pipeline, self.prompts, sampling=plan.sampling, seeds=plan.seeds, first_seed=first_seed)
        pairs = list(made)
        verdicts = [self.judge.check(audio, prompt) for audio, prompt in pairs]
        right = np.array([all_right(found) for found in verdicts], float).reshape(-1, plan.seeds)
        right_class = np.array([found["class"] for found in verdicts], float).reshape(-1, plan.seeds)
        embedding = np.stack([self.judge.classifier.embedding(audio) for audio, _ in pairs]).astype(np.float64)
        audio = tuple(audio for audio, _ in pairs)
        return JudgedSounds(audio=audio, right=right, right_class=right_class, embedding=embedding)

    def _real(self, clips: ClipSet) -> NDArray[np.float64]:
        chosen = [clip for clip in clips.select("validation") if clip.captions]
        return np.stack([self.judge.classifier.embedding(clips.read(clip)) for clip in chosen]).astype(np.float64)


def velocity_errors(states: Sequence[State], dit: DiT, dtype: torch.dtype) -> dict[str, float]:
    """Return the relative L2 error by time ("0.93"), and over all states ("all")."""
    sums: dict[str, list[float]] = {}
    prepared: tuple[Conditioning, Any] | None = None
    with torch.no_grad():
        for state in sorted(states, key=lambda state: id(state.cond)):
            if prepared is None or prepared[0] is not state.cond:
                prepared = (state.cond, dit.prepare(_cast(state.cond, dtype)))
            t = torch.from_numpy(state.t).to(state.x.device)
            velocity = dit(state.x.to(dtype), t, prepared[1]).float()
            wrong = float((velocity - state.velocity).square().sum())
            right = float(state.velocity.square().sum())
            for key in (f"{float(state.t[0]):.2f}", "all"):
                old = sums.setdefault(key, [0.0, 0.0])
                sums[key] = [old[0] + wrong, old[1] + right]
    return {key: math.sqrt(wrong / right) for key, (wrong, right) in sorted(sums.items())}


def _cast(cond: Conditioning, dtype: torch.dtype) -> Conditioning:
    def to(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype)

    return replace(cond, context=to(cond.context), seconds=cond.seconds.to(dtype), local=to(cond.local))


def envelope_db(audio: Audio) -> NDArray[np.float64]:
    """Return the level every 12 ms in dB, not below -60."""
    signal = mono(audio)
    frames = np.pad(signal, (0, -len(signal) % HOP)).reshape(-1, HOP)
    return np.maximum(10 * np.log10(np.maximum(np.square(frames).mean(axis=1), 1e-12)), FLOOR_DB)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of (prompts, seeds) by resampling prompts."""
    rng, means = np.random.default_rng(0), values.mean(axis=1)
    drawn = means[rng.integers(0, len(means), (RESAMPLES, len(means)))].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def stored(folder: Path, dtype: str) -> tuple[float | None, int]:
    """Return bits per weight of the quantized layers, if any, and bytes on disk, of a plain model in this precision."""
    path = folder / WEIGHTS_FILE
    with TensorFile.open(path) as file:
        quantization = Quantization.read(file)
    config = Pipeline.load(folder).config
    shapes = expected_tensors(config)
    if quantization is None:
        return None, sum(math.prod(shape) for shape in shapes.values()) * DTYPES[dtype].itemsize
    sizes = {layer: math.prod(shapes[f"{layer}.weight"]) for layer in quantization.grids()}
    bits = sum(grid.bits_per_weight * sizes[layer] for layer, grid in quantization.grids().items())
    return bits / sum(sizes.values()), path.stat().st_size


def peak_memory(folder: Path, dtype: str, bits: float | None) -> int | None:
    """Measure what MLX holds at most while it makes a clip in one step, all parts in memory; None without MLX.

    Quantized models compute in fp16 here, as they would on a GPU; their packed weights stay packed.
    """
    try:
        from sa3_mlx.pipeline import Pipeline as MlxPipeline
        from sa3_mlx.runtime import mx
    except ImportError:
        return None
    pipeline = MlxPipeline.load(folder, dtype=dtype if bits is None else "float16")
    item = Item(prompt="piano note C4", seconds=min(PEAK_SECONDS, pipeline.config.max_seconds), seed=0)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pipeline.generate(Request(items=(item,), sampling=Sampling(sampler="euler", steps=1)))
    return int(mx.get_peak_memory() - before)


COLUMNS = (
    "precision",
    "bits",
    "velocity",
    "log-mel",
    "env dB",
    "FD fp32",
    "FD real",
    "adherence",
    "change",
    "MB",
    "peak MB",
)


def table(rows: Iterable[PrecisionRow]) -> str:
    """Lay rows out for people, intervals in brackets."""
    lines = [COLUMNS, *map(_line, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _line(row: PrecisionRow) -> tuple[str, ...]:
    low, high = (100 * value for value in row.adherence_interval)
    less, more = row.adherence_change_interval
    return (
        row.name,
        _number(row.bits_per_weight, 2),
        _number(row.velocity_error, 4),
        _number(row.log_mel, 3),
        _number(row.envelope_db, 2),
        _number(row.frechet_to_fp32, 2),
        _number(row.frechet_to_real, 2),
        f"{100 * row.adherence:.1f} % ({low:.0f}..{high:.0f})",
        f"{row.adherence_change:+.1f} ({less:+.1f}..{more:+.1f})",
        f"{row.file_bytes / 1e6:.2f}",
        "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}",
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


FLOATS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ROWS = (
    "fp32,fp16,bf16,8bit,6bit,5bit,4bit,3bit,6bit-gptq,5bit-gptq,4bit-gptq,3bit-gptq,mixed-5,mixed-4.5,mixed-4.5-gptq"
)


@click.command(cls=TypedCommand)
@click.argument("model")
@click.option("--rows", default=ROWS, show_default=True, help="Precisions and recipes of `sa3 quantize`.")
@click.option(
    "--also",
    "also",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Folder of a quantized version, such as one from `sa3 train quantize`; repeatable.",
)
@click.option("--seeds", type=click.IntRange(1), default=4, show_default=True, help="Sounds per prompt.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=None,
    help="Folder made by `sa3 data render`, for distances to real sounds.",
)
@click.option("--data-seed", type=int, default=0, show_default=True, help="Seed of `sa3 data render`.")
@RESULTS_FOLDER
def precision(
    model: str,
    rows: str,
    also: tuple[Path, ...],
    choice: SamplingChoice,
    seeds: int,
    data: Path | None,
    data_seed: int,
    results: Path,
) -> None:
    """Measure what every precision of MODEL costs in quality and saves in bytes: one table."""
    found_model = find_model(model, generates=True)
    folder, config = found_model.folder, found_model.config
    names = rows.split(",")
    if unknown := [name for name in names if name not in (*FLOATS, *RECIPES)]:
        raise click.UsageError(f"no row {unknown[0]!r}; rows: {', '.join((*FLOATS, *RECIPES))}")
    plan = SoundsPlan(sampling=choice.resolved(config.usual_sampling), seeds=seeds, data_seed=data_seed)
    bench = PrecisionBench(folder, plan, data)
    day = datetime.now(UTC).date().isoformat()
    about: dict[str, Any] = {
        "format": "sa3-precision/1",
        "date": day,
        "machine": describe("torch").to_dict(),
        "model": config.name,
        "weights": fingerprint(folder, config),
        "prompts": len(bench.prompts),
        "setting": asdict(plan),
    }
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"precision-{config.name}-{day}.json"
    found: list[PrecisionRow] = []
    for row in _rows(bench, folder, names, also):  # stored after every row: a long table can be stopped
        found.append(row)
        click.echo(table([row]), err=True)
        about["rows"] = [asdict(one) for one in found]
        write_json(path, about)
    click.echo(table(found))
    click.echo(f"stored in {path}", err=True)
    click.echo(json.dumps(about))


def _rows(bench: PrecisionBench, folder: Path, names: list[str], also: tuple[Path, ...]) -> Iterator[PrecisionRow]:
    yield bench.floor()
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            place = folder if name in FLOATS else _quantized(folder, Path(work) / name, name)
            yield bench.row(name, place, FLOATS.get(name, "float32"))
    for place in also:
        yield bench.row(_recipe_of(place), place, "float32")


def _quantized(folder: Path, out: Path, name: str) -> Path:
    from sa3_mlx.quantize import QuantizeOptions, quantize_model

    prompts = usual_prompts(open_tokenizer(folder, ModelConfig.load(folder)))
    options = QuantizeOptions(source=folder, out=out, name=name, recipe=RECIPES[name], prompts=prompts, force=False)
    report = quantize_model(options, lambda *_: None)
    click.echo(str(report), err=True)
    return out


def _recipe_of(folder: Path) -> str:
    report = json.loads((folder / "quantization.json").read_text(encoding="utf-8"))
    return str(report["recipe"])
