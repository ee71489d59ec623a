"""Compare the two backends with each other: the same seed and prompt in fp32 must give the same sound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.cli import backend, fingerprint
from sa3_mlx.cli.audio.generate import default_seconds
from sa3_mlx.cli.models.measure import snr_db
from sa3_mlx.common.generation.events import Conditioned, Finished, Stepped
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.installed import Model
from sa3_mlx.common.model.lengths import seconds_to_samples
from sa3_mlx.common.terminal import show

from .golden import CaseResult
from .twin import Twin

_SNR_DB = 40.0
_STEPS = 8


def compare_backends(model: Model, prompt: str, seed: int, seconds: float | None) -> Iterator[CaseResult]:
    """Make the same request on both backends; compare schedule, every step's estimate, latents and audio."""
    config = model.config
    length = min(4.0, default_seconds(config)) if seconds is None else seconds
    sampling = replace(config.usual_sampling, steps=_STEPS)
    request = Request(items=(Item(prompt=prompt, seconds=length, seed=seed),), sampling=sampling)
    _check_backends(model)
    show(
        f"{model.label}: mlx against torch, {prompt!r}, seed {seed}, {length:g} s, {_STEPS} steps of "
        f"{sampling.sampler}, guidance {sampling.guidance.scale:g}, fp32"
    )
    yield from _compared(*(_record(model.folder, name, request) for name in backend.BACKENDS))


def compare_autoencoders(model: Model, seed: int, seconds: float | None) -> Iterator[CaseResult]:
    """Encode the same noise on both backends; compare its latents, and what they decode to."""
    config, length = model.config, 4.0 if seconds is None else seconds
    _check_backends(model)
    show(f"{model.label}: mlx against torch, noise of seed {seed}, {length:g} s, fp32")
    shape = (seconds_to_samples(length, config.sample_rate), config.audio_channels)
    audio = 0.1 * np.random.default_rng(seed).standard_normal(shape, np.float32)
    found: list[dict[str, np.ndarray]] = []
    for name in backend.BACKENDS:
        pipeline: BasePipeline[Any] = backend.load(model.folder, name, "float32", "float32")
        latents = pipeline.encode(audio)
        found.append({"latents": latents, "audio": pipeline.decode(found[0]["latents"] if found else latents)})
    yield from _compared(*found)


def _check_backends(model: Model) -> None:
    """Raise ImportError for a backend that is not installed, ValueError for a damaged model."""
    for name in backend.BACKENDS:
        backend.choose(name)
    fingerprint.fingerprint(model.folder, model.config)


def _compared(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> Iterator[CaseResult]:
    for case, values in first.items():
        yield CaseResult(area="twins", case=case, error=-snr_db(values, second[case]), limit=-_SNR_DB, unit="dB")


def _record(folder: Path, name: backend.Backend, request: Request) -> dict[str, np.ndarray]:
    """Run a request and keep what is compared, by its name."""
    twin, found = Twin(name), dict[str, np.ndarray]()
    pipeline: BasePipeline[Any] = backend.load(folder, name, "float32", "float32")
    valid = 0
    for event in pipeline.stream(request):
        if isinstance(event, Conditioned):
            found["schedule"], valid = event.sigmas, event.valid[0]
        elif isinstance(event, Stepped):
            found[f"step {event.index + 1}"] = twin.numpy(event.denoised)[0, :valid]
        elif isinstance(event, Finished):
            found["latents"] = event.generation.latents[0]
            found["audio"] = event.generation.audio[0]
            if pipeline.config.clap is not None:
                found["latent CLAP"] = np.array(pipeline.clap_cosines(event.generation))
    return found
