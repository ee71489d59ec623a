"""Carry out requests with MLX: what ``BasePipeline`` leaves to a framework.

Shapes: B batch, T latent frames, C latent channels, L audio samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, Self, cast

import numpy as np
from mlx.utils import tree_flatten

from sa3_mlx.common.adapters.applied import Applied
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.events import Latents
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.plan import Plan
from sa3_mlx.common.memory.activations import largest_chunk
from sa3_mlx.common.model.checkpoint import Part
from sa3_mlx.common.model.chunks import Direction, default_chunk_frames, long_chunk_frames
from sa3_mlx.common.model.precision import choose_precision
from sa3_mlx.runtime import apple_gpu, mx, nn, on_gpu

from .choices import CHOICES, way
from .conditioner import blend
from .guidance import GuidedVelocity, negative
from .lora import GatedVelocity, adapt, merge
from .same import SAME
from .samplers import SAMPLERS, Step
from .weights import load_part, load_streamed_dit, read_weights

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class Pipeline(BasePipeline[mx.array]):
    """Generate with MLX from a checkpoint folder: open it with ``load``."""

    choices = CHOICES
    blend, negative = staticmethod(blend), staticmethod(negative)
    adapt, merge = staticmethod(adapt), staticmethod(merge)
    guided_velocity, gated_velocity = GuidedVelocity, GatedVelocity

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: str = "auto",
        text_dtype: str = "auto",
        adapters: Sequence[Applied] = (),
        merged: bool = False,
    ) -> Self:
        """Check a model and open it: a checkpoint folder, or the name of an installed model, such as "demo".

        No weights are read yet. ``choose_precision`` says what "auto" means.

        ``adapters`` change the DiT and the conditioner, each on top of those before it; the DiT's weights stay as they
        are, also packed ones, unless ``merged``.

        Raises FileNotFoundError for a missing file, ValueError for a bad configuration, tensor or dtype, and for an
        adapter that does not fit.
        """
        precision = choose_precision(dtype, text_dtype, on_gpu=on_gpu())
        folder, config, prepared = cls._checked(folder, adapters, merged=merged)
        return cls(folder, config, precision, prepared, merged=merged)

    def _array(self, values: np.ndarray) -> mx.array:
        return mx.array(values)

    def _numpy(self, array: mx.array) -> np.ndarray:
        return np.array(array)

    def _cast(self, array: mx.array) -> mx.array:
        array = array.astype(DTYPES[self.precision.dtype])
        mx.eval(array)
        return array

    def _empty_cache(self) -> None:
        mx.clear_cache()

    def _read(self, part: Part, *, streamed: bool) -> nn.Module:
        name = self._number_type(part)
        dtype = None if name is None else DTYPES[name]
        if streamed:
            return load_streamed_dit(self.folder, self.config, dtype)
        module = load_part(self.folder, self.config, part, dtype)
        if part != "same":  # whose halves are read apart
            read_weights(module, self.folder, part + ".")
        return module

    @property
    def launches_ahead(self) -> bool:
        """Tell whether the next piece of work is launched before one is brought back, so that no device waits."""
        return way("launches") == "ahead"

    def usual_chunk_frames(self, direction: Direction) -> int:
        """Return the latent frames of a chunk where a caller names none: long ones fill half of an Apple GPU's room."""
        if way("chunks") != "long":
            return super().usual_chunk_frames(direction)
        default, metal = default_chunk_frames(self.config.same, direction), apple_gpu()
        longest, room = long_chunk_frames(self.config.same, direction), metal.working_set / 2 if metal else math.inf
        return largest_chunk(self.config, direction, room, metal, longest=longest, least=default)

    @property
    def device_name(self) -> str:
        """Return "cpu" or "gpu"."""
        return self.choices.kind

    def prefetch_decoder(self, done: int, steps: int) -> None:
        """Read the share of the autoencoder's decoder that is due after ``done`` steps, beside the one under way.

        Not all of it at once: MLX waits while more than ten operations are under way, so the first step would.
        """
        if 0 < done < steps:
            same = cast(SAME, self.load_part("same"))
            arrays = [array for _, array in cast(list[tuple[str, mx.array]], tree_flatten(same.decoder.parameters()))]
            mx.async_eval(arrays[len(arrays) * (done - 1) // (steps - 1) : len(arrays) * done // (steps - 1)])

    def autoencoder(self, half: Literal["encoder", "decoder"]) -> SAME:
        """Return the autoencoder with one half in memory; the other one stays in the file until it is needed."""
        same = cast(SAME, self.load_part("same"))
        for name in {"bottleneck", half} - self._halves:
            read_weights(same[name], self.folder, f"same.{name}.")
            self._halves.add(name)
        return same

    @cached_property
    def _halves(self) -> set[str]:
        """Hold the names of what is in memory of the autoencoder."""
        return set()

    def free(self, *parts: Part) -> None:
        """Give the memory of these parts back; they are read again when they are needed.

        Raises ValueError for one that the model does not have.
        """
        super().free(*parts)
        if "same" in parts:
            self._halves.clear()

    def _encode(self, audio: Audio) -> Latents:
        return np.array(self.autoencoder("encoder").encode(mx.array(audio[None]))[0])

    def _decode(self, latents: Latents | mx.array, *noises: Latents) -> mx.array:
        same = self.autoencoder("decoder")
        audio = same.decode(mx.array(latents[None]), *(mx.array(noise) for noise in noises))[0]
        mx.async_eval(audio)
        return audio

    def _steps(
        self,
        plan: Plan,
        velocity: Callable[[mx.array, np.ndarray], mx.array],
        start: mx.array,
        draw: Callable[[int], mx.array],
        held: Callable[[mx.array, np.ndarray, mx.array], mx.array],
    ) -> Iterator[tuple[mx.array, mx.array]]:
        dtype, ahead = DTYPES[self.precision.dtype], self.launches_ahead

        def in_fp32(x: mx.array, t: np.ndarray) -> mx.array:
            return held(x, t, velocity(x.astype(dtype), t).astype(mx.float32))

        computing: Step | None = None
        for step in SAMPLERS[plan.sampling.sampler](in_fp32, start, plan.sigmas, draw):
            if ahead:
                mx.async_eval(step.x, step.denoised)
            if computing is not None:  # since before the graph of this step was built
                mx.eval(computing.x, computing.denoised)
                yield computing.denoised, computing.x
            if not ahead:
                mx.async_eval(step.x, step.denoised)
            computing = step
        assert computing is not None
        mx.eval(computing.x, computing.denoised)
        yield computing.denoised, computing.x
