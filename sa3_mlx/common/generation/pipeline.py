"""Run a request from prompts to audio, written once for both twins: no framework is imported here.

Shapes: B batch, T latent frames, S text tokens, D context width, C latent channels, L audio samples, R samples per
latent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, get_args

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.adapters.applied import Applied
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.model.checkpoint import Part
from sa3_mlx.common.model.chunks import Chunk
from sa3_mlx.common.model.lengths import samples_to_frames
from sa3_mlx.common.text.tokenizer import collapse_padding

from .checks import validate
from .clips import (
    Clip,
    Mix,
    Texts,
    decode_plan,
    decoder_noise,
    encode_sources,
    generation,
    kept_part,
    local_input,
    start_latents,
)
from .conditioning import Conditioning
from .events import (
    AudioChunk,
    Conditioned,
    Event,
    Finished,
    Generation,
    Latents,
    NoiseSource,
    Sampled,
    Stepped,
    Stopwatch,
    batch_of,
    host_noise,
)
from .frames import Held, text_shares
from .long.around import around
from .long.piece import joined, placed
from .long.run import run_long
from .long.store import WindowStore
from .long.windows import by_windows
from .noise import INITIAL, step
from .parts import Array, LoadedParts
from .plan import Plan, plan, told_seconds
from .request import Request, Residency
from .rolled import run_rolled

Velocity = Callable[[Array, NDArray[np.float32]], Array]  # x (B, T, C), t (B,) -> (B, T, C)
Sources = tuple[Latents | None, Latents | None]
Settle = Callable[[Array, NDArray[np.float32], Array], Array]  # x, t, velocity -> velocity (B, T, C)
Noise = Callable[[int], Array]  # number of a step -> standard normals (B, T, C)


class BasePipeline(LoadedParts[Array]):
    """Open a checkpoint folder, ready to generate; ``Pipeline`` of either twin. Annotate with it what takes both.

    A twin supplies ``_steps`` and, as class attributes, functions and classes of its conditioner.py, guidance.py and
    lora.py that a run uses. The state of a sampler stays in fp32.

    Any thread may use it, one at a time: a server has one worker that owns the device and takes requests in turn.
    """

    blend: ClassVar[Callable[..., Any]]
    negative: ClassVar[Callable[..., Any]]
    guided_velocity: ClassVar[Callable[..., Any]]
    gated_velocity: ClassVar[Callable[..., Any]]

    @abstractmethod
    def _steps(
        self, plan: Plan, velocity: Velocity[Array], start: Array, draw: Noise[Array], held: Settle[Array]
    ) -> Iterator[tuple[Array, Array]]:
        """Sample from ``start``: after every step, computed, what the model expects of the end and the new state.

        ``held`` has the last word on a velocity, in fp32.
        """

    def generate(self, request: Request) -> Generation:
        """Run to the end. Raises ValueError for a request that cannot be done."""
        if by_windows(request, self.config):
            return joined(self.stream(request), self.config)
        *_, last = self.stream(request)
        assert isinstance(last, Finished)
        return last.generation

    def stream(
        self,
        request: Request,
        *,
        noise: NoiseSource | None = None,
        residency: Residency = "run",
        store: WindowStore | None = None,
    ) -> Iterator[Event]:
        """Yield the events of a run: Conditioned, a Stepped per step, Sampled, AudioChunks item by item, Finished.

        Those of a piece made in windows: for every window Conditioned, a Stepped per step, WindowMade and
        what AudioChunks are then whole; PieceFinished. ``store`` keeps its windows, and has those that are there.

        The request is checked now, everything else happens when the next event is asked for; closing the iterator stops
        the run. ``noise``: where normals come from instead of the items' seeds. ``residency``: how long weights
        stay in memory, see ``Residency``.
        Raises ValueError for a request that cannot be done and for an unknown residency.
        """
        if residency not in get_args(Residency):
            raise ValueError(f"residency is {residency!r}: allowed are {', '.join(get_args(Residency))}")
        if request.long is not None:
            validate(request, self.config)
            if not by_windows(request, self.config):
                found = around(request, self.config)
                return placed(self.stream(found.request, noise=noise, residency=residency), found, request)
            drawn = noise or host_noise(request)
            return self._in_its_ways(run_long(self, request, drawn, residency, store))
        planned = plan(request, self.config)
        if request.loop is not None and request.loop.way == "seam":
            return run_rolled(self, request, noise, residency)
        return self._in_its_ways(self._run(request, planned, noise or self._seeded(request, planned), residency))

    def _run(
        self, request: Request, plan: Plan, noise: NoiseSource, residency: Residency
    ) -> Generator[Event, None, None]:
        watch = self.stopwatch()
        try:
            end = yield from self.sampled(request, plan, noise, residency, watch)
            fetch = self._bring(end)
            yield Sampled(fetch=fetch)
            clips = [Clip(row, request, plan, self.config) for row in range(len(request.items))]
            yield from self._decode_clips(request, plan, clips, end, noise, watch)
            ways = self.choices.differing(self.choices.now())
            yield Finished(generation=generation(request, plan, clips, fetch(), self.config, watch.seconds, ways))
        finally:
            self._release(residency, *self.loaded)

    def sampled(
        self,
        request: Request,
        plan: Plan,
        noise: NoiseSource,
        residency: Residency,
        watch: Stopwatch,
        sources: Sources | None = None,
    ) -> Generator[Event, None, Array]:
        """Yield Conditioned and a Stepped per step, and return the latents (B, T, C) of the end, on the device.

        ``sources``: latents (B, T, C) of the init and the inpaint audio, in place of the request's.
        """
        with watch("text"):
            cond, null = self.encode_texts(request, plan)
            self._release(residency, "text_encoder", "conditioner")
        with watch("encode"):
            init, inpaint = self.encode_sources(request, plan) if sources is None else sources
            self._release(residency, "same")
        yield Conditioned(frames=plan.frames, valid=plan.lengths.valid, sigmas=plan.sigmas)
        with watch("sample"):
            cond = replace(cond, local=self.local_input(plan, inpaint))
            start, draw = self.start(plan, noise, init), partial(self.draw, plan, noise)
            if residency == "step":
                self.free("dit")
            self._part("dit", streamed=residency == "step")
        steps = self._sample(plan, cond, null, start, draw, self.held(plan, inpaint))
        end = yield from self._announced(steps, plan.sampling.steps, watch, prefetch=residency == "run")
        self._release(residency, "dit")
        return end

    def _release(self, residency: Residency, *parts: Part) -> None:
        if residency != "run":
            self.free(*parts)

    def fetch(self, array: Array) -> Latents:
        """Bring latents back from the device."""
        return self._numpy(array)

    def decode_piece(self, latents: Latents, *noises: Latents) -> Audio:
        """Decode latents (n, C) at once -> (n R, channels), as a part of a whole that the caller has planned."""
        return self._numpy(self._decode(latents, *noises))

    def encode_texts(self, request: Request, plan: Plan) -> tuple[Conditioning[Array], Conditioning[Array] | None]:
        """Encode prompts and, with guidance, what it leads away from: negative prompts or zeros [B19].

        The local input is left None.
        """
        texts = Texts.of(request)
        ids, mask = self.tokenizer.encode([text.text for text in texts.texts])
        items = np.concatenate([texts.prompts.mask(mask), texts.negatives.mask(mask)])
        slots, repeats = collapse_padding(items, self.precision.dtype, self.context_sizes)
        ids, mask = ids[:, :slots], mask[:, :slots]
        hidden, conditioner = self.text_states(ids, mask), self.load_part("conditioner")
        weights, lengths = texts.weights(self.tokenizer, slots), np.array(told_seconds(request, self.config))
        count, most = len(lengths), texts.most
        each = np.repeat(lengths, most)  # (B K,)

        def in_line(context: Array) -> Array:  # the K prompts of an item, one after the other
            return context if most == 1 else context.reshape(count, most * (slots + 1), -1)

        def mixed(mix: Mix, embed: Callable[[Array, Array], Array]) -> Array:
            def context(rows: NDArray[np.int32]) -> Array:
                found = embed(hidden[self._array(rows)], self._array(mask[rows]))
                return found if weights is None else found * self._array(weights[rows, :, None])

            first = context(mix.first)
            if not mix.share.any():
                return first
            share = self._array(mix.share[:, None, None])
            blended: Array = self.blend(first, context(mix.second), share, spherical=request.blend == "spherical")
            return blended

        cond: Conditioning[Array] = Conditioning(
            context=self._cast(in_line(mixed(texts.prompts, lambda states, own: conditioner(states, own, each)[0]))),
            repeats=self._array(repeats[: len(each)].reshape(count, -1)),
            shares=None if plan.shares is None else self._array(plan.shares),
            seconds=self._cast(conditioner.embed_seconds(lengths)),
            local=None,
            valid=None if plan.padding_mask.all() else self._array(plan.padding_mask),
        )
        if plan.sampling.guidance.scale == 1:
            return cond, None
        if not texts.has_negative.any():
            return cond, cond.unconditional()
        away = mixed(texts.negatives, lambda states, own: self.negative(cond, states, own).context)
        context, repeats = away * self._array(texts.has_negative[:, None, None]), repeats[len(each) :]
        if most > 1:  # as long as the other context, with fillers
            filled = np.minimum(np.arange(most * (slots + 1)), slots)
            context = context[:, self._array(filled.astype(np.int32))]
            repeats = np.pad(repeats, ((0, 0), (0, (most - 1) * (slots + 1))))
        return cond, replace(cond, context=self._cast(context), repeats=self._array(repeats), shares=None)

    def clap_cosines(self, made: Generation, *, residency: Residency = "run") -> tuple[float, ...]:
        """Return how near every clip is to its prompt, -1 to 1: cosines of the vectors of the model's latent CLAP.

        Texts of blends and over time count by their shares, weights of phrases for nothing; of frames those that are
        heard. Raises ValueError for a model without a latent CLAP.
        """
        same = self.config.same
        heard = [samples_to_frames(len(audio), same) for audio in made.audio]
        shares = text_shares(made.request, heard, 1 / self.config.frames_per_second)
        texts = list(dict.fromkeys(text for own in shares for text in own))
        ids, mask = self.tokenizer.encode(texts)
        length = max(1, int(mask.sum(axis=1).max()))
        ids, mask = ids[:, :length], mask[:, :length]
        with self.choices.tuned(self.ways):
            states, clap = self.text_states(ids, mask), self.load_part("clap")
            vectors = self._numpy(clap.embed_states(states, self._array(mask))).astype(np.float64)  # (texts, E)
            wanted = [sum(share * vectors[texts.index(text)] for text, share in own.items()) for own in shares]
            cosines = []
            for latents, frames, text in zip(made.latents, heard, wanted, strict=True):
                given = latents[None, :frames]
                valid, t = np.ones(given.shape[:2], np.bool_), np.zeros(1, np.float32)
                sound = self._numpy(clap.embed_audio(self._array(given), self._array(valid), self._array(t)))[0]
                cosines.append(float(sound @ text / max(float(np.linalg.norm(text)), 1e-12)))
        self._release(residency, "text_encoder", "clap")
        return tuple(cosines)

    def encode_sources(self, request: Request, plan: Plan) -> tuple[Latents | None, Latents | None]:
        """Encode the init and the inpaint audio of every item: (B, T, C) each, None where there is none [B35]."""
        return encode_sources(
            request, plan, self.config, partial(self.encode, chunk_frames=request.encode_chunk_frames)
        )

    def local_input(self, plan: Plan, inpaint: Latents | None) -> Array:
        """Return ``Conditioning.local`` for latents (B, T, C) of the inpaint audio, or for none [B7, B34]."""
        return self._cast(self._array(local_input(plan, inpaint, self.config.same.latent_channels)))

    def _seeded(self, request: Request, plan: Plan) -> NoiseSource:
        """Return the noise of the items' seeds, and of frames that have their own; the usual source."""
        return host_noise(request, plan)

    def stopwatch(self) -> Stopwatch:
        """Return what times the stages of a run."""
        return self._stopwatch("text", "encode", "sample", "decode")

    def _stopwatch(self, *stages: str) -> Stopwatch:
        return Stopwatch(*stages)

    def start(self, plan: Plan, noise: NoiseSource, init: Latents | None) -> Array:
        """Return what sampling starts from (B, T, C), with latents (B, T, C) of the init audio or without [B30]."""
        drawn = batch_of(noise, INITIAL, plan.keep_frames.shape, self.config.same.latent_channels)
        return self._array(start_latents(plan, drawn, init))

    def held(self, plan: Plan, inpaint: Latents | None) -> Settle[Array]:
        """Return what keeps frames on their way to latents (B, T, C) of the inpaint audio, see ``Held``."""
        if plan.levels is None or inpaint is None:
            return lambda x, t, velocity: velocity  # noqa: ARG005
        return Held(source=self._array(inpaint), levels=plan.levels, sigmas=plan.sigmas, array=self._array)

    def draw(self, plan: Plan, noise: NoiseSource, index: int) -> Array:
        """Draw the normals (B, T, C) that a sampler may add at the end of step ``index`` [B27]."""
        return self._array(batch_of(noise, step(index), plan.keep_frames.shape, self.config.same.latent_channels))

    def _sample(
        self,
        plan: Plan,
        cond: Conditioning[Array],
        null: Conditioning[Array] | None,
        start: Array,
        draw: Noise[Array],
        held: Settle[Array],
    ) -> Iterator[tuple[Array, Array]]:
        """Return the steps from the start (B, T, C): see ``_steps``."""

        def guided(adapters: tuple[Applied, ...]) -> Velocity[Array]:
            dit = self.dit_with(adapters)
            velocity: Velocity[Array] = self.guided_velocity(
                dit=dit,
                cond=dit.prepare(cond),
                null=None if null is None else dit.prepare(null),
                guidance=plan.sampling.guidance,
                times=np.ascontiguousarray(plan.sigmas[:, :-1].T),
            )
            return velocity

        velocity: Velocity[Array] = self.gated_velocity(self.adapters, guided)
        if plan.ring is not None:
            velocity = plan.ring.turning(velocity, self._array)
        return self._steps(plan, velocity, start, draw, held)

    def _announced(
        self, steps: Iterator[tuple[Array, Array]], count: int, watch: Stopwatch, *, prefetch: bool
    ) -> Generator[Stepped, None, Array]:
        """Announce every step, which is computed then, and return the latents (B, T, C) of the end."""
        if prefetch:
            self.prefetch_decoder(0, count)
        for index, made in enumerate(watch.each("sample", steps)):
            denoised, x = made
            if prefetch:
                with watch("sample"):
                    self.prefetch_decoder(index + 1, count)
            yield Stepped(index=index, steps=count, denoised=denoised)
        return x

    def _decode_clips(
        self,
        request: Request,
        plan: Plan,
        clips: Sequence[Clip],
        latents: Array,
        noise: NoiseSource,
        watch: Stopwatch,
    ) -> Iterator[AudioChunk]:
        """Decode latents (B, T, C) to finished audio, item by item."""
        size = request.chunk_frames or self.usual_chunk_frames("decode")
        latents = latents if plan.ring is None else latents[:, self._array(plan.ring.heard)]
        chunks = [(row, chunk) for row in range(len(clips)) for chunk in decode_plan(plan, row, size, self.config)]

        def launch(row: int, chunk: Chunk) -> Array:
            noises = decoder_noise(noise, row, chunk, self.config) if request.decode_noise else ()
            return self._decode(latents[row, chunk.start : chunk.stop], *noises)

        decoded = watch.each("decode", self._brought_back(launch(row, chunk) for row, chunk in chunks))
        for (row, chunk), audio in zip(chunks, decoded, strict=True):
            finished = clips[row].add(kept_part(chunk, audio, self.config.same.samples_per_latent))
            if finished is not None:
                yield finished
