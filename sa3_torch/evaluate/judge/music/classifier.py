"""Name what a sound is by two small networks: one of its colour, one of its rhythm at a stated tempo.

"sound" tells instruments, drums, effects and noises from the features of ``judge/classifier.py``; "style" tells styles
of drum loops and bands from what happens when in the bar. ``training.py`` makes their weights (music.npz).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.measures.spectra import Float, log_mel
from sa3_torch.evaluate.judge.classifier import features

from .tempo import BANDS, RATE, onsets

WEIGHTS = Path(__file__).with_name("music.npz")
NETWORKS = ("sound", "style")
STEPS, GROUPS = 16, 6  # of a bar; groups of four mel bands
BARS_SECONDS = 240.0
_INSTRUMENTS, _STYLES = ("note", "chord", "line"), ("loop", "music")


class MeasuredClip(Protocol):
    """Say what a classifier needs to know of a clip."""

    @property
    def kind(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def instrument(self) -> str | None: ...
    @property
    def fields(self) -> dict[str, object]: ...


def class_of(clip: MeasuredClip) -> tuple[str, str] | None:
    """Return the network that names a clip, and the name that is right: ("sound", "drum:kick"), ("style", "loop:rock").

    None for clips that no network names.
    """
    if clip.kind in _INSTRUMENTS:
        return "sound", f"instrument:{clip.instrument}"
    if clip.kind in ("drum", "effect", "noise"):
        return "sound", f"{clip.kind}:{clip.label}"
    return ("style", f"{clip.kind}:{clip.fields['style']}") if clip.kind in _STYLES else None


def rhythm(audio: NDArray[np.floating], bpm: float) -> NDArray[np.float32]:
    """Describe what happens when in a bar at ``bpm``: onsets of 6 bands at 16 steps, and the mean colour."""
    envelope = onsets(audio)
    groups = envelope.reshape(len(envelope), GROUPS, BANDS // GROUPS).sum(axis=2)
    place = np.arange(len(groups)) / RATE / (BARS_SECONDS / bpm) * STEPS
    step = np.round(place).astype(int) % STEPS
    folded = np.zeros((STEPS, GROUPS))
    np.add.at(folded, step, groups)
    folded /= max(float(folded.max()), 1e-12)
    mel = log_mel(audio)
    colour = [mel.mean(axis=0), mel.std(axis=0)]
    return np.concatenate([folded.ravel(), *colour, [bpm / 100]]).astype(np.float32)


def describe(audio: NDArray[np.floating], network: str, bpm: float) -> NDArray[np.float32]:
    """Return the input of a network; only "style" looks at the tempo."""
    return rhythm(audio, bpm) if network == "style" else features(audio)


class JudgeNetworks:
    """Run the networks. Raises FileNotFoundError where they have no weights."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; make it with: python -m {__package__}.training CACHE")
        with np.load(path) as data:
            self._weights = {name: [data[f"{name}_{part}"] for part in _PARTS] for name in NETWORKS}
            self.classes: dict[str, list[str]] = {name: data[f"{name}_classes"].tolist() for name in NETWORKS}

    def hidden(self, x: NDArray[np.float32], network: str) -> Float:
        """Return the values from which the class is read: a space for Frechet distances."""
        mean, scale, w1, b1, *_ = self._weights[network]
        return np.asarray(np.maximum((x - mean) / scale @ w1.astype(np.float64) + b1, 0))

    def name(self, audio: NDArray[np.floating], network: str, bpm: float = 120.0) -> str:
        """Return the class of a sound, such as "instrument:piano"; "" for silence."""
        if not np.abs(audio).max(initial=0.0) > 1e-4:
            return ""
        w2, b2 = self._weights[network][4:]
        hidden = self.hidden(describe(audio, network, bpm), network)
        return self.classes[network][int((hidden @ w2.astype(np.float64) + b2).argmax())]


_PARTS = ("mean", "scale", "w1", "b1", "w2", "b2")
