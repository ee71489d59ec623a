"""Hold the parts of a checkpoint in memory, and code audio with its autoencoder; written once for both twins.

Shapes: T latent frames, C latent channels, L audio samples, R samples per latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.adapters.applied import Applied, prepare_adapters
from sa3_mlx.common.files.audio import check_audio
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.installed import model_folder
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE, Part, all_parts
from sa3_mlx.common.model.chunks import Direction, chunk_plan
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import samples_to_frames
from sa3_mlx.common.model.precision import Precision
from sa3_mlx.common.quant.format import check_folder
from sa3_mlx.common.text.tokenizer import Tokenizer
from sa3_mlx.common.tuning.choice import Choices
from sa3_mlx.common.tuning.chunk import CHUNKS
from sa3_mlx.common.tuning.chunk import chunk_frames as chunk_frames_by_way
from sa3_mlx.common.tuning.table import find_ways

from .clips import check_latents, kept_part, open_tokenizer
from .events import Latents


class Tensorlike(Protocol):
    """Name what the run itself does with an array of a twin; everything else is done by its networks."""

    def __getitem__(self, key: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def reshape(self, *shape: int) -> Any: ...


Array = TypeVar("Array", bound=Tensorlike)
T = TypeVar("T")
_KEPT_PROMPTS = 8  # whose states stay, at most 0.8 MB a text


class LoadedParts(ABC, Generic[Array]):
    """Hold the parts of a checkpoint folder: read when they are first needed, kept until ``free``.

    The DiT and the text encoder run in ``precision``; conditioner and autoencoder stay in fp32. A twin supplies the
    abstract methods and, as class attributes, its table of choices and two functions of its lora.py.
    """

    choices: ClassVar[Choices]
    adapt: ClassVar[Callable[..., Any]]
    merge: ClassVar[Callable[..., Any]]

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
        self._parts: dict[Part, Any] = {}
        self._adapted: dict[tuple[Applied, ...], Any] = {}
        self._states: dict[Any, Array] = {}  # the last one used is the last

    @staticmethod
    def _checked(
        folder: str | Path, adapters: Collection[Applied], *, merged: bool
    ) -> tuple[Path, ModelConfig, tuple[Applied, ...]]:
        """Check a model and adapters for it. Raises FileNotFoundError and ValueError: see ``Pipeline.load``."""
        folder = model_folder(folder)
        config = ModelConfig.load(folder)
        check_folder(folder, config)
        return folder, config, prepare_adapters(adapters, folder, config, merged=merged)

    @property
    @abstractmethod
    def device_name(self) -> str:
        """Name the device that computes, as what was tuned is kept under it."""

    @cached_property
    def ways(self) -> Mapping[str, str]:
        """Return the ways of ``choices`` that ``sa3 tune`` found fastest for such a model here; may be set."""
        return find_ways(self.choices, self.device_name, self.config)

    def _in_its_ways(self, made: Generator[T, None, None]) -> Iterator[T]:
        """Yield what is made, each piece computed in the ways of this pipeline."""
        if not self.ways:
            yield from made
            return
        try:
            while True:
                with self.choices.tuned(self.ways):
                    piece = next(made, None)
                if piece is None:
                    return
                yield piece
                del piece  # the next one takes its memory
        finally:
            made.close()

    @abstractmethod
    def _array(self, values: NDArray[Any]) -> Array:
        """Put values on the device."""

    @abstractmethod
    def _numpy(self, array: Array) -> NDArray[np.float32]:
        """Bring values back."""

    @abstractmethod
    def _cast(self, array: Array) -> Array:
        """Return an array in the number type of the DiT, computed now where a framework is lazy."""

    @abstractmethod
    def _read(self, part: Part, *, streamed: bool) -> Any:
        """Read a part from the folder; of a ``streamed`` DiT the blocks stay there and are read in every step."""

    @abstractmethod
    def _empty_cache(self) -> None:
        """Give freed memory back to the system."""

    @abstractmethod
    def _encode(self, audio: Audio) -> Latents:
        """Encode audio (L, channels) at once -> (ceil(L / R), C)."""

    @abstractmethod
    def _decode(self, latents: Latents | Array, *noises: Latents) -> Array:
        """Launch the decoding of latents (T, C) at once -> (T R, channels); noises are those of ``SAME.decode``."""

    def _bring(self, array: Array) -> Callable[[], NDArray[np.float32]]:
        """Begin to bring values back; what is returned waits for them."""
        values = self._numpy(array)
        return lambda: values

    @property
    def launches_ahead(self) -> bool:
        """Tell whether the next piece of work is launched before one is brought back, so that no device waits."""
        return False

    def usual_chunk_frames(self, direction: Direction) -> int:
        """Return the latent frames of a chunk where a caller names none."""
        return chunk_frames_by_way(self.choices.way(CHUNKS), self.config.same, direction)

    @abstractmethod
    def prefetch_decoder(self, done: int, steps: int) -> None:
        """Read, beside what is computed meanwhile, the autoencoder's decoder, or what is due after ``done`` steps."""

    @abstractmethod
    def autoencoder(self, half: Literal["encoder", "decoder"]) -> Any:
        """Return the autoencoder with one half in memory; the other one stays in the file until it is needed."""

    @cached_property
    def hash(self) -> str:
        """Hash the weights, ``"sha256:..."``; reads the whole file once."""
        return file_hash(self.folder / WEIGHTS_FILE)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Open the tokenizer. Raises ValueError for an autoencoder without one, and for one of another text encoder."""
        return open_tokenizer(self.folder, self.config)

    @property
    def loaded(self) -> tuple[Part, ...]:
        """List the parts that are in memory."""
        return tuple(part for part in all_parts(self.config) if part in self._parts)

    def load_part(self, part: Part) -> Any:
        """Return a part of the model, read from the folder unless it is in memory; with all adapters on."""
        return self.dit_with(self.adapters) if part == "dit" else self._part(part)

    def dit_with(self, adapters: tuple[Applied, ...]) -> Any:
        """Return the DiT with some of the pipeline's adapters on; merged ones always are.

        A streamed one has no weights in memory to merge them into.
        """
        base = self._part("dit")
        if not adapters or (self.merged and not base.streamed):
            return base
        if adapters not in self._adapted:
            self._adapted[adapters] = self.adapt(base, "dit", adapters)
        return self._adapted[adapters]

    def text_states(self, ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> Array:
        """Return states (B, S, D) of token ids, mask (B, S); those of the last prompts are kept beside the encoder."""
        key, encoder = (ids.shape, ids.tobytes(), mask.tobytes()), self.load_part("text_encoder")
        states = self._states.pop(key, None)
        if states is None:
            states = encoder(self._ids(ids), self._array(mask))
        self._states[key] = states
        while len(self._states) > _KEPT_PROMPTS:
            del self._states[next(iter(self._states))]
        return states

    @property
    def context_sizes(self) -> Sequence[int]:
        """Return the lengths that a context has, rising, where a length takes preparations of its own; () is any."""
        return ()

    def _ids(self, ids: NDArray[np.int32]) -> Array:
        """Put token ids where the table of their embeddings is."""
        return self._array(ids)

    def _part(self, part: Part, *, streamed: bool = False) -> Any:
        if part not in self._parts:
            module = self._read(part, streamed=streamed)
            if part == "conditioner" or (part == "dit" and self.merged and not streamed):
                module = self.merge(module, part, self.adapters)
            self._parts[part] = module
        return self._parts[part]

    def change_adapters(self, adapters: Collection[Applied]) -> None:
        """Put these adapters on in place of those that are; weights stay in memory, but for those that were merged.

        Raises ValueError for one that does not fit.
        """
        self.adapters = prepare_adapters(adapters, self.folder, self.config, merged=self.merged)
        self._adapted.clear()
        self.free("conditioner", *(("dit",) if self.merged else ()))

    def _number_type(self, part: Part) -> str | None:
        """Return the number type of a part in memory; None is that of the file."""
        return {"text_encoder": self.precision.text_dtype, "dit": self.precision.dtype}.get(part, "float32")

    def free(self, *parts: Part) -> None:
        """Give the memory of these parts back; they are read again when they are needed.

        Raises ValueError for one that the model does not have.
        """
        for part in parts:
            if part not in (known := all_parts(self.config)):
                raise ValueError(f"part is {part!r}: {self.config.name} has {', '.join(known)}")
            self._parts.pop(part, None)
        if "dit" in parts:
            self._adapted.clear()
        if "text_encoder" in parts:
            self._states.clear()
        self._empty_cache()

    def encode(
        self, audio: Audio, *, chunk_frames: int | None = None, advance: Callable[[int], object] | None = None
    ) -> Latents:
        """Encode audio (L, channels) float32 at the model's sample rate, chunk by chunk -> latents (ceil(L / R), C).

        ``advance`` is told the frames of every chunk that is done.
        Raises ValueError for audio that does not fit and for a chunk size that cannot be exact.
        """
        check_audio(audio, "encode", self.config.audio_channels)
        with self.choices.tuned(self.ways):
            return self._encode_chunks(audio, chunk_frames, advance)

    def _encode_chunks(
        self, audio: Audio, chunk_frames: int | None, advance: Callable[[int], object] | None
    ) -> Latents:
        config = self.config.same
        ratio, frames = config.samples_per_latent, samples_to_frames(len(audio), config)
        size = self.usual_chunk_frames("encode") if chunk_frames is None else chunk_frames
        kept: list[Latents] = []
        for chunk in chunk_plan(frames, size, config, "encode"):
            latents = self._encode(audio[chunk.start * ratio : chunk.stop * ratio])
            kept.append(latents[chunk.keep_start - chunk.start : chunk.keep_stop - chunk.start])
            if advance is not None:
                advance(len(kept[-1]))
        return np.concatenate(kept)

    def preview(self, denoised: Array, item: int, frames: int) -> Audio:
        """Decode what the model expects of one item's end at a step, (B, T, C) of a twin, its first ``frames``."""
        return self.decode(self._numpy(denoised[item])[:frames])

    def decode(self, latents: Latents) -> Audio:
        """Decode latents (T, C) float32 -> audio (T R, channels), not clamped. Raises as ``decode_stream``."""
        return np.concatenate(list(self.decode_stream(latents)))

    def decode_stream(self, latents: Latents, *, chunk_frames: int | None = None) -> Iterator[Audio]:
        """Decode in pieces that joined are the whole; each is computed when it is asked for.

        Raises ValueError for latents that do not fit and for a chunk size that cannot be exact.
        """
        check_latents(latents, self.config)
        with self.choices.tuned(self.ways):
            size = self.usual_chunk_frames("decode") if chunk_frames is None else chunk_frames
        return self._in_its_ways(self._decode_chunks(latents, size))

    def _decode_chunks(self, latents: Latents, size: int) -> Generator[Audio, None, None]:
        config = self.config.same
        chunks = chunk_plan(len(latents), size, config, "decode")
        launched = (self._decode(latents[chunk.start : chunk.stop]) for chunk in chunks)
        for chunk, decoded in zip(chunks, self._brought_back(launched), strict=True):
            yield kept_part(chunk, decoded, config.samples_per_latent)

    def _brought_back(self, launched: Iterable[Array]) -> Iterator[NDArray[np.float32]]:
        """Bring results back in turn, where it helps with the next one launched already.

        Not so the first one, which somebody may wait for: a launch can last until most of its work is done.
        """
        arrays = iter(launched)
        yield from map(self._numpy, islice(arrays, 1 if self.launches_ahead else None))
        waiting = next(arrays, None)
        for following in arrays:
            yield self._numpy(cast(Array, waiting))
            waiting = following
        if waiting is not None:
            yield self._numpy(waiting)
