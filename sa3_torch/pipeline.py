"""Carry out requests with PyTorch: what ``BasePipeline`` leaves to a framework.

Shapes: B batch, T latent frames, C latent channels, L audio samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Literal, Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa3_mlx.common.adapters.applied import Applied
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.files.safetensors import TensorFile, read_ahead
from sa3_mlx.common.generation.clips import noise_levels
from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.generation.events import Latents, NoiseSource, Stopwatch
from sa3_mlx.common.generation.noise import INITIAL, step
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.plan import Plan
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.memory.activations import largest_chunk
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE, Part
from sa3_mlx.common.model.chunks import Direction, default_chunk_frames, pad_frames
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.precision import Precision, choose_precision
from sa3_mlx.common.tuning.chunk import CHUNKS

from .choices import CHOICES, WHOLE, on_a_cpu, way
from .conditioner import blend
from .cuda.transfer import fetch, mark, seconds_between, upload
from .guidance import GuidedVelocity, negative
from .layers import graphed, halve_products
from .lora import GatedVelocity, adapt, merge
from .philox import DeviceNoise
from .same import SAME
from .samplers import SAMPLERS
from .weights import EMBEDDING, load_part, load_streamed_dit

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CONTEXTS = (32, 64, 128, 257)  # text tokens and the duration
_LONGEST = 8192  # frames that are coded at once, twice the longest clip of a model
_DEVICES = "auto, cpu, cuda, cuda:N and mps"


def choose_device(name: str) -> torch.device:
    """Return the device for auto, cpu, cuda, cuda:N or mps. Raises ValueError for one that is not there.

    Auto is CUDA where there is one, else the CPU. It is never mps, an Apple GPU: accuracy and speed of this code were
    not measured there, and MLX is the backend made for it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}: allowed are {_DEVICES}") from error
    if device.type not in ("cpu", "cuda") and name != "mps":
        raise ValueError(f"device is {name!r}: allowed are {_DEVICES}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps': this machine has no Apple GPU that PyTorch can use")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def device_name(device: torch.device) -> str:
    """Return "cpu", "mps" or the name of a CUDA device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class Pipeline(BasePipeline[Tensor]):
    """Generate with PyTorch from a checkpoint folder: open it with ``load``."""

    choices = CHOICES
    blend, negative = staticmethod(blend), staticmethod(negative)
    adapt, merge = staticmethod(adapt), staticmethod(merge)
    guided_velocity, gated_velocity = GuidedVelocity, GatedVelocity

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        precision: Precision,
        device: torch.device,
        adapters: tuple[Applied, ...] = (),
        *,
        merged: bool = False,
    ) -> None:
        super().__init__(folder, config, precision, adapters, merged=merged)
        self._device = device

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: str = "auto",
        text_dtype: str = "auto",
        adapters: Sequence[Applied] = (),
        merged: bool = False,
        device: str = "auto",
    ) -> Self:
        """Check a model and open it: a checkpoint folder, or the name of an installed model, such as "demo".

        No weights are read yet.

        ``device`` "auto": CUDA if there is one; ``choose_precision`` says what it means for the types.
        ``adapters`` change the DiT and the conditioner, each on top of those before it; the DiT's weights stay as they
        are, also packed ones, unless ``merged``.

        Raises FileNotFoundError for a missing file, ValueError for a bad configuration, tensor, dtype or device, and
        for an adapter that does not fit.
        """
        target = choose_device(device)
        precision = choose_precision(dtype, text_dtype, on_gpu=target.type != "cpu")
        folder, config, prepared = cls._checked(folder, adapters, merged=merged)
        return cls(folder, config, precision, target, prepared, merged=merged)

    @property
    def device_name(self) -> str:
        """Return "cpu", "mps" or the name of a CUDA device."""
        return device_name(self._device)

    @cached_property
    def ways(self) -> Mapping[str, str]:
        """Return the ways of ``choices`` for this device; on the CPU of a machine with CUDA, those of a CPU."""
        found = super().ways
        return {**on_a_cpu(), **found} if self._device.type == "cpu" else found

    def _array(self, values: np.ndarray) -> Tensor:
        return upload(values, self._device)

    def _ids(self, ids: np.ndarray) -> Tensor:
        return torch.from_numpy(ids)

    @property
    def context_sizes(self) -> Sequence[int]:
        """Return the lengths that a context has, rising: a plan of attention and a graph serve one each."""
        return _CONTEXTS if way("context") == "buckets" else ()

    def _numpy(self, array: Tensor) -> np.ndarray:
        return fetch(array)()

    def _bring(self, array: Tensor) -> Callable[[], np.ndarray]:
        return fetch(array)

    def usual_chunk_frames(self, direction: Direction) -> int:
        """Return the latent frames of a chunk where a caller names none: a GPU with room takes any clip as a whole."""
        if way(CHUNKS) != WHOLE:
            return super().usual_chunk_frames(direction)
        least, longest = default_chunk_frames(self.config.same, direction), pad_frames(_LONGEST, self.config.same)
        return largest_chunk(self.config, direction, self._room() / 2, None, longest=longest, least=least)

    def _room(self) -> float:
        """Return the bytes that the device has left, those that PyTorch keeps for itself included."""
        if self._device.type != "cuda":
            return math.inf
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return torch.cuda.mem_get_info(self._device)[0] + kept

    @property
    def launches_ahead(self) -> bool:
        """Tell whether the next piece of work is launched before one is brought back, so that no device waits."""
        return self._device.type == "cuda"

    def _stopwatch(self, *stages: str) -> Stopwatch:
        if self._device.type != "cuda":
            return super()._stopwatch(*stages)
        return Stopwatch(*stages, mark=mark, between=seconds_between)

    def _seeded(self, request: Request, plan: Plan) -> NoiseSource:
        if way("noise") == "host" or any(plan.seeds) or any(item.spread for item in request.items):
            return super()._seeded(request, plan)
        drawn = plan.sampling.steps - 1 if plan.sampling.sampler == "pingpong" else 0
        return DeviceNoise(
            seeds=[item.seed for item in request.items],
            device=self._device,
            frames=plan.frames,
            channels=self.config.same.latent_channels,
            steps=drawn,
        )

    def start(self, plan: Plan, noise: NoiseSource, init: Latents | None) -> Tensor:
        """Return what sampling starts from (B, T, C), with latents (B, T, C) of the init audio or without [B30]."""
        if not isinstance(noise, DeviceNoise):
            return super().start(plan, noise, init)
        drawn = noise.batch(INITIAL)
        if init is None or plan.init is None:
            return drawn
        level = self._array(noise_levels(plan.init))
        return (1 - level) * self._array(init) + level * drawn

    def draw(self, plan: Plan, noise: NoiseSource, index: int) -> Tensor:
        """Draw the normals (B, T, C) that a sampler may add at the end of step ``index`` [B27]."""
        return noise.batch(step(index)) if isinstance(noise, DeviceNoise) else super().draw(plan, noise, index)

    def _cast(self, array: Tensor) -> Tensor:
        return array.to(DTYPES[self.precision.dtype])

    def _empty_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif self._device.type == "mps":
            torch.mps.empty_cache()

    def _read(self, part: Part, *, streamed: bool) -> nn.Module:
        name = self._number_type(part)
        dtype = None if name is None else DTYPES[name]
        if streamed:
            return load_streamed_dit(self.folder, self.config, self._device, dtype)
        device = torch.device("cpu") if part == "same" else self._device  # its halves move when they are needed
        return load_part(self.folder, self.config, part, device, dtype)

    def _number_type(self, part: Part) -> str | None:
        name = super()._number_type(part)
        if name is None:
            with TensorFile.open(self.folder / WEIGHTS_FILE) as file:
                if file.info(EMBEDDING)[0] == "F16":
                    return "float32"  # activations of T5Gemma overflow float16
        return name

    def prefetch_decoder(self, done: int, steps: int) -> None:  # noqa: ARG002 (MLX reads a share after each step)
        """Begin before the first step to read the autoencoder's decoder beside what is computed meanwhile."""
        if not done and "same" not in self._parts:
            Thread(target=read_ahead, args=(self.folder / WEIGHTS_FILE, "same.decoder."), daemon=True).start()

    def autoencoder(self, half: Literal["encoder", "decoder"]) -> SAME:
        """Return the autoencoder with one half in the device's memory; the other one stays in the file until it is
        needed."""
        numbers = way("autoencoder")
        if self._halves.get(half, numbers) != numbers:
            self.free("same")
        same = cast(SAME, self.load_part("same"))
        if half not in self._halves:
            same.bottleneck.to(self._device)
            network = same.get_submodule(half).to(self._device)
            if numbers != "float32":
                halve_products(network.get_submodule("layers"), torch.float16, wide=numbers == "products")
            self._halves[half] = numbers
        return same

    @cached_property
    def _halves(self) -> dict[str, str]:
        """Hold the halves of the autoencoder that are on the device, and the numbers that they compute with."""
        return {}

    def free(self, *parts: Part) -> None:
        """Give the memory of these parts back; they are read again when they are needed.

        Raises ValueError for one that the model does not have.
        """
        super().free(*parts)
        if "same" in parts:
            self._halves.clear()

    def _encode(self, audio: Audio) -> Latents:
        return self._numpy(self.autoencoder("encoder").encode(self._array(audio[None]))[0])

    def _decode(self, latents: Latents | Tensor, *noises: Latents) -> Tensor:
        same = self.autoencoder("decoder")
        return graphed(same, same.decode, *(self._here(values) for values in (latents[None], *noises)))[0]

    def _here(self, values: np.ndarray | Tensor) -> Tensor:
        return values if isinstance(values, Tensor) else self._array(values)

    def _sample(
        self,
        plan: Plan,
        cond: Conditioning[Tensor],
        null: Conditioning[Tensor] | None,
        start: Tensor,
        draw: Callable[[int], Tensor],
        held: Callable[[Tensor, np.ndarray, Tensor], Tensor],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the steps from the start (B, T, C): see ``_steps``. Of one item, frames that mean nothing can be cut.

        They are at the end, and no other frame attends to them; so there is no mask, with which a GPU is slower.
        """
        frames, whole = plan.lengths.valid[0], start.shape[1]
        if way("padding") == "masked" or len(start) > 1 or frames == whole or plan.levels is not None:
            return super()._sample(plan, cond, null, start, draw, held)

        def cut(given: Conditioning[Tensor]) -> Conditioning[Tensor]:
            local = None if given.local is None else given.local[:, :frames]
            shares = None if given.shares is None else given.shares[:, : frames - whole]
            return replace(given, valid=None, local=local, shares=shares)

        steps = super()._sample(
            plan, cut(cond), null and cut(null), start[:, :frames], lambda index: draw(index)[:, :frames], held
        )
        ends = (0, 0, 0, whole - frames)
        return ((F.pad(denoised, ends), F.pad(x, ends)) for denoised, x in steps)

    def _steps(
        self,
        plan: Plan,
        velocity: Callable[[Tensor, np.ndarray], Tensor],
        start: Tensor,
        draw: Callable[[int], Tensor],
        held: Callable[[Tensor, np.ndarray, Tensor], Tensor],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        dtype = DTYPES[self.precision.dtype]

        def in_fp32(x: Tensor, t: np.ndarray) -> Tensor:
            return held(x, t, velocity(x.to(dtype), t).to(torch.float32, copy=True))

        for done in SAMPLERS[plan.sampling.sampler](in_fp32, start, plan.sigmas, draw):
            yield done.denoised, done.x
