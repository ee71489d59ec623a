"""Read the audio file that ``vary``, ``inpaint`` and ``extend`` start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import soundfile

from sa3_mlx.cli.inputs import STDIN, input_file, is_stream
from sa3_mlx.cli.output.provenance import read_prompt
from sa3_mlx.common.files.audio import Audio, read_audio
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.installed import Model
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import longest, samples_to_seconds
from sa3_mlx.common.terminal import say

INPUT = click.argument("input_file", metavar="INPUT", type=click.Path(path_type=Path, allow_dash=True))
PROMPT = click.argument("prompt", required=False)
MONOTONE = click.option(
    "--monotone", is_flag=True, help="Only ever remove noise. Default: the official schedule, which adds some again."
)
_KEEPING: dict[str, Subtype] = {"PCM_16": "pcm16", "PCM_U8": "pcm16", "PCM_S8": "pcm16", "PCM_24": "pcm24"}


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """Hold an audio file at the model's rate and channels, and what to call it."""

    path: Path
    name: str  # for the tags: as it was given, of an absolute path the name only
    hash: str
    exact: Subtype  # the format that holds its samples exactly: its own; float where it was resampled or is float
    audio: Audio
    made_with: str | None  # the prompt in its tags

    @classmethod
    def read(cls, path: Path, config: ModelConfig) -> SourceFile:
        """Read a file, or with - standard input. Raises FileNotFoundError or ValueError, one line."""
        with input_file(path) as local:
            audio = read_audio(local, config.sample_rate, config.audio_channels)
            with soundfile.SoundFile(local) as file:
                exact = _KEEPING.get(str(file.subtype), "float") if file.samplerate == config.sample_rate else "float"
            name = str(STDIN) if is_stream(path) else path.name if path.is_absolute() else str(path)
            made_with = read_prompt(local)
            return cls(path=path, name=name, hash=file_hash(local), exact=exact, audio=audio, made_with=made_with)

    def prompt(self, given: str | None, *, quiet: bool) -> str:
        """Return the prompt that was given, or that in its own tags, and say that; "" where there is none."""
        if given is not None:
            return given
        if not quiet:
            own = f"that in the tags of {self.name} is taken, {self.made_with!r}"
            say(f"note: no PROMPT: {own if self.made_with else 'nothing says what to make, the model is free'}")
        return self.made_with or ""

    def length(self, seconds: float | None, model: Model) -> float:
        """Return the seconds that were asked for, or its own. Raises ValueError where it is too long for the model."""
        length = samples_to_seconds(len(self.audio), model.config.sample_rate)
        if seconds is None and length > model.config.max_seconds:
            raise ValueError(
                f"{self.path}: {length:.2f} s long, {model.label} makes up to {longest(model.config)}; "
                "give --seconds to use its beginning"
            )
        return length if seconds is None else seconds
