"""Draw spectrograms of audio as PNG files: logarithmic frequency, levels in dB of full scale.

Shapes: L samples, W windows in time (columns), N bands in frequency (rows).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .atomic import new_file

Float32Array = NDArray[np.float32]

LOWEST_HZ = 30.0
RANGE_DB = 90.0
_FLOOR_DB = -140.0
_WINDOW_SECONDS = 0.06  # long enough for the pitch of a bass, short enough for the attack of a drum
_COLUMNS = 1400
_BANDS = 400
_TICKS_HZ = (50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 40000)


@dataclass(frozen=True, kw_only=True)
class Spectrogram:
    """Hold ``levels_db`` (N, W), the strongest partial in each band; a sine at full scale has 0 dB."""

    levels_db: Float32Array
    frequencies: NDArray[np.float64]  # (N,) Hz, band centres, rising
    times: NDArray[np.float64]  # (W,) seconds, window centres


def spectrogram(audio: Float32Array, sample_rate: int) -> Spectrogram:
    """Measure audio (L, channels), averaged in power over channels. Raises ValueError for audio without samples."""
    if audio.ndim != 2 or not audio.size:
        raise ValueError(f"a spectrogram needs audio (samples, channels) with samples in it, got shape {audio.shape}")
    size = 2 ** int(np.ceil(np.log2(max(16.0, _WINDOW_SECONDS * sample_rate))))
    hop = max(1, -(-len(audio) // _COLUMNS))
    window = np.hanning(size + 1)[:-1]
    padded = np.pad(audio.astype(np.float64), ((size // 2, size // 2 + hop), (0, 0)))
    starts = np.arange(0, len(audio), hop)
    highest = sample_rate / 2
    edges = np.geomspace(min(LOWEST_HZ, highest / 100), highest, _BANDS + 1)
    levels = np.empty((_BANDS, len(starts)), dtype=np.float32)
    for column, start in enumerate(starts):
        spectrum = np.fft.rfft(padded[start : start + size] * window[:, None], axis=0) * (2 / window.sum())
        power = (np.abs(spectrum) ** 2).mean(axis=1)
        levels[:, column] = _bands(10 * np.log10(np.maximum(power, 10 ** (_FLOOR_DB / 10))), edges * size / sample_rate)
    return Spectrogram(
        levels_db=levels, frequencies=np.sqrt(edges[:-1] * edges[1:]), times=(starts + 0.0) / sample_rate
    )


def _bands(levels: NDArray[np.float64], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return levels of bands with ``edges`` in bins from those of FFT bins: the highest inside, else interpolated."""
    centres = np.sqrt(edges[:-1] * edges[1:])
    result = np.interp(centres, np.arange(len(levels)), levels)
    first, stop = np.ceil(edges[:-1]).astype(int), np.minimum(np.floor(edges[1:]).astype(int) + 1, len(levels))
    wide = stop > first
    ranges = np.stack([first[wide], stop[wide]], axis=1).reshape(-1)
    highest = np.maximum.reduceat(np.append(levels, -np.inf), ranges)[::2]
    result[wide] = np.maximum(result[wide], highest)
    return result


def save_spectrogram(path: str | Path, audio: Float32Array, sample_rate: int, *, title: str = "") -> None:
    """Draw waveform and spectrogram of audio (L, channels) to a PNG; it appears whole or not at all.

    Raises ValueError for another extension or empty audio, OSError (one line) when the disk refuses.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: a spectrogram is a .png file")
    with new_file(path) as partial, partial.open("wb") as file:
        draw_spectrogram(file, audio, sample_rate, title=title)


def draw_spectrogram(file: BinaryIO, audio: Float32Array, sample_rate: int, *, title: str = "") -> None:
    """Draw that picture into an open file. Raises ValueError for empty audio."""
    _draw(file, spectrogram(audio, sample_rate), audio, sample_rate, title)


def _draw(file: BinaryIO, data: Spectrogram, audio: Float32Array, sample_rate: int, title: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds = len(audio) / sample_rate
    figure = Figure(figsize=(11, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 5), width_ratios=(60, 1))
    wave, image, bar = (figure.add_subplot(cell) for cell in (grid[0, 0], grid[1, 0], grid[1, 1]))

    low, high = _envelope(audio)
    time = np.linspace(0, seconds, len(low))
    wave.fill_between(time, low, high, color="#3b528b", linewidth=0.4)
    limit = max(1.0, float(np.abs(audio).max()))
    for level in (-1, 1):
        wave.axhline(level, color="#b22222" if limit > 1 else "#999999", linewidth=0.6)
    wave.set(xlim=(0, seconds), ylim=(-1.05 * limit, 1.05 * limit), ylabel="level")
    wave.tick_params(labelbottom=False)
    wave.set_title(_shorten(title), loc="left", fontsize=11)

    top = float(np.ceil(max(-20.0, float(data.levels_db.max())) / 5) * 5)
    edges_t = np.linspace(0, seconds, data.levels_db.shape[1] + 1)
    ratio = data.frequencies[1] / data.frequencies[0]
    edges_f = np.append(data.frequencies / np.sqrt(ratio), data.frequencies[-1] * np.sqrt(ratio))
    mesh = image.pcolormesh(
        edges_t, edges_f, data.levels_db, cmap="magma", vmin=top - RANGE_DB, vmax=top, rasterized=True
    )
    image.set(xlim=(0, seconds), ylim=(edges_f[0], edges_f[-1]), yscale="log", xlabel="time (s)")
    image.set_ylabel("frequency (Hz)")
    ticks = [tick for tick in _TICKS_HZ if edges_f[0] <= tick <= edges_f[-1]]
    image.set_yticks(ticks, [f"{tick // 1000}k" if tick >= 1000 else str(tick) for tick in ticks])
    image.minorticks_off()
    figure.colorbar(mesh, cax=bar, label="level (dB, full-scale sine = 0)")
    figure.savefig(file, format="png", metadata={"Software": "sa3"})


def _envelope(audio: Float32Array) -> tuple[Float32Array, Float32Array]:
    """Return the lowest and the highest sample of any channel, per column."""
    columns = min(_COLUMNS, len(audio))
    starts = np.linspace(0, len(audio), columns, endpoint=False).astype(int)
    return np.minimum.reduceat(audio.min(axis=1), starts), np.maximum.reduceat(audio.max(axis=1), starts)


def _shorten(title: str) -> str:
    """Return one line without the dollar signs that matplotlib would read as formulas."""
    line = " ".join(title.split()).replace("$", r"\$")
    return line if len(line) <= 110 else line[:107] + "..."
