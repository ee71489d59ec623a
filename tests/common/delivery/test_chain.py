"""Ends, rate, loudness and peaks are set in one order; what is measured is measured by another program too."""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sa3_mlx.common.delivery.chain import DeliveryStream, deliver
from sa3_mlx.common.delivery.limiter import CEILING, limit, limit_true_peak
from sa3_mlx.common.delivery.loudness import loudness_lufs, true_peak_db
from sa3_mlx.common.delivery.settings import Delivery
from sa3_mlx.common.files.audio import peak_db, resample, write_audio

RATE = 44_100
Audio = NDArray[np.float32]


def beats(seconds: float = 4.0, rate: int = RATE) -> Audio:
    """Decaying noise up to 20 kHz and a chord: level and peaks move; it begins and ends softly."""
    time, noise = np.arange(round(seconds * rate)) / rate, np.random.default_rng(3).standard_normal((400_000, 2))
    noise = resample(noise.astype(np.float32), 40_000, 44_100)[: len(time)]
    hits = noise * np.exp(-12 * (time % 0.5))[:, None]
    chord = sum(np.sin(2 * np.pi * pitch * time) for pitch in (220.0, 277.2, 329.6))
    edge = np.clip(np.minimum(time, seconds - time) / 0.02, 0, 1)
    return ((0.12 * hits + 0.05 * chord[:, None]) * edge[:, None]).astype(np.float32)


def clicks() -> Audio:
    """A quiet floor with single samples near full scale, the hardest for what looks between samples."""
    audio = np.random.default_rng(5).standard_normal((3 * RATE, 2)) * 0.003
    audio[5000::11_025] = 0.9
    return audio.astype(np.float32)


def measured(path: Path) -> tuple[float, float]:
    """Loudness in LUFS and true peak in dB of a file, by ffmpeg's ebur128."""
    measure = "ebur128=peak=true:metadata=1,ametadata=print:file=-"
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", path, "-af", measure, "-f", "null", "-"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peaks = map(float, re.findall(r"true_peaks_ch\d=(\S+)", said))
    return float(re.findall(r"r128\.I=(\S+)", said)[-1]), 20 * math.log10(max(peaks))


TARGETS = {
    "loudness alone": Delivery(loudness_lufs=-14),
    "loudness of broadcast, another rate": Delivery(loudness_lufs=-23, rate=48_000),
    "loudness and true peak, limited": Delivery(loudness_lufs=-12, true_peak_db=-1, limit=True),
    "true peak, scaled": Delivery(true_peak_db=-9),
    "true peak, limited": Delivery(true_peak_db=-9, limit=True),
    "true peak at another rate": Delivery(true_peak_db=-12, rate=96_000),
}


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs ffmpeg")
@pytest.mark.parametrize("sound", [beats, clicks])
@pytest.mark.parametrize("case", TARGETS)
def test_another_program_measures_what_was_asked_for(tmp_path: Path, case: str, sound: Callable[[], Audio]):
    pytest.importorskip("pyloudnorm")
    wanted = TARGETS[case]
    made = deliver(sound(), RATE, wanted, clips=False)
    write_audio(tmp_path / "a.wav", made.audio, made.sample_rate, "float")
    loudness, peak = measured(tmp_path / "a.wav")
    if wanted.loudness_lufs is not None:
        assert loudness == pytest.approx(wanted.loudness_lufs, abs=0.1)
    if wanted.true_peak_db is not None and (wanted.limit or wanted.loudness_lufs is None):
        assert peak == pytest.approx(wanted.true_peak_db, abs=0.1)
        assert true_peak_db(made.audio) == pytest.approx(wanted.true_peak_db, abs=0.02)


def test_values_between_samples_are_those_of_the_sine_that_was_sampled():
    time = np.arange(RATE) / RATE
    edge = np.clip(np.minimum(time, 1 - time) / 0.1, 0, 1)
    for frequency, phase in itertools.product((997.0, 11_025.0, 15_000.0, 18_000.0), (0.0, math.pi / 4)):
        audio = (0.5 * edge * np.sin(2 * np.pi * frequency * time + phase)).astype(np.float32)[:, None]
        assert -0.12 < true_peak_db(audio) - 20 * math.log10(0.5) < 0.01, (frequency, phase)
    quarter = (0.5 * np.sin(np.pi / 2 * np.arange(RATE) + np.pi / 4)).astype(np.float32)[:, None]
    assert true_peak_db(quarter) - peak_db(quarter) > 2.9, "3 dB lie between its samples"
    assert true_peak_db(np.zeros((100, 2), np.float32)) == -math.inf == true_peak_db(np.zeros((0, 2), np.float32))


