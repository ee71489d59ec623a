"""Whole official runs: what goes into the network, what the decoder makes of what came out, and one free run.

The reference ran on a CPU, where padded frames lose their values in self-attention and keep their keys [B16]. Its
estimates are therefore comparable only where it was told to remove the keys, as ours does; the rest always is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3_mlx.cli import backend
from sa3_mlx.common.files.audio import Audio, fit_channels, resample
from sa3_mlx.common.generation.clips import encode_sources, local_input
from sa3_mlx.common.generation.events import Stepped
from sa3_mlx.common.generation.noise import INITIAL, Purpose, step
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Guidance, Sampling

from .golden import Golden, Row, absolute_row, relative_row
from .networks import ABSOLUTE, NETWORK, same_limit
from .twin import Twin

_FREE_RUN = "t2a_batch2_true_mask"
_FREE_LIMIT = 1e-3  # a random network amplifies rounding from step to step


def runs(golden: Golden, twin: Twin, folder: Path, config: ModelConfig) -> Iterator[Row]:
    pipeline = backend.load(folder, twin.name, "float32", "float32")
    conditioner, encoder = twin.load(folder, config, "conditioner"), twin.load(folder, config, "text_encoder")
    for case in golden.names("e2e"):
        entry = golden.cases[f"e2e:{case}"]
        if "kwargs" not in entry:
            yield Row(area="e2e", case=case, skipped="the official code raises here; ours works")
            continue
        request = request_of(golden, case, entry, config)
        planned = plan(request, config)
        yield absolute_row("e2e", f"{case} schedule", planned.sigmas, golden.get("e2e", case, "sigmas"), ABSOLUTE)
        ids, mask = pipeline.tokenizer.encode([item.prompt for item in request.items])
        hidden = encoder(twin.array(ids), twin.array(mask))
        seconds = np.array([item.seconds for item in request.items])
        context, duration = conditioner(hidden, twin.array(mask), seconds)
        for name, array in (("in_cross_attn_cond", context), ("in_global_cond", duration)):
            wanted = golden.get("e2e", case, name)
            yield relative_row("e2e", f"{case} {name}", twin.numpy(array).reshape(wanted.shape), wanted, NETWORK)
        if "resample" in case:
            yield Row(area="e2e", case=f"{case} audio", skipped="resampled by another filter than ours")
        elif request.inpaint is not None:
            _, latents = encode_sources(request, planned, config, pipeline.encode)
            local = local_input(planned, latents, config.same.latent_channels)
            wanted = golden.last("e2e", case, "in_local_add_cond")
            yield relative_row("e2e", f"{case} local", local, wanted, same_limit(config.same, planned.frames))
        yield from _decoded(golden, pipeline, case, request, config)
        if case == _FREE_RUN:
            yield from _free_run(golden, twin, pipeline, case, request)


def _decoded(golden: Golden, pipeline: Any, case: str, request: Request, config: ModelConfig) -> Iterator[Row]:
    """The last estimate is what the reference decoded; its audio is clamped to full scale."""
    name = f"step{plan(request, config).sampling.steps - 1}_denoised"
    if not golden.has("e2e", case, name) or "latents" in case or "stochastic" in case:
        yield Row(area="e2e", case=f"{case} decode", skipped="no audio without decoder noise to compare")
        return
    latents, wanted = golden.last("e2e", case, name), golden.last("e2e", case, "out")
    for row, item in enumerate(request.items):
        samples = min(int(item.seconds * config.sample_rate), wanted.shape[1])
        found = np.clip(pipeline.decode(latents[row])[:samples], -1, 1)
        limit = same_limit(config.same, samples // config.same.samples_per_latent)
        label = f"{case} decode" + (f" {row}" if len(request.items) > 1 else "")
        yield relative_row("e2e", label, found, wanted[row, :samples], limit)


@dataclass(frozen=True)
class _Stored:
    """The official draws: noise0 is the start, then one per step."""

    golden: Golden
    case: str

    def __call__(self, item: int, purpose: Purpose, frames: int, channels: int, start: int) -> np.ndarray:
        number = 0 if purpose == INITIAL else purpose.index + 1
        assert purpose in (INITIAL, step(purpose.index)), "no decoder noise in these runs"
        stored = self.golden.last("e2e", self.case, f"noise{number}")
        assert stored.shape[2] == channels
        return stored[item, start : start + frames]


def _free_run(golden: Golden, twin: Twin, pipeline: Any, case: str, request: Request) -> Iterator[Row]:
    valid = golden.get("e2e", case, "padding_mask").astype(bool)
    for event in pipeline.stream(request, noise=_Stored(golden, case)):
        if isinstance(event, Stepped):
            wanted = golden.last("e2e", case, f"step{event.index}_denoised")
            found = twin.numpy(event.denoised)
            yield relative_row("e2e", f"{case} step {event.index}", found[valid], wanted[valid], _FREE_LIMIT)


def request_of(golden: Golden, case: str, entry: dict[str, Any], config: ModelConfig) -> Request:
    """The arguments of an official run as a request; its noise is replayed, so the seed means nothing."""
    kwargs = entry["kwargs"]
    count = kwargs.get("batch_size", 1)
    prompts, seconds = (
        value if isinstance(value, list) else [value] * count for value in (kwargs["prompt"], kwargs["duration"])
    )
    regions = _regions(golden, case, kwargs, config)
    init = inpaint = None
    if "init_audio" in kwargs:
        audio = _audio(golden, case, kwargs["init_audio"][0], "arg_init_audio", config)
        init = InitAudio(audio=audio, noise_level=kwargs["init_noise_level"])
    if regions:
        audio = _audio(golden, case, kwargs["inpaint_audio"][0], "arg_inpaint_audio", config)
        inpaint = Inpaint(audio=audio, regions=regions)
    return Request(
        items=tuple(
            Item(prompt=prompt, seconds=length, seed=0, negative_prompt=kwargs.get("negative_prompt"))
            for prompt, length in zip(prompts, seconds, strict=True)
        ),
        sampling=Sampling(
            sampler=kwargs.get("sampler_type", "pingpong" if entry["objective"] == "rf_denoiser" else "euler"),
            steps=kwargs["steps"],
            guidance=Guidance(scale=kwargs.get("cfg_scale", 1.0), apg=kwargs.get("apg_scale", 1.0)),
        ),
        init=init,
        inpaint=inpaint,
        crossfade_ms=None,
    )


def _audio(golden: Golden, case: str, sample_rate: int, name: str, config: ModelConfig) -> Audio:
    audio = fit_channels(np.ascontiguousarray(golden.get("e2e", case, name).T), config.audio_channels)
    return resample(audio, sample_rate, config.sample_rate)


def _regions(golden: Golden, case: str, kwargs: dict[str, Any], config: ModelConfig) -> tuple[tuple[float, float], ...]:
    """Regions to generate, in seconds; none where the reference was given audio without a mask [B34]."""
    if "inpaint_mask_start_seconds" in kwargs:
        starts, ends = np.atleast_1d(kwargs["inpaint_mask_start_seconds"], kwargs["inpaint_mask_end_seconds"])
        return tuple((float(start), float(end)) for start, end in zip(starts, ends, strict=True))
    if "inpaint_mask" not in kwargs:
        return ()
    kept = golden.get("e2e", case, "arg_inpaint_mask")[0, : int(kwargs["duration"] * config.sample_rate)] > 0
    edges = np.flatnonzero(np.diff(np.concatenate([[1], kept.astype(int), [1]])))
    return tuple((a / config.sample_rate, b / config.sample_rate) for a, b in edges.reshape(-1, 2))
