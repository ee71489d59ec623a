"""Read the audio file that ``vary``, ``inpaint`` and ``extend`` start from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from sa3_mlx.cli.inputs import STDIN, input_file, is_stream
from sa3_mlx.cli.output.provenance import read_prompt
from sa3_mlx.common.files.audio import going_on, read_blocks
from sa3_mlx.common.files.audio_file import Audio, open_audio_file
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.generation.long.windows import PIECE_MAX
from sa3_mlx.common.generation.request import HEAD_ROOM_MAX, Inpaint
from sa3_mlx.common.installed import Model
from sa3_mlx.common.model.chunks import halo
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.dial import SCHEDULES, Schedule
from sa3_mlx.common.model.lengths import clip_lengths, longest, samples_to_seconds
from sa3_mlx.common.schema import is_finite, quoted
from sa3_mlx.common.terminal import excerpt, say

INPUT = click.argument("input_file", metavar="INPUT", type=click.Path(path_type=Path, allow_dash=True))
PROMPT = click.argument("prompt", required=False)
SCHEDULE = click.option(
    "--schedule",
    type=click.Choice(SCHEDULES),
    default="official",
    show_default=True,
    help="From the noise level to 0: official adds noise at first; normalized (scaled) and monotone (cut) add none.",
)
STRENGTH = click.option(
    "--strength", type=float, help="In place of --noise-level, above 0 to 1: how much changes, in equal steps."
)
PIECE_SAMPLES = 1 << 29  # of a file that is read as a whole, 3.4 hours at 44.1 kHz
_FINENESS: tuple[Subtype, ...] = ("pcm16", "pcm24", "float")
_HASHED_MAX = 1 << 26  # bytes of a file that is read to its end for its hash in any case
_KEEPING: dict[str, Subtype] = {"PCM_16": "pcm16", "PCM_U8": "pcm16", "PCM_S8": "pcm16", "PCM_24": "pcm24"}


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """Hold an audio file at the model's rate and channels, and what to call it."""

    path: Path
    name: str  # for the tags: as it was given, of an absolute path the name only
    hash: str  # of the file; of a long one that is not read to its end, of the audio
    exact: Subtype  # the format that holds its samples exactly: its own; float where it was resampled or is float
    audio: Audio  # as much as the request can use
    seconds: float  # of the whole file, at least
    made_with: str | None  # the prompt in its tags
    second: SourceFile | None = None  # what is joined to it
    skipped: int = 0  # samples of the file before ``audio``, which nothing listens to

    @classmethod
    def read(
        cls,
        path: Path,
        config: ModelConfig,
        seconds: float | None = None,
        head_room: float | None = None,
        *,
        whole: bool = False,
        end: bool = False,
    ) -> SourceFile:
        """Read a file, or with - standard input, for a clip of ``seconds``; None is the whole file.

        What lies beyond the clip and its head room, or the longest clip, is not read, but with ``whole``. With ``end``
        the file is read to its end, and what can be heard when it goes on is held.
        Raises FileNotFoundError or ValueError, one line.
        """
        with input_file(path) as local:
            samples = PIECE_SAMPLES if whole else _usable(config, seconds, head_room)
            blocks, skipped = read_blocks(local, config.sample_rate, config.audio_channels), 0
            if end and not is_stream(path):
                audio, skipped = _end(blocks, config)
                complete = True
            else:
                audio, complete = _beginning(blocks, PIECE_SAMPLES if end else samples)
            if (whole or end) and not complete:
                raise ValueError(f"{path}: longer than {PIECE_SAMPLES / config.sample_rate / 3600:.1f} hours; cut it")
            with open_audio_file(local) as file:
                exact = _KEEPING.get(str(file.subtype), "float") if file.samplerate == config.sample_rate else "float"
                declared = (file.samples or 0) / file.samplerate
            length, short = (
                samples_to_seconds(skipped + len(audio), config.sample_rate),
                local.stat().st_size <= _HASHED_MAX,
            )
            return cls(
                path=path,
                name=str(STDIN) if is_stream(path) else path.name if path.is_absolute() else str(path),
                hash=file_hash(local) if complete or short else _audio_hash(audio),
                exact=exact,
                audio=audio,
                seconds=length if complete else max(declared, length),
                made_with=read_prompt(local),
                skipped=skipped,
            )

    def beginning(self, config: ModelConfig) -> Iterator[Audio]:
        """Yield the samples that were skipped, from the file."""
        left = self.skipped
        for block in read_blocks(self.path, config.sample_rate, config.audio_channels) if left else ():
            yield block[:left]
            left -= len(block)
            if left <= 0:
                return

    def after(self, samples: int, config: ModelConfig) -> SourceFile:
        """Return the same audio after so many samples that are to be made; until then its mirror image is there."""
        audio = np.concatenate([going_on(self.audio[::-1], samples)[::-1], self.audio])
        return replace(self, audio=audio, seconds=samples_to_seconds(len(audio), config.sample_rate))

    def joined(self, second: SourceFile, samples: int, config: ModelConfig) -> SourceFile:
        """Return this audio, so many samples that are to be made, and the second one.

        Until then the mirror images of both are there: a seam fades from them, and the model hears no silence.
        """
        own = going_on(self.audio, samples // 2)
        audio = np.concatenate([self.audio, own, second.after(samples - len(own), config).audio])
        finest = max(self.exact, second.exact, key=_FINENESS.index)
        length = samples_to_seconds(len(audio), config.sample_rate)
        return replace(self, audio=audio, seconds=length, exact=finest, second=second)

    def continued(self, seconds: float) -> Inpaint:
        """Return what keeps the whole file and makes what follows, to a length of ``seconds``.

        Raises ValueError where it is as long already, and for what is no number.
        """
        if not is_finite(seconds):
            raise ValueError(f"seconds is {quoted(seconds)}: expected a finite number")
        if self.seconds >= seconds:
            raise ValueError(f"extend to {seconds:g} s: {self.name} has {self.seconds:.3f} s; ask for a longer clip")
        return Inpaint(audio=self.audio, regions=((self.seconds, seconds),))

    def prompt(self, given: str | None, *, quiet: bool) -> str:
        """Return the prompt that was given, or that in its own tags, and say that; "" where there is none."""
        if given is not None:
            return given
        if not quiet:
            own = f"that in the tags of {self.name} is taken, {excerpt(self.made_with or '')!r}"
            say(f"note: no PROMPT: {own if self.made_with else 'nothing says what to make, the model is free'}")
        return self.made_with or ""

    def length(self, seconds: float | None, model: Model) -> float:
        """Return the seconds that were asked for, or its own. Raises ValueError where it is too long for the model."""
        if seconds is None and self.seconds > model.config.max_seconds:
            raise ValueError(
                f"{self.path}: {self.seconds:.2f} s long, {model.label} makes up to {longest(model.config)}; "
                "give --seconds to use its beginning"
            )
        return samples_to_seconds(len(self.audio), model.config.sample_rate) if seconds is None else seconds


def check_made(seconds: float, config: ModelConfig) -> None:
    """Raise ValueError unless so many seconds can be made between or before what is there."""
    least = config.same.samples_per_latent / config.sample_rate
    if not is_finite(seconds) or not least <= seconds <= PIECE_MAX:
        raise ValueError(f"{seconds:g} s are asked for: allowed are {least:.3f} to {PIECE_MAX:g} s")


def chosen_level(
    noise_level: float | None, strength: float | None, schedule: Schedule, config: ModelConfig
) -> float | None:
    """Return the noise level that was given or stands behind a strength; None where neither was given.

    Raises click.UsageError for both, ValueError for a strength that cannot be.
    """
    if strength is None:
        return noise_level
    if noise_level is not None:
        raise click.UsageError("give either --noise-level or --strength")
    return config.noise_level(strength, schedule)


def _usable(config: ModelConfig, seconds: float | None, head_room: float | None) -> int:
    """Return the samples that a clip of ``seconds`` uses, or the longest clip where that is none or cannot be."""
    diffusion = config.require_diffusion()
    longest_samples = diffusion.max_frames * config.same.samples_per_latent
    if seconds is None or not 0 < seconds <= config.max_seconds:
        return longest_samples + 1  # so that a longer file can be told from one of this length
    room = diffusion.head_room_seconds if head_room is None or not 0 <= head_room <= HEAD_ROOM_MAX else head_room
    return clip_lengths([seconds], config, room).frames * config.same.samples_per_latent


def _audio_hash(audio: Audio) -> str:
    """Return what stands for the hash of a long file of which only this was read."""
    return f"audio-sha256:{hashlib.sha256(audio.tobytes()).hexdigest()}"


def _end(blocks: Iterator[Audio], config: ModelConfig) -> tuple[Audio, int]:
    """Return the end of the audio, at least as long as the longest clip and what the encoder looks back, and where it
    begins: at a multiple of the frames that the encoder takes together, so that latents are those of the whole.
    """
    same, kept, count, skipped = config.same, list[Audio](), 0, 0
    unit = same.frame_multiple * same.samples_per_latent
    least = (config.require_diffusion().max_frames + halo(same, "encode")) * same.samples_per_latent + unit
    for block in blocks:
        kept.append(block)
        count += len(block)
        while count - len(kept[0]) >= least:
            count -= len(kept[0])
            skipped += len(kept.pop(0))
    surplus = max(0, (skipped + count - least) // unit * unit - skipped)
    return np.concatenate(kept)[surplus:], skipped + surplus


def _beginning(blocks: Iterator[Audio], samples: int) -> tuple[Audio, bool]:
    """Join blocks until there are so many samples, and cut there; return whether that was all."""
    kept, count = list[Audio](), 0
    for block in blocks:
        kept.append(block)
        count += len(block)
        if count >= samples:
            break
    return np.concatenate(kept)[:samples], count < samples
