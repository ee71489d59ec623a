"""The best linear velocity of flow matching: what a trained model has to beat [T12.4].

For z ~ N(mean, Sigma) and independent noise, x_t = (1 - t) z + t eps, v = eps - z, the best linear estimate of v is
``A_t (x_t - (1 - t) mean) - mean`` with ``A_t = (t I - (1 - t) Sigma) ((1 - t)^2 Sigma + t^2 I)^-1``. Its error is
measured by applying it to held-out latents; the closed form on the eigenvalues of a fitted Sigma looks too good.

Two fits. "clip": Sigma of all values of a clip, for clips of L frames from the first L frames of training clips that
have as many. "frame": Sigma of the channels of one frame, the same for all frames: the only one where clips are long.

Shapes: N clips or frames, T latent frames, C channels, D = T C or C values. numpy only, float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .path import interpolate

Float = NDArray[np.float64]

SCOPES = ("clip", "frame")
LARGEST = 8192  # values of a clip, above which only frames are fitted
MOST = 2048  # clips of a fit
FRAMES_MOST = 200_000  # frames of a fit
_FEWEST = 8  # clips of a fit


@dataclass(frozen=True, kw_only=True)
class Gaussian:
    """Hold N(mean, Sigma): eigenvalues ``values`` (R,) along ``vectors`` (D, R), ``rest`` in every other direction."""

    mean: Float  # (D,)
    values: Float
    vectors: Float
    rest: float
    shrinkage: float  # 0: the sample covariance, 1: a multiple of the identity

    @classmethod
    def fit(cls, samples: NDArray[np.floating]) -> Gaussian:
        """Fit samples (N, D) by their covariance, shrunk towards the identity as Ledoit and Wolf (2004) do."""
        if samples.ndim != 2 or len(samples) < 2:
            raise ValueError(f"samples have shape {samples.shape}: expected (N, D) with N at least 2")
        count, size = samples.shape
        mean = samples.mean(axis=0, dtype=np.float64)
        x = samples - mean
        if count < size:  # the eigenvectors lie in the span of the samples
            values, left = np.linalg.eigh(x @ x.T / count)
            kept = values > values[-1] * 1e-12
            values = values[kept]
            vectors = x.T @ left[:, kept] / np.sqrt(values * count)
        else:
            values, vectors = np.linalg.eigh(x.T @ x / count)
            values = np.maximum(values, 0)
        average = float(values.sum() / size)
        squares = float(np.square(values).sum())  # |S|^2
        spread = squares - size * average**2
        fourth = float(np.square(np.square(x).sum(axis=1)).sum())
        noise = max((fourth / count - squares) / count, 0.0)
        share = min(noise / spread, 1.0) if spread > 0 else 1.0
        return cls(
            mean=mean,
            values=(1 - share) * values + share * average,
            vectors=vectors,
            rest=share * average,
            shrinkage=share,
        )

    def velocity(self, x: NDArray[np.floating], t: float) -> Float:
        """Estimate the velocity linearly at states (N, D) of time ``t`` in (0, 1] -> (N, D)."""
        y = x - (1 - t) * self.mean
        outside = _slope(np.array(self.rest), t)
        along = (y @ self.vectors) * (_slope(self.values, t) - outside)
        return np.asarray(outside * y + along @ self.vectors.T - self.mean)


def _slope(values: Float, t: float) -> Float:
    return np.asarray((t - (1 - t) * values) / ((1 - t) ** 2 * values + t * t))


def wiener_error(values: NDArray[np.floating], t: float) -> float:
    """Return the mean squared error of the velocity in closed form, for data whose covariance has these eigenvalues."""
    return float(np.mean(values / ((1 - t) ** 2 * values + t * t)))


class WienerBaseline:
    """Predict velocities by what is fitted to training latents, a sequence of (T, C), one a clip.

    ``scope`` "clip" falls back to "frame" for lengths of which there are fewer than eight training clips or whose clips
    have more than ``LARGEST`` values. Fits are made when a length is first asked for.
    """

    def __init__(self, latents: Sequence[NDArray[np.floating]], scope: str) -> None:
        if scope not in SCOPES:
            raise ValueError(f"scope is {scope!r}: allowed are {', '.join(SCOPES)}")
        if not latents:
            raise ValueError("no latents to fit a linear velocity to")
        self.scope, self._latents = scope, latents
        frames = np.concatenate(latents)
        self.frame = Gaussian.fit(frames[:: -(-len(frames) // FRAMES_MOST)])
        self._clips: dict[int, Gaussian | None] = {}

    def fit_of(self, frames: int) -> Gaussian | None:
        """Return the fit for clips of so many frames; None: that of single frames is used."""
        if frames not in self._clips:
            enough = [z for z in self._latents if len(z) >= frames] if self.scope == "clip" else []
            possible = len(enough) >= _FEWEST and frames * enough[0].shape[1] <= LARGEST
            enough = enough[:: -(-len(enough) // MOST)] if enough else enough
            stacked = np.stack([z[:frames].reshape(-1) for z in enough]) if possible else None
            self._clips[frames] = None if stacked is None else Gaussian.fit(stacked)
        return self._clips[frames]

    def velocity(self, x: NDArray[np.floating], t: float) -> Float:
        """Estimate the velocity at states (T, C) of one clip at time ``t`` -> (T, C)."""
        fit = self.fit_of(len(x))
        return self.frame.velocity(x, t) if fit is None else fit.velocity(x.reshape(1, -1), t).reshape(x.shape)

    def errors(self, z: NDArray[np.floating], valid: NDArray[np.bool_], noise: NDArray[np.floating], t: float) -> Float:
        """Return the mean squared error of the velocity over the valid frames of every clip: (B,).

        z, noise (B, T, C); valid (B, T) with the padding last.
        """
        found = []
        for clip, length, eps in zip(z, valid.sum(axis=1).tolist(), noise, strict=True):
            data, eps = clip[:length].astype(np.float64), eps[:length].astype(np.float64)
            wrong = self.velocity(interpolate(data, eps, t), t) - (eps - data)
            found.append(np.square(wrong).mean())
        return np.array(found)

    def zero_errors(self, z: NDArray[np.floating], valid: NDArray[np.bool_], noise: NDArray[np.floating]) -> Float:
        """Return the same for the prediction of the mean, at all times: about 1 + the variance."""
        found = []
        for clip, length, eps in zip(z, valid.sum(axis=1).tolist(), noise, strict=True):
            velocity = eps[:length].astype(np.float64) - clip[:length]
            found.append(np.square(velocity + self.frame.mean).mean())
        return np.array(found)