def test_loudness_of_a_known_sine():
    """BS.1770: 997 Hz at full scale in one channel is -3.01 LUFS, in two channels 0."""
    pytest.importorskip("pyloudnorm")
    sine = np.sin(2 * np.pi * 997 * np.arange(5 * 48_000) / 48_000).astype(np.float32)[:, None]
    assert loudness_lufs(sine, 48_000) == pytest.approx(-3.01, abs=0.06)  # measured -3.05
    assert loudness_lufs(np.repeat(sine, 2, axis=1), 48_000) == pytest.approx(0.0, abs=0.06)
    assert loudness_lufs(sine[:1000], 48_000) == -math.inf == loudness_lufs(0 * sine, 48_000)


def test_the_limiter_holds_its_ceiling_and_leaves_what_is_far_from_peaks():
    audio = beats() * np.float32(2.5)
    made = limit(audio, RATE, CEILING)
    assert np.abs(audio).max() > 1.1 and np.abs(made).max() <= np.float32(CEILING)
    window, high = 256, np.flatnonzero(np.abs(audio).max(axis=1) > CEILING)
    near = np.zeros(len(audio), bool)
    for place in high:
        near[max(0, place - window) : place + window + 1] = True
    assert 0 < near.mean() < 0.9
    np.testing.assert_array_equal(made[~near], audio[~near])
    gain = made[:, 0] / np.where(audio[:, 0] == 0, 1, audio[:, 0])
    gain = np.where(np.abs(audio[:, 0]) < 1e-3, np.nan, gain)
    assert np.nanmax(np.abs(np.diff(gain))) < 0.02, "no click"  # measured 0.006
    assert np.all(np.sign(made) == np.sign(audio)) and np.all(np.abs(made) <= np.abs(audio))
    np.testing.assert_array_equal(limit(made, RATE, CEILING), made)


def test_the_limiter_of_true_peaks_reaches_its_ceiling():
    for gain in (1.2, 3.0, 20.0):
        made = limit_true_peak(clicks() * np.float32(gain), RATE, -1.0)
        assert true_peak_db(made) == pytest.approx(-1.0, abs=0.011) and true_peak_db(made) <= -1.0 + 1e-4
    quiet = beats() * np.float32(0.1)
    assert limit_true_peak(quiet, RATE, -1.0) is quiet


def test_ceilings_scale_the_whole_where_nothing_is_limited():
    audio = beats() * np.float32(4)
    for wanted, level in ((Delivery(peak_db=-3), peak_db), (Delivery(true_peak_db=-3), true_peak_db)):
        made = deliver(audio, RATE, wanted, clips=True).audio
        ratio = made[np.abs(audio) > 0.01] / audio[np.abs(audio) > 0.01]
        assert level(made) == pytest.approx(-3.0, abs=1e-3) and ratio.max() - ratio.min() < 1e-6
    ceiling = deliver(audio, RATE, Delivery(peak_db=-3, limit=True), clips=True).audio
    assert peak_db(ceiling) == pytest.approx(-3.0, abs=1e-3)


def test_safe_limits_only_what_would_clip():
    loud, quiet = beats() * np.float32(4), beats()
    safe = Delivery(safe=True)
    assert deliver(quiet, RATE, safe, clips=True).audio is quiet
    assert deliver(loud, RATE, safe, clips=False).audio is loud, "a float file holds it"
    made = deliver(loud, RATE, safe, clips=True)
    assert np.abs(made.audio).max() <= np.float32(CEILING) and made.notes == (
        f"peaks were limited from {peak_db(loud):+.1f} dB",
    )
    near = quiet * np.float32(0.99 / np.abs(quiet).max())
    assert deliver(near, RATE, safe, clips=True).audio is near, "above .977, but it does not clip"
    assert np.abs(deliver(near, RATE, Delivery(limit=True), clips=True).audio).max() <= np.float32(CEILING)


