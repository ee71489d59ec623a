"""Compare whole official runs: what goes into the network, what the decoder makes of what came out, and one free run.

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
from sa3_mlx.common.generation.clips import encode_sources, local_input
from sa3_mlx.common.generation.events import Stepped
from sa3_mlx.common.generation.noise import INITIAL, NoiseStream, step
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.plan import Plan, plan
from sa3_mlx.common.generation.request import Request

from .golden import CaseResult, Golden, absolute_error, relative_error
from .networks import ABSOLUTE, NETWORK, same_limit
from .official_run import OfficialRun
from .twin import Twin

_FREE_RUN = "t2a_batch2_true_mask"
_FREE_LIMIT = 1e-3  # a random network amplifies rounding from step to step


def runs(golden: Golden, twin: Twin, folder: Path) -> Iterator[CaseResult]:
    """Compare every run that the official code finished and that a request of ours can repeat."""
    pipeline: BasePipeline[Any] = backend.load(folder, twin.name, "float32", "float32")
    config = pipeline.config
    networks = [twin.load(folder, part) for part in ("text_encoder", "conditioner")]
    for case in golden.names("e2e"):
        entry = golden.cases[f"e2e:{case}"]
        if "kwargs" not in entry:
            yield CaseResult(area="e2e", case=case, skipped="the official code raises here; ours works")
            continue
        try:
            run = OfficialRun.read(entry["kwargs"])
            request = run.request(golden, case, entry["objective"], config)
            pipeline.config = run.limited(config)
            planned = plan(request, pipeline.config)
        except ValueError as error:
            yield CaseResult(area="e2e", case=case, skipped=str(error))
            continue
        compared = _Compared(golden, twin, pipeline, case, run, request, planned)
        wanted = golden.get("e2e", case, "sigmas")
        yield absolute_error("e2e", f"{case} schedule", planned.sigmas, wanted, ABSOLUTE)
        yield from compared.conditioning(*networks)
        yield from compared.local()
        if run.return_latents or not entry.get("deterministic", True):
            yield CaseResult(area="e2e", case=f"{case} decode", skipped="no audio without decoder noise to compare")
        else:
            yield from compared.decoded()
        if case == _FREE_RUN:
            yield from compared.free()


@dataclass(frozen=True)
class _Compared:
    """Compare one run of the reference with ours."""

    golden: Golden
    twin: Twin
    pipeline: BasePipeline[Any]
    case: str
    run: OfficialRun
    request: Request
    planned: Plan

    def conditioning(self, encoder: Any, conditioner: Any) -> Iterator[CaseResult]:
        """Compare the context and the duration that the network gets."""
        ids, mask = (
            self.twin.array(array) for array in self.pipeline.tokenizer.encode([i.prompt for i in self.request.items])
        )
        seconds = np.array([item.seconds for item in self.request.items])
        arrays = conditioner(encoder(ids, mask), mask, seconds)
        for name, array in zip(("in_cross_attn_cond", "in_global_cond"), arrays, strict=True):
            wanted = self.golden.get("e2e", self.case, name)
            yield self._relative(name, self.twin.numpy(array).reshape(wanted.shape), wanted, NETWORK)

    def local(self) -> Iterator[CaseResult]:
        """Compare mask and masked latents of inpainting."""
        config = self.pipeline.config
        if self.run.rates - {config.sample_rate}:
            yield CaseResult(area="e2e", case=f"{self.case} audio", skipped="resampled by another filter than ours")
        elif self.request.inpaint is not None:
            _, latents = encode_sources(self.request, self.planned, config, self.pipeline.encode)
            found = local_input(self.planned, latents, config.same.latent_channels)
            wanted = self.golden.last("e2e", self.case, "in_local_add_cond")
            yield self._relative("local", found, wanted, same_limit(config.same, self.planned.frames))

    def decoded(self) -> Iterator[CaseResult]:
        """Compare what our decoder makes of the last estimate of the reference; its audio is clamped to full scale."""
        config, last = self.pipeline.config, f"step{self.run.steps - 1}_denoised"
        latents, wanted = (self.golden.last("e2e", self.case, name) for name in (last, "out"))
        for row, item in enumerate(self.request.items):
            samples = min(int(item.seconds * config.sample_rate), wanted.shape[1])
            found = np.clip(self.pipeline.decode(latents[row])[:samples], -1, 1)
            limit = same_limit(config.same, samples // config.same.samples_per_latent)
            label = "decode" + (f" {row}" if len(self.request.items) > 1 else "")
            yield self._relative(label, found, wanted[row, :samples], limit)

    def free(self) -> Iterator[CaseResult]:
        """Compare the estimate of every step, where it is valid, from the stored noise."""
        valid = self.golden.get("e2e", self.case, "padding_mask").astype(bool)
        for event in self.pipeline.stream(self.request, noise=_StoredNoise(self.golden, self.case)):
            if isinstance(event, Stepped):
                wanted = self.golden.last("e2e", self.case, f"step{event.index}_denoised")
                found = self.twin.numpy(event.denoised)
                yield self._relative(f"step {event.index}", found[valid], wanted[valid], _FREE_LIMIT)

    def _relative(self, what: str, found: np.ndarray, wanted: np.ndarray, limit: float) -> CaseResult:
        return relative_error("e2e", f"{self.case} {what}", found, wanted, limit)


@dataclass(frozen=True)
class _StoredNoise:
    """Replay the official draws: noise0 is the start, then one per step."""

    golden: Golden
    case: str

    def __call__(self, item: int, purpose: NoiseStream, frames: int, channels: int, start: int) -> np.ndarray:
        number = 0 if purpose == INITIAL else purpose.index + 1
        assert purpose in (INITIAL, step(purpose.index)), "no decoder noise in these runs"
        stored = self.golden.last("e2e", self.case, f"noise{number}")
        assert stored.shape[2] == channels
        return stored[item, start : start + frames]
