"""Measure how well an autoencoder gives held-out sounds back: ``python -m benchmarks reconstruction``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.options import BACKEND, MODEL, RENDERED, open_pipeline, show
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.measures.spectra import log_mel_l1
from sa3_mlx.common.schema import ConfigError
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.judge.music.judge import MusicJudge, shares
from sa3_torch.evaluate.judge.pitch import still_voiced
from sa3_torch.train.autoencoder.metrics import effective_rank, sdr_by_band, si_sdr, spectral_convergence
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, Audio, CachedClip, ClipSet


def measure(pipeline: BasePipeline[Any], clips: ClipSet, decoder: BasePipeline[Any] | None = None) -> dict[str, Any]:
    """Measure over all captioned validation clips, with metrics and the judge.

    SI-SDR, that of bands and sides, and spectral convergence are medians over notes and chords, the share of voiced
    frames that still are is a mean over notes. A stereo set is judged by the judges of the set "music". "silent_dbfs"
    is the level of what a second of silence becomes. ``decoder`` is another one that decodes the latents.
    """
    decode = (decoder or pipeline).decode
    pairs, tonal, voiced, latents, mel, bands = [], [], [], [], [], []
    for clip in (clip for clip in clips.select("validation") if clip.captions):
        audio = clips.read(clip)
        audio = np.repeat(audio, 2, axis=1) if clips.channels == 1 else audio
        z = pipeline.encode(audio)
        output = decode(z)[: len(audio)]
        pairs.append((output, clip))
        latents.append(z)
        mel.append(log_mel_l1(audio, output))
        if clip.kind in ("note", "chord"):
            tonal.append((si_sdr(audio, output), spectral_convergence(audio, output)))
            bands.append(sdr_by_band(audio, output, SAMPLE_RATE))
        if clip.kind == "note" and (share := still_voiced(audio, output)) is not None:
            voiced.append(share)
    stacked = np.concatenate(latents)
    return {
        "si_sdr_tonal": float(np.median([a for a, _ in tonal])),
        "spectral_convergence_tonal": float(np.median([b for _, b in tonal])),
        "notes_still_voiced": float(np.mean(voiced)) if voiced else None,
        "log_mel_l1": float(np.mean(mel)),
        "effective_rank": effective_rank(stacked),
        "latent_std": float(stacked.std()),
        "silent_dbfs": _level(decode(pipeline.encode(np.zeros((SAMPLE_RATE, 2), np.float32)))),
        "sdr_by_band": {name: _median(row[name] for row in bands if name in row) for name in bands[0]},
        **(Judge().evaluate(pairs) if clips.channels == 1 else _by_kind(pairs)),
    }


def _level(audio: Audio) -> float:
    """Return the level in dBFS, at least -200."""
    return float(20 * np.log10(max(float(np.sqrt(np.mean(np.square(audio, dtype=np.float64)))), 1e-10)))


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.median(found)) if found else None


def _by_kind(pairs: Sequence[tuple[Audio, CachedClip]]) -> dict[str, Any]:
    judge = MusicJudge()
    return {"judged": shares((clip, judge.check(output, clip)) for output, clip in pairs)}


def _latents(pipeline: BasePipeline[Any]) -> str:
    same = pipeline.config.same
    return f"{same.latent_channels} channels per {same.samples_per_latent} samples"


@click.command()
@MODEL
@BACKEND
@RENDERED
@click.option(
    "--decoder",
    metavar="NAME|PATH",
    default=None,
    help="Another autoencoder that decodes its latents: a distilled one, or the teacher.",
)
def reconstruction(model: str, backend: str, data: Path, decoder: str | None) -> None:
    """Measure how well the autoencoder gives held-out sounds back."""
    pipeline = open_pipeline(model, backend, generates=False)
    other = None if decoder is None else open_pipeline(decoder, backend, generates=False)
    if other is not None and _latents(other) != _latents(pipeline):
        raise ConfigError(
            f"--decoder {decoder} reads {_latents(other)}, {model} makes {_latents(pipeline)}; choose one that was "
            "distilled from the other"
        )
    result = measure(pipeline, ClipSet(data), other)
    show(result)
    about = {"model": pipeline.config.name, "decoder": (other or pipeline).config.name, "backend": backend}
    click.echo(json.dumps({**about, **result}))
