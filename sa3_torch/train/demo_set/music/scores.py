"""Write short scores and play them with fluidsynth: many of them in one run, each in a slot of its own."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa3_torch.train.data.clip_cache import SAMPLE_RATE, Audio

DRUM_CHANNEL = 9
LEAD_SECONDS = 0.1  # of a slot, before the score
GAP_SECONDS = 1.5  # after it: reverberation dies away
_TICKS = 1000  # a second
_ALL_SOUND_OFF, _RESET, _PAN, _VOLUME, _REVERB = 120, 121, 10, 7, 91
# Dry (no chorus), a small room for the voices that ask for it, float samples without dither, one thread: the same bits.
_OPTIONS = (
    *("-ni", "-q", "-C", "0", "-R", "1", "-g", "0.4", "-r", str(SAMPLE_RATE), "-T", "wav", "-O", "float"),
    *("-o", "synth.cpu-cores=1", "-o", "synth.dynamic-sample-loading=1", "-o", "synth.polyphony=256"),
    *("-o", "synth.reverb.room-size=0.4", "-o", "synth.reverb.damp=0.3", "-o", "synth.reverb.width=1.0"),
)


@dataclass(frozen=True, kw_only=True)
class Voice:
    """Set up a channel. ``pan`` -1 (left) to 1, ``volume`` and ``reverb`` 0 to 1, ``cents`` of detuning up to 100.

    ``drums``: the program is a kit.
    """

    program: int
    pan: float = 0.0
    volume: float = 0.8
    reverb: float = 0.0
    cents: float = 0.0
    drums: bool = False


@dataclass(frozen=True, kw_only=True)
class Tone:
    """One note: ``voice`` is an index of the score's voices; ``start`` and ``seconds`` of its key being down."""

    voice: int
    key: int
    start: float
    seconds: float
    velocity: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """Hold voices, at most one of them drums, and tones; it is rendered for ``seconds``, whatever sounds then."""

    voices: tuple[Voice, ...]
    tones: tuple[Tone, ...]
    seconds: float


def check_fluidsynth(font: Path) -> str:
    """Return the path of fluidsynth. Raises FileNotFoundError where it, the font or mido are missing."""
    program = shutil.which("fluidsynth")
    if program is None or not font.is_file():
        missing = "fluidsynth is not installed" if program is None else f"sound font {font} is missing"
        raise FileNotFoundError(f"{missing}; on Debian or Ubuntu: sudo apt install fluidsynth fluid-soundfont-gm")
    try:
        import mido  # noqa: F401
    except ImportError as error:
        raise FileNotFoundError("mido is not installed: pip install 'sa3[train]'") from error
    return program


def play(scores: Sequence[Score], font: Path, place: Path | None = None) -> Iterator[Audio]:
    """Play scores -> audio (samples, 2) of each, LEAD_SECONDS of silence before its start.

    Two files lie in ``place`` meanwhile, None: where the system keeps such files.

    Raises FileNotFoundError as ``check_fluidsynth``, RuntimeError when rendering fails.
    """
    import soundfile

    program = check_fluidsynth(font)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        midi, wav = Path(folder) / "in.mid", Path(folder) / "out.wav"
        _write_midi(scores, midi)
        command = [program, *_OPTIONS, "-F", str(wav), str(font), str(midi)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not wav.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"fluidsynth failed (exit code {done.returncode}): {last}")
        with soundfile.SoundFile(wav) as file:
            for number, (score, start) in enumerate(zip(scores, _starts(scores), strict=True)):
                file.seek(round(start * SAMPLE_RATE))
                audio = file.read(round((LEAD_SECONDS + score.seconds) * SAMPLE_RATE), dtype="float32", always_2d=True)
                if not len(audio) or np.abs(audio).max() < 1e-4:
                    raise RuntimeError(
                        f"fluidsynth rendered silence for score {number} of {len(scores)}; is the font complete?"
                    )
                yield audio


def _starts(scores: Sequence[Score]) -> list[float]:
    """Return where the slots begin, in whole milliseconds."""
    starts, now = [], 0.0
    for score in scores:
        starts.append(now)
        now = np.ceil((now + LEAD_SECONDS + score.seconds + GAP_SECONDS) * _TICKS) / _TICKS
    return starts


def _write_midi(scores: Sequence[Score], path: Path) -> None:
    import mido

    events = sorted(
        (event for score, start in zip(scores, _starts(scores), strict=True) for event in _events(score, start)),
        key=lambda event: event[:2],
    )
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=1_000_000, time=0)])  # one beat is one second
    now = 0
    for tick, _, message in events:
        track.append(message.copy(time=tick - now))
        now = tick
    track.append(mido.MetaMessage("end_of_track", time=round(GAP_SECONDS * _TICKS)))
    mido.MidiFile(ticks_per_beat=_TICKS, tracks=[track]).save(path)


def _events(score: Score, start: float) -> Iterator[tuple[int, int, Any]]:
    """Yield (tick, order within the tick, message): set-up, ends of notes, beginnings of notes, silence."""
    import mido

    channels = _channels(score.voices)
    begin = round(start * _TICKS)
    for channel, voice in zip(channels, score.voices, strict=True):
        yield begin, 0, mido.Message("program_change", channel=channel, program=voice.program)
        settings = ((_PAN, (voice.pan + 1) / 2), (_VOLUME, voice.volume), (_REVERB, voice.reverb))
        for control, value in settings:
            yield begin, 0, mido.Message("control_change", channel=channel, control=control, value=round(127 * value))
        bend = round(voice.cents / 200 * 8192)
        yield begin, 0, mido.Message("pitchwheel", channel=channel, pitch=bend)
    for tone in score.tones:
        channel = channels[tone.voice]
        down = round((start + LEAD_SECONDS + tone.start) * _TICKS)
        up = max(down + 1, round((start + LEAD_SECONDS + tone.start + tone.seconds) * _TICKS))
        velocity = min(max(tone.velocity, 1), 127)
        yield down, 2, mido.Message("note_on", channel=channel, note=tone.key, velocity=velocity)
        yield up, 1, mido.Message("note_off", channel=channel, note=tone.key)
    end = round((start + LEAD_SECONDS + score.seconds) * _TICKS) + 1
    for channel in channels:
        for control in (_ALL_SOUND_OFF, _RESET):
            yield end, 3, mido.Message("control_change", channel=channel, control=control, value=0)


def _channels(voices: Sequence[Voice]) -> list[int]:
    free = (channel for channel in range(16) if channel != DRUM_CHANNEL)
    return [DRUM_CHANNEL if voice.drums else next(free) for voice in voices]
