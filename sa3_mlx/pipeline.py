"""Carry out requests with MLX: what ``BasePipeline`` leaves to a framework.

Shapes: B batch, T latent frames, C latent channels, L audio samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self, cast

import numpy as np
from mlx.utils import tree_flatten

from sa3_mlx.common.adapters.applied import Applied
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.generation.events import Latents
from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_mlx.common.generation.plan import Plan
from sa3_mlx.common.model.checkpoint import Part
from sa3_mlx.common.model.precision import choose_precision
from sa3_mlx.runtime import mx, nn

from .guidance import GuidedVelocity, negative
from .lora import GatedVelocity, adapt, merge
from .same import SAME
from .samplers import SAMPLERS
from .weights import load_part, load_streamed_dit

_TOGETHER = 2  # tensors

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class Pipeline(BasePipeline[mx.array]):
    """Generate with MLX from a checkpoint folder: open it with ``load``."""

    negative, adapt, merge = staticmethod(negative), staticmethod(adapt), staticmethod(merge)
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
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        precision = choose_precision(dtype, text_dtype, on_gpu=on_gpu)
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
            _read_weights(module)
        return module

    def prefetch_decoder(self) -> None:
        """Begin to read the autoencoder's decoder beside what is computed meanwhile."""
        same = cast(SAME, self.load_part("same"))
        mx.async_eval(same.decoder.parameters())

    def autoencoder(self, half: Literal["encoder", "decoder"]) -> SAME:
        """Return the autoencoder with one half in memory; the other one stays in the file until it is needed."""
        same = cast(SAME, self.load_part("same"))
        _read_weights(same.bottleneck)
        _read_weights(same[half])
        return same

    def _encode(self, audio: Audio) -> Latents:
        return np.array(self.autoencoder("encoder").encode(mx.array(audio[None]))[0])

    def _decode(self, latents: Latents, *noises: Latents) -> Audio:
        same = self.autoencoder("decoder")
        return np.array(same.decode(mx.array(latents[None]), *(mx.array(noise) for noise in noises))[0])

    def _steps(
        self,
        plan: Plan,
        velocity: Callable[[mx.array, np.ndarray], mx.array],
        start: mx.array,
        draw: Callable[[int], mx.array],
    ) -> Iterator[tuple[mx.array, mx.array]]:
        dtype = DTYPES[self.precision.dtype]

        def in_fp32(x: mx.array, t: np.ndarray) -> mx.array:
            return velocity(x.astype(dtype), t).astype(mx.float32)

        steps = SAMPLERS[plan.sampling.sampler](in_fp32, start, plan.sigmas, draw)
        done = next(steps)
        for _ in range(plan.sampling.steps):
            mx.async_eval(done.x, done.denoised)
            computing, done = done, next(steps, done)  # the next graph is built meanwhile
            mx.eval(computing.x, computing.denoised)
            yield computing.denoised, computing.x


def _read_weights(module: nn.Module) -> None:
    """Bring the weights into memory, a few at a time: beside one that changes its type is only its own old copy."""
    arrays = [array for _, array in cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))]
    for start in range(0, len(arrays), _TOGETHER):
        mx.eval(*arrays[start : start + _TOGETHER])
