"""Show a result in a notebook: a player and a spectrogram for every clip, in HTML without links."""

from __future__ import annotations

import base64
import html as text
import io
from collections.abc import Iterable, Sequence

import numpy as np
import soundfile

from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.files.spectrogram import Span, draw_spectrogram


def html(clips: Iterable[tuple[str, Audio, Sequence[Span]]], sample_rate: int) -> str:
    """Return a caption, a player (FLAC, 16 bits) and a picture for every clip.

    A clip is its caption, its audio (L, channels) and the parts of it that are marked as made.
    """
    return "".join(_clip(caption, audio, sample_rate, made) for caption, audio, made in clips)


def _clip(caption: str, audio: Audio, sample_rate: int, made: Sequence[Span]) -> str:
    sound, picture = io.BytesIO(), io.BytesIO()
    soundfile.write(sound, np.clip(audio, -1, 1), sample_rate, format="FLAC", subtype="PCM_16")
    draw_spectrogram(picture, audio, sample_rate, made=made)
    return (
        f"<figure><figcaption>{text.escape(caption)}</figcaption>"
        f'<audio controls src="data:audio/flac;base64,{_encoded(sound)}"></audio><br>'
        f'<img style="max-width: 40em" alt="spectrogram" src="data:image/png;base64,{_encoded(picture)}"></figure>'
    )


def _encoded(data: io.BytesIO) -> str:
    return base64.b64encode(data.getvalue()).decode("ascii")
