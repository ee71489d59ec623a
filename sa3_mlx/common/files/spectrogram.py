"""Draw spectrograms of audio as PNG files: logarithmic frequency, levels in dB of full scale.

Shapes: L samples, W windows in time (columns), N bands in frequency (rows).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from .atomic import new_file
from .lettering import quiet_drawing, write_title

Float32Array = NDArray[np.float32]
Span = tuple[float, float]  # seconds

LOWEST_HZ = 30.0
RANGE_DB = 90.0
_FLOOR_DB = -140.0
_WINDOWS_SECONDS = (0.093, 0.023, 0.006)  # the pitch of a bass, speech, the attack of a drum
_CYCLES = 6  # that a window holds of a frequency that it can tell from others
_COLUMNS = 1400
_BANDS = 400
_FINER = 2  # bins of a spectrum in place of one, so that a partial between two loses 0.4 dB and not 1.4
_TOGETHER = 1 << 20  # samples that are transformed at once
_TICKS_HZ = (50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 40000)
_MADE = "#e08214"


@dataclass(frozen=True, kw_only=True)
class Spectrogram:
    """Hold ``levels_db`` (N, W), the strongest partial in each band; a sine at full scale has 0 dB."""

    levels_db: Float32Array
    frequencies: NDArray[np.float64]  # (N,) Hz, band centres, rising
    times: NDArray[np.float64]  # (W,) seconds, window centres


def spectrogram(audio: Float32Array, sample_rate: int, columns: int = _COLUMNS) -> Spectrogram:
    """Measure audio (L, channels), averaged in power over channels, at most so many ``columns``.

    Raises ValueError for audio without samples.

    A level is the lowest that windows of several lengths find, so that neither attacks nor partials are smeared: a long
    one sees a drum before it is struck, a short one a partial beside its place.
    """
    if audio.ndim != 2 or not audio.size:
        raise ValueError(f"a spectrogram needs audio (samples, channels) with samples in it, got shape {audio.shape}")
    hop = max(1, -(-len(audio) // columns))
    highest = sample_rate / 2
    edges = np.geomspace(min(LOWEST_HZ, highest / 100), highest, _BANDS + 1)
    centres = np.sqrt(edges[:-1] * edges[1:])
    longest, *others = (2 ** round(math.log2(max(16.0, seconds * sample_rate))) for seconds in _WINDOWS_SECONDS)
    levels = _levels(audio, longest, hop, edges / sample_rate)
    for size in others:
        if size >= hop:  # a column of a long sound is wider than that
            found = _levels(audio, size, hop, edges / sample_rate)
            told = centres * size / sample_rate >= _CYCLES
            levels[told] = np.minimum(levels[told], found[told])
    return Spectrogram(levels_db=levels, frequencies=centres, times=np.arange(levels.shape[1]) * hop / sample_rate)


def _levels(audio: Float32Array, size: int, hop: int, edges: NDArray[np.float64]) -> Float32Array:
    """Return levels (N, W) of windows of ``size`` samples around every ``hop``-th one, bands with ``edges`` in cycles a
    sample.

    Where windows are shorter than hops, of all that fit between two columns the highest level counts.
    """
    edges = edges * size * _FINER
    window = np.hanning(size + 1)[:-1].astype(np.float32)
    window *= 2 / window.sum()
    columns, inside = -(-len(audio) // hop), -(-2 * hop // size)
    levels = np.full((columns, len(edges) - 1), _FLOOR_DB, np.float32)
    together = max(1, _TOGETHER // (size * audio.shape[1]))
    for first in range(0, columns, together):
        part = slice(first, min(first + together, columns))
        piece = _between(audio, part.start * hop - size // 2, part.stop * hop + size)
        windows = np.lib.stride_tricks.sliding_window_view(piece, size, axis=0)
        for offset in np.arange(inside) * hop // inside:
            starts = np.arange(part.stop - part.start) * hop + offset
            power = (np.abs(np.fft.rfft(windows[starts] * window, _FINER * size)) ** 2).mean(axis=1)
            found = _bands(10 * np.log10(np.maximum(power, 10 ** (_FLOOR_DB / 10))), edges)
            levels[part] = np.maximum(levels[part], found)
    return levels.T


def _between(audio: Float32Array, start: int, stop: int) -> Float32Array:
    """Return samples from ``start`` to ``stop``, zeros where there are none."""
    before, after = max(0, -start), max(0, stop - max(len(audio), start))
    return np.pad(audio[max(0, start) : stop], ((before, after), (0, 0)))


def _bands(levels: Float32Array, edges: NDArray[np.float64]) -> Float32Array:
    """Return levels (W, N) of bands with ``edges`` in bins from those of FFT bins (W, bins): the highest inside, else
    interpolated."""
    centres, last = np.sqrt(edges[:-1] * edges[1:]), levels.shape[1] - 1
    below = np.minimum(centres.astype(int), last - 1)
    share = np.minimum(centres - below, 1).astype(np.float32)
    result: Float32Array = levels[:, below] * (1 - share) + levels[:, below + 1] * share
    first, stop = np.ceil(edges[:-1]).astype(int), np.minimum(np.floor(edges[1:]).astype(int) + 1, last + 1)
    wide = stop > first
    ranges = np.stack([first[wide], stop[wide]], axis=1).reshape(-1)
    lowest = np.full((len(levels), 1), -np.inf, np.float32)  # so that the last range may end at the end
    highest = np.maximum.reduceat(np.append(levels, lowest, axis=1), ranges, axis=1)[:, ::2]
    result[:, wide] = np.maximum(result[:, wide], highest)
    return result


def save_spectrogram(
    path: str | Path, audio: Float32Array, sample_rate: int, *, title: str = "", made: Sequence[Span] = ()
) -> None:
    """Draw waveform and spectrogram of audio (L, channels) to a PNG; it appears whole or not at all.

    ``made``: parts (start, end) in seconds to mark, where the others were kept. Raises ValueError for another extension
    or empty audio, OSError (one line) when the disk refuses.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: a spectrogram is a .png file")
    with new_file(path) as partial, partial.open("wb") as file:
        draw_spectrogram(file, audio, sample_rate, title=title, made=made)