def test_what_cannot_be_reached_is_said():
    pytest.importorskip("pyloudnorm")
    scaled = deliver(clicks(), RATE, Delivery(loudness_lufs=-14, true_peak_db=-1), clips=True)
    assert scaled.notes[-1] == "-14 LUFS cannot be reached below that ceiling; --limit can"
    assert true_peak_db(scaled.audio) == pytest.approx(-1, abs=0.01)
    limited = deliver(beats(), RATE, Delivery(loudness_lufs=0, true_peak_db=-6, limit=True), clips=True)
    assert limited.notes[-1] == "0 LUFS cannot be reached below that ceiling; a lower --loudness can"
    for silent in (np.zeros((RATE, 2), np.float32), beats()[:1000]):
        made = deliver(silent, RATE, Delivery(loudness_lufs=-14), clips=True)
        assert made.audio is silent and "too quiet to be measured" in made.notes[0]


def test_pieces_have_the_bits_of_the_whole_and_the_length_that_was_announced():
    audio = beats(0.5)
    for wanted in (
        Delivery(rate=48_000, fade_in=0.1, fade_out=0.2),
        Delivery(rate=8000),
        Delivery(fade_in=0.4, fade_out=0.4),
        Delivery(fade_out=0.5),
    ):
        whole = deliver(audio, RATE, wanted, clips=True)
        for size in (1, 77, 10_000) if wanted.rate is None else (500, 10_000):
            stream = DeliveryStream(wanted, len(audio), 2, RATE)
            pieces = [stream.take(audio[start : start + size]) for start in range(0, len(audio), size)]
            joined = np.concatenate(pieces)
            np.testing.assert_array_equal(joined, whole.audio)
            assert len(joined) == stream.samples and stream.sample_rate == whole.sample_rate
    np.testing.assert_allclose(
        deliver(audio, RATE, Delivery(rate=48_000), clips=True).audio, resample(audio, RATE, 48_000), atol=1e-6
    )


def test_fades_begin_and_end_at_nothing_and_touch_nothing_else():
    ones = np.ones((1000, 2), np.float32)
    made = deliver(ones, 1000, Delivery(fade_in=0.1, fade_out=0.3), clips=True).audio[:, 0]
    assert 0 < made[0] < 0.001 and 0 < made[-1] < 0.001 and np.all(made[100:700] == 1)
    assert np.all(np.diff(made[:100]) > 0) and np.all(np.diff(made[700:]) < 0)
    assert made[49] + made[50] == pytest.approx(1, abs=1e-6), "half way in the middle"


def test_silent_ends_are_cut_with_a_little_left():
    sound = np.zeros((RATE, 2), np.float32)
    sound[10_000:20_000, 1] = 0.1
    made = deliver(sound, RATE, Delivery(trim_silence=True), clips=True)
    assert len(made.audio) == 10_000 + 2 * 441 and made.start == pytest.approx((10_000 - 441) / RATE)
    np.testing.assert_array_equal(made.audio, sound[10_000 - 441 : 20_000 + 441])
    faded = deliver(sound, RATE, Delivery(trim_silence=True, fade_in=0.1), clips=True).audio
    assert np.abs(faded[441 + 100, 1]) < 0.005, "it is trimmed before it is faded"
    nothing = deliver(sound * np.float32(0.001), RATE, Delivery(trim_silence=True), clips=True)
    assert len(nothing.audio) == RATE and "no silence was trimmed" in nothing.notes[0]


def test_a_sound_that_is_asked_for_nothing_stays_the_same_array():
    audio = beats(0.1)
    made = deliver(audio, RATE, Delivery(), clips=True)
    assert made.audio is audio and made.sample_rate == RATE and made.notes == () and made.start == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peak_db": 1.0}, "peak is 1 dB: allowed are -60 to 0"),
        ({"true_peak_db": -61.0}, "true peak is -61 dB"),
        ({"loudness_lufs": float("nan")}, "loudness_lufs: must be finite"),
        ({"loudness_lufs": 3.0}, "loudness is 3 LUFS: allowed are -60 to 0"),
        ({"fade_in": -1.0}, "fade in is -1.0 s: allowed are 0 to 3600"),
        ({"fade_out": float("inf")}, "fade_out: must be finite"),
        ({"rate": 10}, "rate is 10 Hz: allowed are 1000 to 768000"),
        ({"peak_db": -1.0, "true_peak_db": -1.0}, "--peak and --true-peak: give one ceiling"),
        ({"safe": True, "limit": True}, "--safe has no effect beside --limit"),
        ({"safe": True, "peak_db": -1.0}, "--safe has no effect beside --peak"),
        ({"safe": True, "true_peak_db": -1.0}, "--safe has no effect beside --true-peak"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Delivery.from_dict(fields)
    assert "\n" not in str(caught.value)
