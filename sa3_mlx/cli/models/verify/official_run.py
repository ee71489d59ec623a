"""Read the arguments of a run of the official ``generate``, and ask for the same with a request of ours [B31-B36]."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from sa3_mlx.common.files.audio import fit_channels, resample
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Guidance, Sampling

from .golden import Golden

_IGNORED = {"seed", "truncate_output_to_duration", "chunked_decode"}  # noise is stored, the asked samples are compared


@dataclass(frozen=True, kw_only=True)
class OfficialRun:
    """Hold the arguments that decide what is compared, with the official names and defaults."""

    prompt: str | list[str]
    negative_prompt: str | list[str] | None = None
    duration: float | list[float] = 120.0
    batch_size: int = 1
    sample_size: int = 5_292_032  # longest clip, in samples
    duration_padding_sec: float = 6.0
    steps: int = 8
    sampler_type: str | None = None
    cfg_scale: float = 1.0
    apg_scale: float = 1.0
    scale_phi: float = 0.0
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    cfg_norm_threshold: float = 0.0
    init_audio: tuple[int, str] | None = None  # rate, and a word for the samples, which are a tensor of the folder
    init_noise_level: float = 1.0
    inpaint_audio: tuple[int, str] | None = None
    inpaint_mask: str | None = None
    inpaint_mask_start_seconds: float | list[float] | None = None
    inpaint_mask_end_seconds: float | list[float] | None = None
    return_latents: bool = False

    @classmethod
    def read(cls, arguments: Mapping[str, Any]) -> Self:
        """Take the arguments of a manifest. Raises ValueError that names those whose meaning is not known here."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(arguments) - known - _IGNORED):
            raise ValueError(f"cannot repeat the argument {', '.join(unknown)}")
        return cls(**{name: value for name, value in arguments.items() if name in known})

    @property
    def rates(self) -> set[int]:
        """Sample rates of the given audio, in Hz."""
        return {audio[0] for audio in (self.init_audio, self.inpaint_audio) if audio is not None}

    def limited(self, config: ModelConfig) -> ModelConfig:
        """Return the configuration with the longest clip of this run."""
        frames = self.sample_size // config.same.samples_per_latent
        return dataclasses.replace(config, diffusion=dataclasses.replace(config.require_diffusion(), max_frames=frames))

    def request(self, golden: Golden, case: str, objective: str, config: ModelConfig) -> Request:
        """Ask for the same clips; the noise is replayed, so that the seed means nothing."""
        init = inpaint = None
        if self.init_audio is not None:
            audio = _audio(golden, case, self.init_audio[0], "arg_init_audio", config)
            init = InitAudio(audio=audio, noise_level=self.init_noise_level)
        if self.inpaint_audio is not None and (regions := self._regions(golden, case, config.sample_rate)):
            audio = _audio(golden, case, self.inpaint_audio[0], "arg_inpaint_audio", config)
            inpaint = Inpaint(audio=audio, regions=regions)
        columns = (self._each(value) for value in (self.prompt, self.duration, self.negative_prompt))
        return Request(
            items=tuple(
                Item(prompt=prompt, seconds=float(seconds), seed=0, negative_prompt=negative)
                for prompt, seconds, negative in zip(*columns, strict=True)
            ),
            sampling=Sampling(
                sampler=self.sampler_type or ("pingpong" if objective == "rf_denoiser" else "euler"),
                steps=self.steps,
                guidance=guidance_of(vars(self)),
            ),
            init=init,
            inpaint=inpaint,
            head_room_seconds=self.duration_padding_sec,
            crossfade_ms=None,
        )

    def _each(self, value: Any) -> list[Any]:
        return value if isinstance(value, list) else [value] * self.batch_size

    def _regions(self, golden: Golden, case: str, rate: int) -> tuple[tuple[float, float], ...]:
        """Return the regions to generate, in seconds; none where audio was given without a mask [B34]."""
        if self.inpaint_mask_start_seconds is not None and self.inpaint_mask_end_seconds is not None:
            starts, ends = np.atleast_1d(self.inpaint_mask_start_seconds, self.inpaint_mask_end_seconds)
            return tuple((float(start), float(end)) for start, end in zip(starts, ends, strict=True))
        if self.inpaint_mask is None:
            return ()
        samples = int(max(self._each(self.duration)) * rate)
        kept = golden.get("e2e", case, "arg_inpaint_mask")[0, :samples] > 0
        edges = np.flatnonzero(np.diff(np.concatenate([[1], kept.astype(int), [1]])))
        return tuple((a / rate, b / rate) for a, b in edges.reshape(-1, 2))


def guidance_of(arguments: Mapping[str, Any]) -> Guidance:
    """Read guidance from official arguments, of which any but its scale may be missing."""
    return Guidance(
        scale=arguments["cfg_scale"],
        apg=arguments.get("apg_scale", 1.0),
        rescale=arguments.get("scale_phi", 0.0),
        interval=tuple(arguments.get("cfg_interval", (0.0, 1.0))),
        norm_threshold=arguments.get("cfg_norm_threshold", 0.0),
    )


def _audio(golden: Golden, case: str, sample_rate: int, name: str, config: ModelConfig) -> Audio:
    audio = fit_channels(np.ascontiguousarray(golden.get("e2e", case, name).T), config.audio_channels)
    return resample(audio, sample_rate, config.sample_rate)
