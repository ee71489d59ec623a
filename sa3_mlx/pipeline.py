"""From a request to audio: text-to-audio, audio-to-audio, inpainting and continuation in one generator of events.

Shapes: B batch, T latent frames, S context tokens, D context width, C latent channels, L audio samples.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Self, cast

import numpy as np
from mlx.utils import tree_flatten

from sa3_mlx.common.adapters.format import Applied, prepare_adapters
from sa3_mlx.common.files.audio import Audio, check_audio
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.generation.clips import (
    Clip,
    Texts,
    check_latents,
    decode_plan,
    decoder_noise,
    encode_sources,
    generation,
    kept_part,
    local_input,
    open_tokenizer,
    start_latents,
)
from sa3_mlx.common.generation.events import (
    AudioChunk,
    Conditioned,
    Event,
    Finished,
    Generation,
    Latents,
    NoiseSource,
    Sampled,
    SeededNoise,
    Stepped,
    Stopwatch,
    batch_of,
)
from sa3_mlx.common.generation.noise import INITIAL, step
from sa3_mlx.common.generation.plan import Plan
from sa3_mlx.common.generation.plan import plan as make_plan
from sa3_mlx.common.generation.request import Request, Residency
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE, Part, parts_of
from sa3_mlx.common.model.chunks import Chunk, chunk_plan, default_chunk_frames
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import samples_to_frames
from sa3_mlx.common.model.precision import Precision, choose_precision
from sa3_mlx.common.quant.format import check_folder
from sa3_mlx.common.text.tokenizer import Tokenizer, collapse_padding
from sa3_mlx.runtime import mx, nn

from .conditioner import Conditioner
from .dit import Conditioning, DiT
from .guidance import GuidedVelocity, negative, unconditional
from .lora import GatedVelocity, adapt, merge
from .same import SAME
from .samplers import SAMPLERS
from .t5gemma import T5GemmaEncoder
from .weights import load_part, load_streamed_dit

_TOGETHER = 2  # tensors

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


class Pipeline:
    """A checkpoint folder, ready to generate. Parts are read when they are first needed and stay until ``free``.

    The DiT and the text encoder run in ``precision``; conditioner, autoencoder and sampler state stay in fp32.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        precision: Precision,
        adapters: tuple[Applied, ...] = (),
        *,
        merged: bool = False,
    ) -> None:
        self.folder = folder
        self.config = config
        self.precision = precision
        self.adapters = adapters
        self.merged = merged
        self._dtype = DTYPES[precision.dtype]
        self._text_dtype = None if precision.text_dtype is None else DTYPES[precision.text_dtype]
        self._parts: dict[Part, nn.Module] = {}
        self._adapted: dict[tuple[Applied, ...], DiT] = {}

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
        """Check a checkpoint folder and open it; no weights are read yet. ``choose_precision`` says what "auto" means.

        ``adapters`` change the DiT and the conditioner, each on top of those before it; the DiT's weights stay as they
        are, also packed ones, unless ``merged``.

        Raises FileNotFoundError for a missing file, ValueError for a bad configuration, tensor or dtype, and for an
        adapter that does not fit.
        """
        on_gpu = mx.default_device().type == mx.DeviceType.gpu
        precision = choose_precision(dtype, text_dtype, on_gpu=on_gpu)
        folder = Path(folder)
        config = ModelConfig.load(folder)
        check_folder(folder, config)
        return cls(folder, config, precision, prepare_adapters(adapters, folder, config, merged=merged), merged=merged)

    @cached_property
    def hash(self) -> str:
        """``"sha256:..."`` of the weights; reads the whole file once."""
        return file_hash(self.folder / WEIGHTS_FILE)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError for an autoencoder alone and for a tokenizer of another text encoder."""
        return open_tokenizer(self.folder, self.config)

    @property
    def loaded(self) -> tuple[Part, ...]:
        """Parts that are in memory."""
        return tuple(part for part in parts_of(self.config) if part in self._parts)

    def load_part(self, part: Part) -> nn.Module:
        """A part of the model, read from the folder unless it is in memory; with all adapters on."""
        return self.dit_with(self.adapters) if part == "dit" else self._read_part(part)

    def dit_with(self, adapters: tuple[Applied, ...]) -> DiT:
        """The DiT with some of the pipeline's adapters on; merged ones always are.

        A streamed one has no weights in memory to merge them into.
        """
        base = cast(DiT, self._read_part("dit"))
        if not adapters or (self.merged and not base.streamed):
            return base
        if adapters not in self._adapted:
            self._adapted[adapters] = cast(DiT, adapt(base, "dit", adapters))
        return self._adapted[adapters]

    def _read_part(self, part: Part) -> nn.Module:
        if part not in self._parts:
            dtypes = {"text_encoder": self._text_dtype, "dit": self._dtype}
            module = load_part(self.folder, self.config, part, dtypes.get(part, mx.float32))
            if part != "same":  # whose halves are read apart
                _read(module)
            if part == "conditioner" or (part == "dit" and self.merged):
                module = merge(module, part, self.adapters)
            self._parts[part] = module
        return self._parts[part]

    def prefetch_decoder(self) -> None:
        """Begin to read the autoencoder's decoder beside what is computed meanwhile."""
        same = cast(SAME, self.load_part("same"))
        mx.async_eval(same.decoder.parameters())

    def autoencoder(self, half: Literal["encoder", "decoder"]) -> SAME:
        """The autoencoder with one half in memory; the other one stays in the file until it is needed."""
        same = cast(SAME, self.load_part("same"))
        _read(same.bottleneck)
        _read(same[half])
        return same

    def free(self, *parts: Part) -> None:
        """Give the memory of these parts back; they are read again when they are needed."""
        for part in parts:
            self._parts.pop(part, None)
        if "dit" in parts:
            self._adapted.clear()
        mx.clear_cache()

    def generate(self, request: Request) -> Generation:
        """Run to the end. Raises ValueError for a request that cannot be done."""
        *_, last = self.stream(request)
        return cast(Finished, last).generation

    def stream(
        self, request: Request, *, noise: NoiseSource | None = None, residency: Residency = "run"
    ) -> Iterator[Event]:
        """Events of a run: Conditioned, a Stepped per step, Sampled, AudioChunks item by item, Finished.

        The request is checked now, everything else happens when the next event is asked for; closing the iterator stops
        the run. ``noise``: where normals come from instead of the items' seeds. ``residency``: how long weights
        stay in memory, see ``Residency``.
        Raises ValueError for a request that cannot be done.
        """
        source = noise or SeededNoise([item.seed for item in request.items])
        return self._run(request, make_plan(request, self.config), source, residency)

    def encode(self, audio: Audio, *, chunk_frames: int | None = None) -> Latents:
        """Audio (L, channels) float32 at the model's sample rate -> latents (ceil(L / R), C), chunk by chunk."""
        check_audio(audio, "encode", self.config.audio_channels)
        same, config = self.autoencoder("encoder"), self.config.same
        ratio, frames = config.samples_per_latent, samples_to_frames(len(audio), config)
        size = default_chunk_frames(config, "encode") if chunk_frames is None else chunk_frames
        kept: list[Latents] = []
        for chunk in chunk_plan(frames, size, config, "encode"):
            latents = np.array(same.encode(mx.array(audio[None, chunk.start * ratio : chunk.stop * ratio]))[0])
            kept.append(latents[chunk.keep_start - chunk.start : chunk.keep_stop - chunk.start])
        return np.concatenate(kept)

    def decode(self, latents: Latents) -> Audio:
        """Latents (T, C) float32 -> audio (T R, channels), not clamped."""
        return np.concatenate(list(self.decode_stream(latents)))

    def decode_stream(self, latents: Latents, *, chunk_frames: int | None = None) -> Iterator[Audio]:
        """As ``decode``, in pieces that joined are the whole; each is computed when it is asked for.

        Raises ValueError for latents that do not fit and for a chunk size that cannot be exact.
        """
        check_latents(latents, self.config)
        config = self.config.same
        size = default_chunk_frames(config, "decode") if chunk_frames is None else chunk_frames
        for chunk in chunk_plan(len(latents), size, config, "decode"):
            yield kept_part(chunk, self._decode_chunk(latents, chunk), config.samples_per_latent)

    def _run(self, request: Request, plan: Plan, noise: NoiseSource, residency: Residency) -> Iterator[Event]:
        watch, latent_channels = Stopwatch("text", "encode", "sample", "decode"), self.config.same.latent_channels
        try:
            with watch("text"):
                cond, null = self.encode_texts(request, plan)
                self._release(residency, "text_encoder", "conditioner")
            with watch("encode"):
                encode = partial(self.encode, chunk_frames=request.encode_chunk_frames)
                init, inpaint = encode_sources(request, plan, self.config, encode)
                self._release(residency, "same")
            yield Conditioned(frames=plan.frames, valid=plan.lengths.valid, sigmas=plan.sigmas)
            with watch("sample"):
                cond = replace(cond, local=mx.array(local_input(plan, inpaint, latent_channels)).astype(self._dtype))
                start = start_latents(plan, batch_of(noise, INITIAL, plan.keep_frames.shape, latent_channels), init)
                if residency == "step":
                    self._parts["dit"] = load_streamed_dit(self.folder, self.config, self._dtype)
                self._read_part("dit")
                if residency == "run":
                    self.prefetch_decoder()
            latents = yield from self._sample(plan, cond, null, start, noise, watch)
            self._release(residency, "dit")
            yield Sampled(latents=latents)
            clips = [Clip(row, request, plan, self.config) for row in range(len(request.items))]
            for row, clip in enumerate(clips):
                yield from self._decode_clip(request, plan, row, clip, latents[row], noise, watch)
            yield Finished(generation=generation(request, plan, clips, latents, self.config, watch.seconds))
        finally:
            self._release(residency, *self.loaded)

    def _release(self, residency: Residency, *parts: Part) -> None:
        if residency != "run":
            self.free(*parts)

    def encode_texts(self, request: Request, plan: Plan) -> tuple[Conditioning, Conditioning | None]:
        """Prompts and, with guidance, what it leads away from: negative prompts or zeros [B19]. No local input yet."""
        texts = Texts.of(request)
        ids, mask = self.tokenizer.encode(texts.texts)
        slots, repeats = collapse_padding(mask)
        ids, mask = ids[:, :slots], mask[:, :slots]
        encoder = cast(T5GemmaEncoder, self.load_part("text_encoder"))
        conditioner = cast(Conditioner, self.load_part("conditioner"))
        seconds = np.array([item.seconds for item in request.items])
        hidden = encoder(mx.array(ids), mx.array(mask))
        context, duration = conditioner(hidden[mx.array(texts.prompts)], mx.array(mask[texts.prompts]), seconds)
        cond = Conditioning(
            context=context.astype(self._dtype),
            repeats=mx.array(repeats[texts.prompts]),
            seconds=duration.astype(self._dtype),
            local=None,
            valid=None if plan.padding_mask.all() else mx.array(plan.padding_mask),
        )
        mx.eval(cond.context, cond.seconds)
        if plan.sampling.guidance.scale == 1:
            return cond, None
        if not texts.has_negative.any():
            return cond, unconditional(cond)
        away = negative(cond, hidden[mx.array(texts.negatives)], mx.array(mask[texts.negatives]))
        chosen = mx.array(texts.has_negative)[:, None, None]
        assert away.context is not None
        null = replace(away, context=away.context * chosen, repeats=mx.array(repeats[texts.negatives]))
        mx.eval(null.context)
        return cond, null

    def _sample(
        self,
        plan: Plan,
        cond: Conditioning,
        null: Conditioning | None,
        start: Latents,
        noise: NoiseSource,
        watch: Stopwatch,
    ) -> Generator[Stepped, None, Latents]:
        """From the start (B, T, C) to the latents of the end; every step is computed before it is announced."""

        def guided(adapters: tuple[Applied, ...]) -> GuidedVelocity:
            dit = self.dit_with(adapters)
            return GuidedVelocity(
                dit=dit,
                cond=dit.prepare(cond),
                null=None if null is None else dit.prepare(null),
                guidance=plan.sampling.guidance,
                times=np.ascontiguousarray(plan.sigmas[:, :-1].T),
            )

        gated = GatedVelocity(self.adapters, guided)

        def velocity(x: mx.array, t: np.ndarray) -> mx.array:
            return gated(x.astype(self._dtype), t).astype(mx.float32)

        def draw(index: int) -> mx.array:
            return mx.array(batch_of(noise, step(index), plan.keep_frames.shape, start.shape[-1]))

        steps = SAMPLERS[plan.sampling.sampler](velocity, mx.array(start), plan.sigmas, draw)
        with watch("sample"):
            done = next(steps)
        for index in range(plan.sampling.steps):
            with watch("sample"):
                mx.async_eval(done.x, done.denoised)
                computing, done = done, next(steps, done)  # the next graph is built meanwhile
                mx.eval(computing.x, computing.denoised)
            yield Stepped(index=index, steps=plan.sampling.steps, denoised=computing.denoised)
        return np.array(done.x)

    def _decode_clip(
        self, request: Request, plan: Plan, row: int, clip: Clip, latents: Latents, noise: NoiseSource, watch: Stopwatch
    ) -> Iterator[AudioChunk]:
        """One item's latents (T, C) to finished audio."""
        for chunk in decode_plan(plan, row, request.chunk_frames, self.config):
            with watch("decode"):
                noises = decoder_noise(noise, row, chunk, self.config) if request.decode_noise else ()
                decoded = self._decode_chunk(latents, chunk, *noises)
            yield clip.add(kept_part(chunk, decoded, self.config.same.samples_per_latent))

    def _decode_chunk(self, latents: Latents, chunk: Chunk, *noises: np.ndarray) -> Audio:
        """Latents (T, C) -> audio of all frames of the chunk; the noises are those of ``SAME.decode``."""
        same = self.autoencoder("decoder")
        z = mx.array(latents[None, chunk.start : chunk.stop])
        audio = same.decode(z, *(mx.array(noise) for noise in noises))
        return np.array(audio[0])


def _read(module: nn.Module) -> None:
    """Bring the weights into memory, a few at a time: beside one that changes its type is only its own old copy."""
    arrays = [array for _, array in cast(list[tuple[str, mx.array]], tree_flatten(module.parameters()))]
    for start in range(0, len(arrays), _TOGETHER):
        mx.eval(*arrays[start : start + _TOGETHER])
