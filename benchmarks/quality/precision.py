"""What precision costs: one model in several precisions, against itself in fp32 with the same noise.

Per row: error of the velocity at states of the fp32 model, time by time; distance of the sounds to those of fp32 from
the same noise; Frechet distance of all sounds, in the judge's feature space, to fp32 with other seeds and to real ones;
adherence; size on disk; peak memory. A quantized diffusion model makes another plausible sound, not a noisy copy: the
distances to fp32 say how soon runs part, adherence and Frechet distance say what it costs.

Sounds come from PyTorch, which holds the values that the packed weights stand for. Memory is that of MLX, which
computes on the packed weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE, expected_tensors
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.quant.calibration import requests, usual_prompts
from sa3_mlx.common.quant.format import Quantization
from sa3_torch.dit import Conditioning, DiT
from sa3_torch.evaluate.judge.judge import Judge, all_right
from sa3_torch.evaluate.measures.frechet import frechet
from sa3_torch.evaluate.prompts import held_out_prompts, sounds
from sa3_torch.pipeline import DTYPES, Pipeline
from sa3_torch.train.autoencoder.metrics import HOP, log_mel_l1, mono
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.trajectory import State, visit

OTHER_SEEDS = 500  # from here on, for the row that shows the noise of the measurement
RESAMPLES = 2000
FLOOR_DB = -60.0
Audio = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class SoundsPlan:
    """Which sounds are made, and how."""

    sampling: Sampling
    seeds: int
    data_seed: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One precision. Errors and distances are to fp32 with the same noise; None where there is nothing to measure."""

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
class Made:
    """Sounds of all prompts and seeds in one order, with what the judge finds in them."""

    audio: tuple[Audio, ...]
    right: NDArray[np.float64]  # (prompts, seeds): everything that was asked for is heard
    right_class: NDArray[np.float64]
    embedding: NDArray[np.float64]  # (clips, 40)


class Bench:
    """The fp32 model's states and sounds, made once; ``row`` compares another precision with them."""

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

    def floor(self) -> Row:
        """fp32 with other seeds: what differs here is not precision."""
        return self._row("fp32, other seeds", self.folder, "float32", self.others, against=self.sounds)

    def row(self, name: str, folder: Path, dtype: str) -> Row:
        """One precision of the model."""
        pipeline = Pipeline.load(folder, dtype=dtype)
        made = self.sounds if (folder, dtype) == (self.folder, "float32") else self._make(pipeline, 0)
        found = self._row(name, folder, dtype, made, against=self.others)
        by_time = velocity_errors(self.states, cast(DiT, pipeline.load_part("dit")), DTYPES[dtype])
        return replace(found, velocity_error=by_time.pop("all"), velocity_error_by_time=by_time)

    def _row(self, name: str, folder: Path, dtype: str, made: Made, *, against: Made) -> Row:
        change = 100 * (made.right - self.sounds.right)
        pairs = list(zip(self.sounds.audio, made.audio, strict=True))
        bits, size = stored(folder, dtype)
        return Row(
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

    def _make(self, pipeline: Pipeline, first_seed: int) -> Made:
        plan = self.plan
        made = sounds(pipeline, self.prompts, sampling=plan.sampling, seeds=plan.seeds, first_seed=first_seed)
        pairs = list(made)
        verdicts = [self.judge.check(audio, prompt) for audio, prompt in pairs]
        right = np.array([all_right(found) for found in verdicts], float).reshape(-1, plan.seeds)
        right_class = np.array([found["class"] for found in verdicts], float).reshape(-1, plan.seeds)
        embedding = np.stack([self.judge.classifier.embedding(audio) for audio, _ in pairs]).astype(np.float64)
        audio = tuple(audio for audio, _ in pairs)
        return Made(audio=audio, right=right, right_class=right_class, embedding=embedding)

    def _real(self, clips: ClipSet) -> NDArray[np.float64]:
        chosen = [clip for clip in clips.select("validation") if clip.captions]
        return np.stack([self.judge.classifier.embedding(clips.read(clip)) for clip in chosen]).astype(np.float64)


def velocity_errors(states: Sequence[State], dit: DiT, dtype: torch.dtype) -> dict[str, float]:
    """Relative L2 error by time ("0.93"), and over all states ("all")."""
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
    """Level every 12 ms in dB, not below -60."""
    signal = mono(audio)
    frames = np.pad(signal, (0, -len(signal) % HOP)).reshape(-1, HOP)
    return np.maximum(10 * np.log10(np.maximum(np.square(frames).mean(axis=1), 1e-12)), FLOOR_DB)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the mean of (prompts, seeds) by resampling prompts."""
    rng, means = np.random.default_rng(0), values.mean(axis=1)
    drawn = means[rng.integers(0, len(means), (RESAMPLES, len(means)))].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def stored(folder: Path, dtype: str) -> tuple[float | None, int]:
    """Bits per weight of the quantized layers, if any, and bytes on disk: for a plain model those in this precision."""
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
    """Most memory that MLX holds while it makes a clip of 1.5 s in one step, everything resident; None without MLX.

    Quantized models compute in fp16 here, as they would on a GPU; their packed weights stay packed.
    """
    try:
        import mlx.core as mx

        from sa3_mlx.pipeline import Pipeline as MlxPipeline
    except ImportError:
        return None
    pipeline = MlxPipeline.load(folder, dtype=dtype if bits is None else "float16")
    item = Item(prompt="piano note C4", seconds=min(1.5, pipeline.config.max_seconds), seed=0)
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


def table(rows: Iterable[Row]) -> str:
    """For people. Intervals are in brackets."""
    lines = [COLUMNS, *map(_line, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def _line(row: Row) -> tuple[str, ...]:
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


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
