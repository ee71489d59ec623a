"""Do what a run needs no framework for: texts, given audio and start in, finished audio and report out.

Shapes: B batch, T latent frames, C latent channels, L samples, R samples per latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.audio import clipped_share, fit_length
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE
from sa3_mlx.common.model.chunks import Chunk, chunk_plan, halo, pad_frames
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import clip_lengths, samples_to_frames
from sa3_mlx.common.text.prompt import Prompt, WeightedText, parse_prompt
from sa3_mlx.common.text.tokenizer import Tokenizer

from .events import AudioChunk, Generation, Latents, NoiseSource
from .frames import tracks
from .loop import Ring, close
from .noise import DECODER_LATENT, DECODER_TOKENS
from .plan import Plan
from .regions import PasteBack, Seam
from .request import InitAudio, Request

Encode = Callable[[Audio], Latents]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Say what every item takes of ``Texts.texts``: one of them, or two and how far to go from the first."""

    first: NDArray[np.int32]  # (B,) rows
    second: NDArray[np.int32]  # (B,) rows; the first again where there is one
    share: NDArray[np.float32]  # (B,) 0 where there is one

    def mask(self, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Mark tokens of the items (B, S), by those of the texts (texts, S)."""
        return mask[self.first] | mask[self.second]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Hold every text of a request once, and which of them each item uses.

    Every item has K prompts, as many as the item with most; where it has fewer, its first one fills up.
    """

    texts: tuple[WeightedText, ...]
    prompts: Mix  # (B K,)
    negatives: Mix  # the first text where there is no negative prompt
    has_negative: NDArray[np.bool_]  # (B,)

    @property
    def most(self) -> int:
        """Return K."""
        return len(self.prompts.first) // len(self.has_negative)

    @classmethod
    def of(cls, request: Request) -> Self:
        """Collect the texts of a request. Raises ValueError for a prompt that cannot be read."""
        found = [track.prompts for track in tracks(request)]
        most = max(map(len, found))
        prompts = [prompt for own in found for prompt in (own + own[:1] * most)[:most]]
        given = [item.negative_prompt for item in request.items]
        negatives = [prompts[0] if text is None else parse_prompt(text) for text in given]
        used = (text for prompt in (*prompts, *negatives) for text in prompt.texts)
        rows = {text: row for row, text in enumerate(dict.fromkeys(used))}

        def mix(chosen: Sequence[Prompt]) -> Mix:
            return Mix(
                first=np.array([rows[prompt.texts[0]] for prompt in chosen], np.int32),
                second=np.array([rows[prompt.texts[-1]] for prompt in chosen], np.int32),
                share=np.array([prompt.share for prompt in chosen], np.float32),
            )

        has_negative = np.array([text is not None for text in given])
        return cls(texts=tuple(rows), prompts=mix(prompts), negatives=mix(negatives), has_negative=has_negative)

    def weights(self, tokenizer: Tokenizer, slots: int) -> NDArray[np.float32] | None:
        """Return the weights of tokens and, last, of the duration (texts, slots + 1), None where all are 1."""
        if not any(text.spans for text in self.texts):
            return None
        weights = np.ones((len(self.texts), slots + 1), np.float32)
        for row, text in zip(weights, self.texts, strict=True):
            found = [text.weight(*span) for span in tokenizer.places(text.text)][:slots]
            row[: len(found)] = found
        return weights


def encode_sources(
    request: Request, plan: Plan, config: ModelConfig, encode: Encode
) -> tuple[Latents | None, Latents | None]:
    """Encode the init and the inpaint audio of every item: (B, T, C) each, None where there is none [B35].

    An item's audio is cropped or padded to the length that the item would have by itself, so that its latents do not
    depend on the batch; latents beyond it, which are never valid frames, are 0. Audio that is used twice is encoded
    once.
    """
    known: dict[tuple[int, int], Latents] = {}

    def batch(audios: Sequence[Audio]) -> Latents:
        latents = np.zeros((len(audios), plan.frames, config.same.latent_channels), np.float32)
        for row, (item, audio) in enumerate(zip(request.items, audios, strict=True)):
            frames = clip_lengths([item.seconds], config, plan.head_room_seconds).frames
            key = (id(audio), frames)
            if key not in known:
                known[key] = encode(fit_length(audio, frames * config.same.samples_per_latent))
            latents[row, :frames] = known[key]
        return latents

    init = None if plan.init is None else batch([init.audio for init in plan.init])
    inpaint = None if plan.inpaint is None else batch([inpaint.audio for inpaint in plan.inpaint])
    if init is not None and plan.init is not None and inpaint is not None and plan.levels is not None:
        held = plan.levels[..., None] < noise_levels(plan.init)  # (B, T, 1)
        init = np.where(held, inpaint, init)  # what they are held to, from the start on
    return init, inpaint


def local_input(plan: Plan, inpaint_latents: Latents | None, channels: int) -> NDArray[np.float32]:
    """Return mask (1 = keep) and masked latents (B, T, 1 + C), or zeros (B, 1, 1 + C) where none is kept [B7, B34]."""
    if inpaint_latents is None:
        return np.zeros((len(plan.keep_frames), 1, 1 + channels), np.float32)
    keep = plan.keep_frames[..., None]
    return np.concatenate([keep, inpaint_latents * keep], axis=-1)


def start_latents(plan: Plan, noise: Latents, init_latents: Latents | None) -> Latents:
    """Return (1 - s) z + s eps per item, or the noise itself: (B, T, C) [B30]."""
    if init_latents is None or plan.init is None:
        return noise
    level = noise_levels(plan.init)
    return (1 - level) * init_latents + level * noise


def noise_levels(init: Sequence[InitAudio]) -> NDArray[np.float32]:
    """Return s of every item, (B, 1, 1)."""
    return np.array([item.noise_level for item in init], np.float32)[:, None, None]


def decode_plan(plan: Plan, row: int, chunk_frames: int, config: ModelConfig) -> list[Chunk]:
    """Plan chunks of one item: the frames of its audio and as many valid ones after them as the decoder looks ahead.

    Of a loop, chunks of ``Ring.heard`` frames.
    """
    same = config.same
    if plan.ring is not None:
        return plan.ring.chunks(chunk_frames, same)
    audible = samples_to_frames(plan.lengths.output_samples[row], same)
    frames = min(plan.lengths.valid[row], pad_frames(audible + halo(same, "decode"), same))
    chunks = chunk_plan(frames, chunk_frames, same, "decode")
    return [chunk for chunk in chunks if chunk.keep_start < audible]


def decoder_noise(source: NoiseSource, row: int, chunk: Chunk, config: ModelConfig) -> tuple[Latents, Latents]:
    """Draw normals for the latents (1, n, C) and the new tokens (1, n, stride, width), by absolute frame [B47]."""
    same, frames = config.same, chunk.stop - chunk.start
    latent = source(row, DECODER_LATENT, frames, same.latent_channels, chunk.start)
    tokens = source(row, DECODER_TOKENS, frames, same.stride * same.width, chunk.start)
    return latent[None], tokens.reshape(1, frames, same.stride, same.width)


def kept_part(chunk: Chunk, decoded: Audio, samples_per_latent: int) -> Audio:
    """Return the samples of the kept frames from the audio of a whole chunk."""
    first, last = chunk.keep_start - chunk.start, chunk.keep_stop - chunk.start
    return decoded[first * samples_per_latent : last * samples_per_latent]


def check_latents(latents: object, config: ModelConfig) -> None:
    """Raise ValueError unless ``latents`` is a finite, non-empty float32 array (T, C)."""
    channels = config.same.latent_channels
    if not isinstance(latents, np.ndarray) or latents.dtype != np.float32:
        kind = str(latents.dtype) if isinstance(latents, np.ndarray) else type(latents).__name__
        raise ValueError(f"latents: expected a float32 numpy array (frames, {channels}), got {kind}")
    if latents.ndim != 2 or latents.shape[1] != channels or not latents.shape[0]:
        raise ValueError(f"latents: expected shape (frames, {channels}) with at least 1 frame, got {latents.shape}")
    if not np.isfinite(latents).all():
        raise ValueError("latents: not all numbers are finite")


def open_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """Open the tokenizer of a checkpoint folder.

    Raises ValueError for an autoencoder without a text encoder and for a tokenizer whose ids it does not have.
    """
    if config.diffusion is None:
        raise ValueError(f"{config.name} is an autoencoder alone and reads no prompts; choose a model with a DiT")
    text, path = config.diffusion.text_encoder, folder / TOKENIZER_FILE
    tokenizer = Tokenizer(path, text.max_length)
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"{path}: has {tokenizer.vocab_size} ids but the text encoder {text.vocab_size}; it is another model's"
        )
    return tokenizer