def draw_spectrogram(
    file: BinaryIO, audio: Float32Array, sample_rate: int, *, title: str = "", made: Sequence[Span] = ()
) -> None:
    """Draw that picture into an open file. Raises ValueError for empty audio."""
    data = spectrogram(audio, sample_rate)
    with quiet_drawing():
        _draw(file, data, audio, sample_rate, title, made)


def _draw(
    file: BinaryIO, data: Spectrogram, audio: Float32Array, sample_rate: int, title: str, made: Sequence[Span]
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    seconds = len(audio) / sample_rate
    figure = Figure(figsize=(11, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(1, 5), width_ratios=(60, 1))
    wave, image, bar = (figure.add_subplot(cell) for cell in (grid[0, 0], grid[1, 0], grid[1, 1]))

    low, high = envelope(audio)
    time = np.linspace(0, seconds, len(low))
    wave.fill_between(time, low, high, color="#3b528b", linewidth=0.4)
    limit = max(1.0, float(np.abs(audio).max()))
    for level in (-1, 1):
        wave.axhline(level, color="#b22222" if limit > 1 else "#999999", linewidth=0.6)
    wave.set(xlim=(0, seconds), ylim=(-1.05 * limit, 1.05 * limit), ylabel="level")
    wave.tick_params(labelbottom=False)
    write_title(wave, title)

    top = float(np.ceil(max(-20.0, float(data.levels_db.max())) / 5) * 5)
    half = math.log2(data.frequencies[1] / data.frequencies[0]) / 2
    lowest, highest = math.log2(data.frequencies[0]) - half, math.log2(data.frequencies[-1]) + half
    extent = (0, seconds, lowest, highest)
    drawn = image.imshow(
        data.levels_db, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=top - RANGE_DB, vmax=top
    )
    image.set(xlabel="time (s)", ylabel="frequency (Hz)")
    ticks = [tick for tick in _TICKS_HZ if lowest <= math.log2(tick) <= highest]
    image.set_yticks(np.log2(ticks), [f"{tick // 1000}k" if tick >= 1000 else str(tick) for tick in ticks])
    figure.colorbar(drawn, cax=bar, label="level (dB, full-scale sine = 0)")
    if made:
        wave.set_title("shaded: made, the rest is kept", loc="right", fontsize=9, color=_MADE)
    for start, stop in made:
        wave.axvspan(start, stop, color=_MADE, alpha=0.3, linewidth=0)
        for edge in {start, stop} - {0.0, seconds}:
            image.axvline(edge, color="white", linewidth=1, linestyle=(0, (4, 4)))
        image.plot((start, stop), (highest, highest), color=_MADE, linewidth=5, solid_capstyle="butt")
    image.set(xlim=extent[:2], ylim=extent[2:])
    figure.savefig(file, format="png", metadata={"Software": "sa3"})


def envelope(audio: Float32Array, columns: int = _COLUMNS) -> tuple[Float32Array, Float32Array]:
    """Return the lowest and the highest sample of any channel of audio (L, channels), per column; at most L columns."""
    columns = min(columns, len(audio))
    starts = np.linspace(0, len(audio), columns, endpoint=False).astype(int)
    low, high = np.empty((2, columns), np.float32)
    together = max(1, _TOGETHER * columns // len(audio))
    for first in range(0, columns, together):
        part = slice(first, first + together)
        piece = audio[starts[first] : starts[part.stop] if part.stop < columns else None]
        inside = starts[part] - starts[first]
        low[part] = np.minimum.reduceat(piece.min(axis=1), inside)
        high[part] = np.maximum.reduceat(piece.max(axis=1), inside)
    return low, high
