"""Design the filters of training losses and discriminators in numpy: float32 results from float64 arithmetic.

F one-sided FFT bins, N taps.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

K_TAPS = 257
REFERENCE_HZ = 27.5  # A0, from which octaves are counted
DAUBECHIES_4 = (
    0.23037781330885523,
    0.7148465705525415,
    0.6308807679295904,
    -0.02798376941698385,
    -0.18703481171888114,
    0.030841381835986965,
    0.032883011666982945,
    -0.010597401784997278,
)


def k_weighting_gain(frequencies: NDArray[np.floating]) -> Float64Array:
    """Return the analogue K-weighting at frequencies in Hz.

    It is a high-pass at 38.135 Hz, Q 0.5, and a high shelf at 1681.97 Hz, +4 dB (BS.1770).
    """
    s = 1j * frequencies
    low, low_q = 38.13547087602444, 0.5003270373238773
    high, high_q, top = 1681.974450955533, 0.7071752369554196, 10 ** (3.99984385397 / 20)
    high_pass = s**2 / (s**2 + s * low / low_q + low**2)
    middle = top**0.4996667741545416
    shelf = (top * s**2 + middle * s * high / high_q + high**2) / (s**2 + s * high / high_q + high**2)
    return np.asarray(np.abs(high_pass * shelf))


@cache
def k_weighting_fir(sample_rate: int) -> Float32Array:
    """Return (257,) taps, symmetric, gain 1 at 1 kHz ([T1.4.1]; the design method there is unknown).

    Linear phase from the finely sampled analogue magnitude, cut by a Hann window: within 1.5 dB from 55 Hz up at 44.1
    kHz. So short a filter cannot make the cut at 38 Hz: below, the gain stays at 0.66. Sampling the magnitude at 257
    points instead would cut twice as much as it should up to 110 Hz, where bass drums are.
    """
    grid = 1 << 16
    response = np.fft.irfft(k_weighting_gain(np.fft.rfftfreq(grid, 1 / sample_rate)), grid)
    half = K_TAPS // 2
    taps = np.roll(response, half)[:K_TAPS] * np.hanning(K_TAPS + 2)[1:-1]
    gain = np.abs(np.sum(taps * np.exp(-2j * np.pi * 1000 / sample_rate * np.arange(K_TAPS))))
    return (taps / gain).astype(np.float32)


@cache
def chroma_filters(bins: int, size: int, sample_rate: int, octave: float, width: float) -> Float32Array:
    """Return (bins, F) filters from magnitudes of an FFT of ``size`` to the pitch classes of the octaves around
    ``octave``.

    Rows have sum one. Octaves are counted from 27.5 Hz; ``width`` is the standard deviation of the Gaussian over
    octaves. Every FFT bin spreads a Gaussian over pitch classes as wide as its distance to the next FFT bin. The bank
    is rotated by three times bins // 12, as upstream does: with 128 bins C is bin 2 and A bin 98 [T1.4.4].
    """
    frequencies = np.arange(1, size // 2 + 1) * sample_rate / size
    octaves = np.log2(frequencies / REFERENCE_HZ)
    pitch = bins * np.concatenate([[octaves[0] - 1.5], octaves])  # 0 Hz lies 1.5 octaves below the first bin
    spread = np.concatenate([np.maximum(np.diff(pitch), 1.0), [1.0]])
    distance: Float64Array = pitch - np.arange(bins, dtype=np.float64)[:, None]  # (bins, F)
    distance = (distance + bins / 2) % bins - bins / 2
    filters: Float64Array = np.exp(-0.5 * (2 * distance / spread) ** 2)
    filters /= np.linalg.norm(filters, axis=0)
    filters *= np.exp(-0.5 * ((pitch / bins - octave) / width) ** 2)
    filters = np.roll(filters, -3 * (bins // 12), axis=0)
    return (filters / np.abs(filters).sum(axis=1, keepdims=True)).astype(np.float32)