class Clip:
    """Collect one item's audio while it is decoded: cut to the asked length, kept samples pasted back.

    Pieces are kept as they come and joined once; a clip of one piece is that piece, never copied. So finished samples
    are for reading only.
    """

    def __init__(self, row: int, request: Request, plan: Plan, config: ModelConfig) -> None:
        length = plan.lengths.output_samples[row]
        self._row, self._done, self._length, self._channels = row, 0, length, config.audio_channels
        self._decoded: list[Audio] = []  # of a loop, which is finished as a whole
        self._finished: list[Audio] = []
        self._paste: PasteBack | None = None
        self._ring, self._sample_rate = plan.ring, config.sample_rate
        if plan.ring is not None:
            self._length = plan.ring.frames * config.same.samples_per_latent
        if plan.inpaint is not None and request.crossfade_ms is not None:
            self._paste = PasteBack(
                plan.inpaint[row].audio, plan.regions[row], length, config.sample_rate, request.crossfade_ms
            )

    def add(self, decoded: Audio) -> AudioChunk | None:
        """Take the next decoded samples and give back the finished ones; a loop is finished as a whole."""
        if self._ring is not None:
            return self._add_to_loop(decoded, self._ring)
        start = self._done
        self._done = min(start + len(decoded), self._length)
        piece = decoded[: self._done - start]
        if self._paste is not None:
            piece = self._paste.piece(piece, start)
        self._finished.append(piece)
        audio = piece.view()
        audio.flags.writeable = False
        return AudioChunk(item=self._row, start=start, audio=audio)

    def _add_to_loop(self, decoded: Audio, ring: Ring) -> AudioChunk | None:
        self._decoded.append(decoded)
        if sum(map(len, self._decoded)) < self._length:
            return None
        audio = close(np.concatenate(self._decoded), ring.samples, self._sample_rate)
        self._length = ring.samples
        self._finished.append(audio)
        view = audio.view()
        view.flags.writeable = False
        return AudioChunk(item=self._row, start=0, audio=view)

    @property
    def audio(self) -> Audio:
        """Return the finished samples (L, channels), zeros where nothing came."""
        return self._joined(self._finished)

    def _joined(self, pieces: list[Audio]) -> Audio:
        missing = self._length - sum(map(len, pieces))
        if missing:
            pieces = [*pieces, np.zeros((missing, self._channels), np.float32)]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def seams(self) -> tuple[Seam, ...]:
        """Report the joints; empty without kept audio."""
        return () if self._paste is None else self._paste.seams()


def generation(
    request: Request,
    plan: Plan,
    clips: Sequence[Clip],
    latents: Latents,
    config: ModelConfig,
    timings: dict[str, float],
    ways: dict[str, str],
) -> Generation:
    """Return the result of a run with latents (B, T, C)."""
    audios = tuple(clip.audio for clip in clips)
    return Generation(
        request=request,
        audio=audios,
        sample_rate=config.sample_rate,
        seeds=tuple(item.seed for item in request.items),
        latents=tuple(latents[row, :valid].copy() for row, valid in enumerate(plan.lengths.valid)),
        seams=tuple(clip.seams() for clip in clips),
        clipped_share=tuple(clipped_share(audio) for audio in audios),
        timings=timings,
        ways=ways,
    )
