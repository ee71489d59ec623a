"""Measure what linear maps can read from latents: pitch classes and the level difference of the channels.

Ridge regression in closed form, fitted on training clips and scored on held-out ones, beside a control that sees random
numbers in place of latents. So latents of a run without semantic heads can be compared with those of one that has them.
The targets are those of the regressors [T1.4.4] and [T1.10].

Shapes: L audio samples, T latent frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sa3_torch.train.autoencoder.semantics.regressors import pitch_class
from sa3_torch.train.data.augment import pan_mono
from sa3_torch.train.data.clip_cache import Audio, CachedClip, ClipSet
from sa3_torch.train.run.random import Purpose, generator

from .metrics import effective_rank, kurtosis, r_squared
from .semantics import Regressors

PENALTY = 1e-3  # of the mean variance of a channel
Array = NDArray[np.float64]
Encode = Callable[[Audio], NDArray[np.float32]]  # (L, 2) -> (T, C)


class Ridge:
    """Fit least squares with a penalty on the weights and none on the offset; rows come in pieces."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self._squares, self._products = np.zeros((inputs + 1, inputs + 1)), np.zeros((inputs + 1, outputs))

    def add(self, x: NDArray[np.floating], y: NDArray[np.floating]) -> None:
        """Add x (rows, inputs) and y (rows, outputs)."""
        rows = np.column_stack([x, np.ones(len(x))]).astype(np.float64)
        self._squares += rows.T @ rows
        self._products += rows.T @ y.astype(np.float64)

    def solve(self) -> Callable[[NDArray[np.floating]], Array]:
        """Return the fitted map, (rows, inputs) -> (rows, outputs). Raises ValueError before any row."""
        count = self._squares[-1, -1]
        if not count:
            raise ValueError("no rows to fit")
        variance = np.diag(self._squares)[:-1] / count - np.square(self._squares[-1, :-1] / count)
        penalty = np.append(np.full(len(variance), PENALTY * count * max(float(variance.mean()), 1e-12)), 0.0)
        weights = np.linalg.solve(self._squares + np.diag(penalty), self._products)
        return lambda x: np.asarray(x @ weights[:-1] + weights[-1], dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Read:
    """Describe a clip as the probe sees it: ``latents`` (T, C), ``targets`` (T, all outputs side by side)."""

    latents: NDArray[np.float32]
    targets: NDArray[np.float32]
    midi: int | None


class Probe:
    """Read clips, mono ones moved to a side by up to ``pan`` (0..1), whose latents ``encode`` gives."""

    def __init__(self, clips: ClipSet, encode: Encode, regressors: Regressors, *, pan: float) -> None:
        self.clips, self.encode, self.regressors, self.pan = clips, encode, regressors, pan

    def measure(self, count: int, seed: int) -> dict[str, float | int | None]:
        """Return statistics of held-out latents, R^2 and pitch-class accuracy, and the same of random latents as
        "random_...".

        Of each split at most ``count`` clips are used, evenly taken. "chroma_r2" is that of all bands together.
        "pitch_class": of held-out notes, the highest bin of the chroma of the whole note, all bands together; what the
        targets give themselves is "pitch_class_of_targets". None: nothing to measure it on. Raises ValueError without
        clips.
        """
        fitted = [self._read(clip, seed) for clip in self._chosen("train", count)]
        held_out = [self._read(clip, seed) for clip in self._chosen("validation", count)]
        latents = np.concatenate([read.latents for read in held_out])
        return {
            "clips_fitted": len(fitted),
            "clips_held_out": len(held_out),
            "frames_held_out": len(latents),
            "std": float(latents.std()),
            "kurtosis": kurtosis(latents),
            "effective_rank": effective_rank(latents),
            "channels": latents.shape[1],
            **self._scores(fitted, held_out),
            **{f"random_{name}": value for name, value in self._control(fitted, held_out, seed).items()},
            "pitch_class_of_targets": self._pitch_class(held_out, [read.targets for read in held_out]),
        }

    def _chosen(self, split: str, count: int) -> list[CachedClip]:
        found = self.clips.select(split)
        if not found:
            raise ValueError(f"the clips have no {split} split: a probe is fitted on train and scored on validation")
        return found[:: -(-len(found) // count)]

    def _read(self, clip: CachedClip, seed: int) -> Read:
        audio = self.clips.read(clip)
        if audio.shape[1] == 1:
            position = self.pan * float(generator(seed, Purpose.PROBE_PAN, clip.offset).uniform(-1, 1))
            audio = pan_mono(np.repeat(audio, 2, axis=1), position)
        audio = np.pad(audio, ((0, max(0, self.regressors.config.size - len(audio))), (0, 0)))
        latents = self.encode(audio)
        found = self.regressors.targets(torch.from_numpy(audio)[None], len(latents))
        targets = torch.cat([found[name][0] for name in self._names()], dim=-1).numpy()
        return Read(latents=latents, targets=targets, midi=clip.midi if clip.label == "note" else None)

    def _names(self) -> list[str]:
        return [*self.regressors.bands, "level"]

    def _columns(self) -> dict[str, slice]:
        chroma, level = self.regressors.config.chroma_bins, self.regressors.config.level_bands
        bands = {name: slice(i * chroma, (i + 1) * chroma) for i, name in enumerate(self.regressors.bands)}
        edge = len(bands) * chroma
        return {**bands, "chroma": slice(0, edge), "level": slice(edge, edge + level)}

    def _scores(self, fitted: Sequence[Read], held_out: Sequence[Read]) -> dict[str, float | None]:
        ridge = Ridge(fitted[0].latents.shape[1], fitted[0].targets.shape[1])
        for read in fitted:
            ridge.add(read.latents, read.targets)
        apply = ridge.solve()
        outputs = [apply(read.latents) for read in held_out]
        target, output = np.concatenate([read.targets for read in held_out]), np.concatenate(outputs)
        shares = {f"{name}_r2": r_squared(target[:, c], output[:, c]) for name, c in self._columns().items()}
        return {**shares, "pitch_class": self._pitch_class(held_out, outputs)}

    def _control(self, fitted: Sequence[Read], held_out: Sequence[Read], seed: int) -> dict[str, float | None]:
        random = generator(seed, Purpose.PROBE_CONTROL)

        def blind(read: Read) -> Read:
            noise = random.standard_normal(read.latents.shape).astype(np.float32)
            return Read(latents=noise, targets=read.targets, midi=read.midi)

        return self._scores([blind(read) for read in fitted], [blind(read) for read in held_out])

    def _pitch_class(self, reads: Sequence[Read], outputs: Sequence[NDArray[np.floating]]) -> float | None:
        bands = len(self.regressors.bands)
        right = []
        for read, output in zip(reads, outputs, strict=True):
            if read.midi is not None:
                chroma = output[:, self._columns()["chroma"]].sum(axis=0).reshape(bands, -1).sum(axis=0)
                right.append(int(pitch_class(torch.from_numpy(chroma))) == read.midi % 12)
        return float(np.mean(right)) if right else None
