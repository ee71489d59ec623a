"""Show a result in a notebook: a player and a spectrogram for every clip, in HTML without links."""

from __future__ import annotations

import base64
import html as text
import io
from typing import TYPE_CHECKING

import numpy as np
import soundfile

from sa3_mlx.common.files.spectrogram import draw_spectrogram

if TYPE_CHECKING:
    from .events import Generation


def html(generation: Generation) -> str:
    """Return a caption, a player (FLAC, 16 bits) and a picture for every clip."""
    return "".join(_clip(generation, item) for item in range(len(generation.audio)))


def _clip(generation: Generation, item: int) -> str:
    asked, audio = generation.request.items[item], generation.audio[item]
    caption = text.escape(
        f"{asked.prompt or 'no prompt'} (seed {asked.seed}, {len(audio) / generation.sample_rate:.2f} s)"
    )
    sound, picture = io.BytesIO(), io.BytesIO()
    soundfile.write(sound, np.clip(audio, -1, 1), generation.sample_rate, format="FLAC", subtype="PCM_16")
    draw_spectrogram(picture, audio, generation.sample_rate)
    return (
        f"<figure><figcaption>{caption}</figcaption>"
        f'<audio controls src="data:audio/flac;base64,{_encoded(sound)}"></audio><br>'
        f'<img style="max-width: 40em" alt="spectrogram" src="data:image/png;base64,{_encoded(picture)}"></figure>'
    )


def _encoded(data: io.BytesIO) -> str:
    return base64.b64encode(data.getvalue()).decode("ascii")
