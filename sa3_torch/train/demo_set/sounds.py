"""Render the demo set: half an hour of captioned sounds, from our own MIDI by fluidsynth and from numpy synthesis.

Notes and chords of General MIDI instruments, drums (sound font kits and synthesis), noises, and optionally Sonic Pi
one-shots without captions as extra autoencoder material. Captions state only what was written. Validation holds out
whole (instrument, pitch) and (instrument, chord) pairs; drums and noises by variation.

Command: ``python -m sa3_torch.train.demo_set.sounds OUT`` (half a minute). Deterministic for a seed and a sound font.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import click
import numpy as np

from sa3_mlx.common.terminal import report
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, Audio, ClipSet, Draft, check_place, trim, write_clips
from sa3_torch.train.data.recordings import hash_file
from sa3_torch.train.run.random import Purpose, generator

from .synth import DRUMS, NOISES, noise_clip

DEFAULT_FONT = Path("/usr/share/sounds/sf2/FluidR3_GM.sf2")
FONT_LICENCES = {DEFAULT_FONT.name: "MIT"}  # of the sound, for the attribution list
SAMPLES_LICENCE = (
    "CC0 from Freesound by the set's README; Debian's copyright file lists 130 of 165 as CC0, the others under MIT"
)
MAXIMUM_SECONDS, MINIMUM_SECONDS = 4.0, 0.3
NAMES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
PITCHES = range(48, 72)  # C3..B4, the range in which every instrument below has an unambiguous fundamental
# General MIDI programs. The drawbar organ (16) sounds an octave below what is written, so the organ is 19.
INSTRUMENTS = {
    "piano": 0,
    "organ": 19,
    "guitar": 24,
    "violin": 40,
    "trumpet": 56,
    "flute": 73,
    "marimba": 12,
    "vibraphone": 11,
}
CHORD_INSTRUMENTS = ("piano", "organ", "guitar")
TRIADS = {"major": (0, 4, 7), "minor": (0, 3, 7)}
# General MIDI percussion keys, and the kits (programs of channel 10) whose hits sound like their names.
DRUM_KEYS = {
    "kick": (35, 36),
    "snare": (38, 40),
    "clap": (39,),
    "hihat": (42,),
    "crash": (49, 57),
    "tom": (41, 45, 47, 48, 50),
}
KITS = (0, 8, 16, 24, 25, 32)
DRUM_CAPTIONS = {
    "kick": ("kick drum", "kick", "drum kick"),
    "snare": ("snare drum", "snare", "drum snare"),
    "clap": ("clap", "hand clap"),
    "hihat": ("closed hi-hat", "hi-hat", "hi-hat cymbal"),
    "crash": ("crash cymbal", "crash", "cymbal crash"),
    "tom": ("tom drum", "tom", "drum tom"),
}
NOTES_PER_PITCH, SYNTHESISED_PER_DRUM, CLIPS_PER_NOISE = 4, 40, 40
HELD_OUT_PITCHES, HELD_OUT_CHORDS = 2, 2  # of 24, per instrument
SLOT_SECONDS, LEAD_SECONDS = 6.0, 0.1
# Purposes of the random generators.


@dataclass(frozen=True, kw_only=True)
class MidiEvent:
    """Describe one slot of a MIDI file: keys struck together on a program; ``drums`` plays on channel 10."""

    program: int
    keys: tuple[int, ...]
    velocity: int
    seconds: float
    drums: bool = False


def note_name(midi: int) -> str:
    """Return the scientific pitch name with sharps: 60 -> "C4"."""
    return f"{NAMES[midi % 12]}{midi // 12 - 1}"


def note_captions(instrument: str, midi: int) -> tuple[str, ...]:
    """Return the canonical caption of a note, then others."""
    name = note_name(midi)
    return (f"{instrument} note {name}", f"{instrument} {name}", f"{name} {instrument}", f"{name} {instrument} note")


def chord_captions(instrument: str, root: int, quality: str) -> tuple[str, ...]:
    """Return the canonical caption of a chord, then others."""
    name = f"{NAMES[root % 12]} {quality}"
    return (f"{instrument} chord {name}", f"{instrument} {name}", f"{name} {instrument}", f"{name} chord {instrument}")


def render_midi(events: Sequence[MidiEvent], font: Path) -> list[Audio]:
    """Play each event dry in a slot of its own; return one mono slot of SLOT_SECONDS per event.

    Raises FileNotFoundError when fluidsynth or the font are missing, RuntimeError when rendering fails.
    """
    import mido

    program = shutil.which("fluidsynth")
    if program is None:
        raise FileNotFoundError("fluidsynth is not installed; install it (for example: apt install fluidsynth)")
    if not font.is_file():
        raise FileNotFoundError(f"sound font {font} is missing; install fluid-soundfont-gm or pass --font FILE.sf2")
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=1_000_000, time=0)])  # one beat is one second
    lead, slot = round(LEAD_SECONDS * 480), round(SLOT_SECONDS * 480)
    for event in events:
        channel, length = (9 if event.drums else 0), round(event.seconds * 480)
        track.append(mido.Message("program_change", channel=channel, program=event.program, time=0))
        for kind, velocity, wait in (("note_on", event.velocity, lead), ("note_off", 0, length)):
            for i, key in enumerate(event.keys):
                track.append(mido.Message(kind, channel=channel, note=key, velocity=velocity, time=0 if i else wait))
        # A neutral message at the end of the slot carries the waiting time; channel volume stays at its default.
        track.append(mido.Message("control_change", channel=channel, control=7, value=100, time=slot - lead - length))
    track.append(mido.MetaMessage("end_of_track", time=480))
    with tempfile.TemporaryDirectory() as folder:
        midi, wav = Path(folder) / "in.mid", Path(folder) / "out.wav"
        mido.MidiFile(ticks_per_beat=480, tracks=[track]).save(midi)
        options = ["-ni", "-R", "0", "-C", "0", "-g", "0.6", "-r", str(SAMPLE_RATE), "-T", "wav", "-O", "float"]
        done = subprocess.run([program, *options, "-F", wav, font, midi], capture_output=True, text=True, check=False)
        if done.returncode != 0 or not wav.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"fluidsynth failed (exit code {done.returncode}): {last}")
        return _slots(wav, len(events))


def _slots(wav: Path, count: int) -> list[Audio]:
    import soundfile

    size = round(SLOT_SECONDS * SAMPLE_RATE)
    with soundfile.SoundFile(wav) as file:
        slots = [file.read(size, dtype="float32", always_2d=True).mean(axis=1) for _ in range(count)]
    for index, slot in enumerate(slots):
        if len(slot) < size // 2 or np.abs(slot).max() < 1e-4:
            raise RuntimeError(f"fluidsynth rendered silence for sound {index} of {count}; is the sound font complete?")
    return slots


def _finish(audio: Audio, seed: int, name: str) -> Audio:
    """Trim, and set the peak to a random level between -9 and -3 dBFS."""
    audio = audio / np.abs(audio).max()
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    level = 10 ** (generator(seed, Purpose.GAIN, key).uniform(-9, -3) / 20)
    trimmed = trim((audio * level).astype(np.float32), maximum_seconds=MAXIMUM_SECONDS, minimum_seconds=MINIMUM_SECONDS)
    return trimmed.astype(np.float32)


def _held_out(seed: int, purpose: int, index: int, count: int, choices: int) -> set[int]:
    return set(generator(seed, Purpose.HOLD_OUT, purpose, index).choice(choices, size=count, replace=False).tolist())


def held_out_notes(seed: int) -> list[tuple[str, int]]:
    """Return the (instrument, MIDI pitch) pairs that no training clip of this seed has."""
    return [
        (instrument, PITCHES[0] + offset)
        for index, instrument in enumerate(INSTRUMENTS)
        for offset in sorted(_held_out(seed, Purpose.NOTE, index, HELD_OUT_PITCHES, len(PITCHES)))
    ]


def held_out_chords(seed: int) -> list[tuple[str, int, str]]:
    """Return the (instrument, MIDI root, quality) triples that no training clip of this seed has."""
    kinds = [(root, quality) for root in range(48, 60) for quality in TRIADS]
    return [
        (instrument, *kinds[choice])
        for index, instrument in enumerate(CHORD_INSTRUMENTS)
        for choice in sorted(_held_out(seed, Purpose.CHORD, index, HELD_OUT_CHORDS, len(kinds)))
    ]


def notes(seed: int, font: Path) -> Iterator[Draft]:
    """Yield notes of every instrument and pitch."""
    for index, (instrument, program) in enumerate(INSTRUMENTS.items()):
        rng = generator(seed, Purpose.NOTE, index)
        pitches = [midi for midi in PITCHES for _ in range(NOTES_PER_PITCH)]
        events = [
            MidiEvent(program=program, keys=(m,), velocity=int(rng.integers(60, 121)), seconds=rng.uniform(0.4, 2.5))
            for m in pitches
        ]
        held = _held_out(seed, Purpose.NOTE, index, HELD_OUT_PITCHES, len(PITCHES))
        for i, (midi, slot) in enumerate(zip(pitches, render_midi(events, font), strict=True)):
            name = f"note-{instrument}-{note_name(midi)}-{i % NOTES_PER_PITCH}"
            yield Draft(
                id=name,
                captions=note_captions(instrument, midi),
                kind="note",
                label="note",
                instrument=instrument,
                midi=midi,
                split="validation" if midi - PITCHES[0] in held else "train",
                audio=_finish(slot, seed, name),
            )


def chords(seed: int, font: Path) -> Iterator[Draft]:
    """Yield triads of every chord instrument and root."""
    for index, instrument in enumerate(CHORD_INSTRUMENTS):
        rng = generator(seed, Purpose.CHORD, index)
        kinds = [(root, quality) for root in range(48, 60) for quality in TRIADS]
        takes = [(kind, take) for kind in range(len(kinds)) for take in range(2)]
        events = [
            MidiEvent(
                program=INSTRUMENTS[instrument],
                keys=tuple(kinds[k][0] + i for i in TRIADS[kinds[k][1]]),
                velocity=int(rng.integers(60, 121)),
                seconds=rng.uniform(0.8, 2.5),
            )
            for k, _ in takes
        ]
        held = _held_out(seed, Purpose.CHORD, index, HELD_OUT_CHORDS, len(kinds))
        for (k, take), slot in zip(takes, render_midi(events, font), strict=True):
            root, quality = kinds[k]
            name = f"chord-{instrument}-{NAMES[root % 12]}-{quality}-{take}"
            yield Draft(
                id=name,
                captions=chord_captions(instrument, root, quality),
                kind="chord",
                label="chord",
                instrument=instrument,
                midi=root,
                split="validation" if k in held else "train",
                audio=_finish(slot, seed, name),
            )


def _drum(seed: int, label: str, name: str, split: str, audio: Audio) -> Draft:
    captions = DRUM_CAPTIONS[label]
    return Draft(
        id=name,
        captions=captions,
        kind="drum",
        label=label,
        instrument=None,
        midi=None,
        split=split,
        audio=_finish(audio, seed, name),
    )


def kit_drums(seed: int, font: Path) -> Iterator[Draft]:
    """Yield hits of the sound font's kits; a sound that two kits share is kept once, so that the split cannot leak."""
    rng = generator(seed, Purpose.DRUM)
    hits = [(label, kit, key) for label, keys in DRUM_KEYS.items() for kit in KITS for key in keys]
    events = [
        MidiEvent(program=kit, keys=(key,), velocity=velocity, seconds=1.0, drums=True)
        for _, kit, key in hits
        for velocity in (int(rng.integers(70, 96)), int(rng.integers(100, 128)))
    ]
    slots = render_midi(events, font)
    seen: list[Audio] = []
    kept = 0
    for i, (label, kit, key) in enumerate(hits):
        shape = np.abs(np.fft.rfft(slots[2 * i + 1][: SAMPLE_RATE // 2]))
        shape /= np.linalg.norm(shape)
        if any(float(shape @ other) > 0.98 for other in seen):
            continue
        seen.append(shape)
        kept += 1
        for take in range(2):
            split = "validation" if kept % 10 == 5 else "train"
            yield _drum(seed, label, f"drum-{label}-kit{kit}-key{key}-{take}", split, slots[2 * i + take])


def synthesised(seed: int) -> Iterator[Draft]:
    """Yield the drums and noises that need only numpy; every tenth variation is held out."""
    for index, (label, recipe) in enumerate(DRUMS.items()):
        for i in range(SYNTHESISED_PER_DRUM):
            audio = recipe(generator(seed, Purpose.SYNTH, index, i))
            yield _drum(seed, label, f"drum-{label}-synth-{i}", "validation" if i % 10 == 5 else "train", audio)
    for index, colour in enumerate(NOISES):
        for i in range(CLIPS_PER_NOISE):
            name = f"noise-{colour}-{i}"
            yield Draft(
                id=name,
                captions=(f"{colour} noise",),
                kind="noise",
                label=colour,
                instrument=None,
                midi=None,
                split="validation" if i % 10 == 5 else "train",
                audio=_finish(noise_clip(generator(seed, Purpose.COLOURED_NOISE, index, i), colour), seed, name),
            )


def samples(seed: int, folder: Path) -> Iterator[Draft]:
    """Yield FLAC one-shots without captions, first 4 s each, only for the autoencoder; the file's hash decides the
    split."""
    import soundfile

    files = sorted(folder.glob("*.flac"))
    if not files:
        raise FileNotFoundError(f"no .flac files in {folder}; install sonic-pi-samples or pass another folder")
    for path in files:
        audio, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if rate != SAMPLE_RATE or not np.abs(audio).max() > 0:
            continue  # a set of one rate: all of Sonic Pi's samples are 44.1 kHz
        validation = hashlib.sha256(path.read_bytes()).digest()[0] < 51  # one in five
        yield Draft(
            id=f"sample-{path.stem}",
            captions=(),
            kind="sample",
            label="sample",
            instrument=None,
            midi=None,
            split="validation" if validation else "train",
            licence=SAMPLES_LICENCE,
            source=hash_file(path),
            audio=_finish(audio.mean(axis=1), seed, path.stem),
        )


def render_demo_set(
    folder: Path,
    *,
    seed: int,
    font: Path | None,
    samples_folder: Path | None,
    progress: Callable[[Iterable[Draft]], Iterable[Draft]] = iter,
    overwrite: bool = False,
) -> ClipSet:
    """Render the demo set into a cache folder (see clip_cache.py) and open it; every clip passes ``progress``.

    ``font`` None: only what numpy synthesises (drums and noises). ``samples_folder`` None: no extra one-shots. Raises
    FileNotFoundError when fluidsynth, the font or the samples are missing, RuntimeError when rendering fails,
    ValueError as ``check_place``.
    """
    check_place(folder, overwrite=overwrite)
    sources: list[Iterable[Draft]] = []
    if font is not None:
        licence = FONT_LICENCES.get(font.name, "")
        rendered = chain(notes(seed, font), chords(seed, font), kit_drums(seed, font))
        sources.append(replace(draft, licence=licence) for draft in rendered)
    sources.append(replace(draft, licence="none needed: synthesised") for draft in synthesised(seed))
    if samples_folder is not None:
        sources.append(samples(seed, samples_folder))
    drafts = list(progress(chain.from_iterable(sources)))
    about = {
        "recipe": "sa3_torch.train.sounds",  # the name under which caches were made first: hashes depend on it
        "seed": seed,
        "font": font.name if font else None,
        "font_sha256": hashlib.sha256(font.read_bytes()).hexdigest() if font else None,
        "samples": samples_folder is not None,
    }
    return write_clips(folder, drafts, channels=1, about=about, overwrite=overwrite)


def statistics(clips: ClipSet) -> str:
    """Return one line per label and split: clips and minutes."""
    count, length = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for clip in clips.clips:
        count[clip.label, clip.split] += 1
        length[clip.label, clip.split] += clip.samples
    lines = [
        f"{label:8} {split:10} {n:5} clips {length[label, split] / SAMPLE_RATE / 60:6.2f} min"
        for (label, split), n in sorted(count.items())
    ]
    return "\n".join([*lines, f"total {len(clips.clips)} clips, {len(clips.audio) / SAMPLE_RATE / 60:.1f} min"])


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True)
@click.option("--font", type=click.Path(path_type=Path), default=DEFAULT_FONT, show_default=True)
@click.option("--samples", "samples_folder", type=click.Path(path_type=Path), default=None, help="Folder of one-shots.")
def main(out: Path, seed: int, font: Path, samples_folder: Path | None) -> None:
    """Render the demo set into the cache folder OUT."""
    try:
        report(statistics(render_demo_set(out, seed=seed, font=font, samples_folder=samples_folder)))
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
