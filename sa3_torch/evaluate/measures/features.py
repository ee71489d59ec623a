"""Define the feature spaces in which sets of clips are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.measures.spectra import mono
from sa3_torch.train.data.clip_cache import SAMPLE_RATE

Audio = NDArray[np.floating]
Float = NDArray[np.float64]
CLAP_RATE = 48_000
CLAP_PIECE = 10 * CLAP_RATE


class FeatureSpace(Protocol):
    """Embed clips (L, channels) at 44.1 kHz -> (n, D) float64; ``name`` goes into tables."""

    name: str

    def embed(self, clips: list[Audio]) -> Float: ...


class ClapSpace:
    """Run a CLAP of the transformers library from a local folder: unit vectors of sounds and of texts.

    Raises ImportError without transformers, FileNotFoundError without the folder.
    """

    name = "clap"

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: no such folder; download a CLAP model in the transformers layout, such as "
                "laion/clap-htsat-unfused, and give its folder"
            )
        try:
            from transformers import ClapModel, ClapProcessor
        except ImportError as error:
            raise ImportError("CLAP needs the transformers library: pip install 'sa3[clap]'") from error
        model: Any = ClapModel.from_pretrained(folder, local_files_only=True)  # the library is untyped
        self._model, self._processor = model.eval(), ClapProcessor.from_pretrained(folder, local_files_only=True)

    def embed(self, clips: list[Audio]) -> Float:
        """Embed clips (L, channels) at 44.1 kHz -> (n, D) of length one: the mean over pieces of ten seconds."""
        import soxr

        pieces: list[NDArray[np.float32]] = []
        owner: list[int] = []
        for row, clip in enumerate(clips):
            signal = soxr.resample(mono(clip).astype(np.float32), SAMPLE_RATE, CLAP_RATE)
            for start in range(0, max(len(signal), 1), CLAP_PIECE):  # of longer ones CLAP takes a random part
                pieces.append(signal[start : start + CLAP_PIECE])
                owner.append(row)
        found = self._unit(
            self._model.get_audio_features,
            self._processor(audio=pieces, sampling_rate=CLAP_RATE, return_tensors="pt"),
        )
        means = np.stack([found[np.array(owner) == row].mean(axis=0) for row in range(len(clips))])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def embed_text(self, texts: list[str]) -> Float:
        """Embed texts -> (n, D) of length one."""
        return self._unit(self._model.get_text_features, self._processor(text=texts, padding=True, return_tensors="pt"))

    def _unit(self, network: Any, inputs: Any) -> Float:
        import torch

        with torch.no_grad():
            found = network(**inputs)
        values = found if isinstance(found, torch.Tensor) else found.pooler_output  # transformers 5 returns an object
        return np.asarray(torch.nn.functional.normalize(values.double(), dim=-1).numpy())
