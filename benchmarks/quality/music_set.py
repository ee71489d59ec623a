"""Check a rendered set "music": ``python -m benchmarks music-set``.

How much there is of what, levels, stereo, what splits share, and what the judges by signal processing hear of what was
written: the floors of any model.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib
import numpy as np

from sa3_mlx.common.files.atomic import new_file
from sa3_mlx.common.measures.spectra import log_mel
from sa3_mlx.common.terminal import show
from sa3_torch.evaluate.judge.independent import BasicPitch, librosa_key, librosa_tempo
from sa3_torch.evaluate.judge.music.judge import FRAME, HIGHEST_HZ, LOWEST_HZ
from sa3_torch.evaluate.judge.music.tempo import TOLERANCE, keeps_tempo
from sa3_torch.evaluate.judge.music.tonality import chord_name, key_of
from sa3_torch.evaluate.judge.pitch import pitch_of
from sa3_torch.train.autoencoder.metrics import stereo_correlation
from sa3_torch.train.data.clip_cache import Audio, CachedClip, ClipSet
from sa3_torch.train.run.options import FOLDER

matplotlib.use("Agg")
import matplotlib.pyplot as plt

KINDS = ("note", "chord", "melody", "arpeggio", "bass", "loop", "music", "drum", "effect", "noise", "sample")
COLUMNS = 4


def kind_of(clip: CachedClip) -> str:
    """Return the kind, for lines which line."""
    return clip.label if clip.kind == "line" else clip.kind


def amounts(clips: ClipSet) -> dict[str, Any]:
    """Return hours and clips by split and kind, and how many captions and different ones there are."""
    hours: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for clip in clips.clips:
        for name in (clip.split, kind_of(clip)):
            hours[name] += clip.seconds / 3600
            counts[name] += 1
    captions = [text for clip in clips.clips for text in clip.captions]
    return {
        "hours": {name: round(value, 3) for name, value in hours.items()},
        "clips": dict(counts),
        "captions": len(captions),
        "different_captions": len(set(captions)),
    }


def digests(clips: ClipSet, split: str) -> Counter[str]:
    """Count the digests of the audio of a split."""
    return Counter(
        hashlib.sha256(clips.audio[c.offset : c.offset + c.samples].tobytes()).hexdigest() for c in clips.select(split)
    )


def sides(clips: ClipSet, test: ClipSet | None) -> dict[str, int]:
    """Return how many clips of equal audio there are in training, and how many each pair of splits shares."""
    every = {"train": digests(clips, "train"), "validation": digests(clips, "validation")}
    if test is not None:
        every["test"] = digests(test, "validation")
    names = list(every)
    shared = {f"{a}_{b}": len(every[a].keys() & every[b].keys()) for i, a in enumerate(names) for b in names[i + 1 :]}
    return {"equal_in_train": every["train"].total() - len(every["train"]), **shared}


def levels(clips: ClipSet, chosen: Sequence[CachedClip]) -> dict[str, Any]:
    """Return percentiles of peak and loudness in dB, by kind the median correlation of the channels."""
    peaks, rms, width = [], [], defaultdict(list)
    for clip in chosen:
        audio = clips.read(clip)
        peaks.append(20 * np.log10(float(np.abs(audio).max())))
        rms.append(10 * np.log10(float(np.square(audio).mean()) + 1e-12))
        width[kind_of(clip)].append(stereo_correlation(audio))
    return {
        "peak_db": np.percentile(peaks, [0, 50, 100]).round(1).tolist(),
        "rms_db": np.percentile(rms, [5, 50, 95]).round(1).tolist(),
        "correlation": {kind: round(float(np.median(found)), 3) for kind, found in width.items()},
    }


def heard(audio: Audio, clip: CachedClip, other_bpm: float) -> dict[str, bool]:
    """Return what of a clip's pitch, chord, tempo and key is heard, and whether the tempo of another clip is."""
    found = {}
    if clip.kind == "note" and clip.midi is not None:
        pitch = pitch_of(audio, lowest_hz=LOWEST_HZ, highest_hz=HIGHEST_HZ, frame=FRAME)
        found["pitch"] = pitch.confidence >= 0.3 and abs(pitch.midi - clip.midi) <= 0.5
    if clip.kind == "chord":
        name = chord_name(audio)
        found |= {"chord": name == clip.fields["chord"], "root": name.split()[0] == clip.fields["chord"].split()[0]}
    if "bpm" in clip.fields:
        bpm = float(clip.fields["bpm"])
        found["tempo"] = keeps_tempo(audio, bpm)
        if abs(other_bpm / bpm - 1) > 0.03:
            found["tempo_of_another"] = keeps_tempo(audio, other_bpm)
    if clip.kind in ("line", "music"):
        found["key"] = key_of(audio) == clip.fields["key"]
    return found


def floors(clips: ClipSet, chosen: Sequence[CachedClip]) -> dict[str, dict[str, float]]:
    """Return by kind the shares of what is heard right."""
    tempos = [float(clip.fields["bpm"]) for clip in chosen if "bpm" in clip.fields]
    others = np.random.default_rng(0).choice(tempos, len(chosen))
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for clip, other in zip(chosen, others, strict=True):
        for name, right in heard(clips.read(clip), clip, float(other)).items():
            found[kind_of(clip)][name].append(right)
    return {
        kind: {"clips": max(map(len, each.values()))} | {name: round(float(np.mean(v)), 3) for name, v in each.items()}
        for kind, each in found.items()
    }


def heard_by_others(clips: ClipSet, chosen: Sequence[CachedClip], most: int) -> dict[str, dict[str, float]]:
    """Return by kind what basic-pitch and librosa hear right of the first ``most`` clips of each.

    Raises ImportError or FileNotFoundError where they are missing.
    """
    basic_pitch = BasicPitch()
    found: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    counts: Counter[str] = Counter()
    for clip in chosen:
        kind = kind_of(clip)
        counts[kind] += 1
        if counts[kind] > most:
            continue
        audio, right = clips.read(clip), found[kind]
        if clip.kind == "note":
            right["basic_pitch_note"].append(basic_pitch.note(audio) == clip.midi)
        if clip.kind in ("line", "music"):
            right["basic_pitch_key"].append(basic_pitch.key(audio) == clip.fields["key"])
            right["librosa_key"].append(librosa_key(audio) == clip.fields["key"])
        if "bpm" in clip.fields:
            bpm = float(clip.fields["bpm"])
            ratio = librosa_tempo(audio, bpm) / bpm
            right["librosa_tempo"].append(abs(ratio - 1) <= TOLERANCE)
            right["librosa_tempo_or_octave"].append(any(abs(ratio / f - 1) <= TOLERANCE for f in (0.5, 1, 2)))
    return {
        kind: {"clips": max(map(len, each.values()))} | {name: round(float(np.mean(v)), 3) for name, v in each.items()}
        for kind, each in found.items()
        if each
    }


def draw_sheet(clips: ClipSet, path: Path) -> None:
    """Draw log-mel spectrograms of four clips of each kind."""
    rng = np.random.default_rng(0)
    kinds = [kind for kind in KINDS if any(kind_of(clip) == kind for clip in clips.clips)]
    figure, panels = plt.subplots(len(kinds), COLUMNS, figsize=(13, 1.45 * len(kinds)), squeeze=False)
    for row, kind in zip(panels, kinds, strict=True):
        having = [clip for clip in clips.clips if kind_of(clip) == kind]
        for panel, i in zip(row, rng.choice(len(having), COLUMNS), strict=True):
            clip = having[i]
            extent = (0, clip.seconds, 0, 80)
            panel.imshow(
                log_mel(clips.read(clip)).T,
                origin="lower",
                aspect="auto",
                vmin=-5,
                vmax=-0.5,
                extent=extent,
                cmap="magma",
            )
            panel.set_title(clip.caption[:46], fontsize=7)
            panel.set_yticks([])
            panel.tick_params(labelsize=6)
    figure.tight_layout()
    with new_file(path) as partial:
        figure.savefig(partial, dpi=60, format="png")
    plt.close(figure)


@click.command()
@click.argument("cache", type=FOLDER)
@click.option("--test", "test_cache", type=FOLDER, default=None, help="The test clips: only compared, not listened to.")
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), default=None, help="PNG to draw.")
@click.option(
    "--independent", type=click.IntRange(0), default=0, help="Clips of each kind for basic-pitch and librosa."
)
def music_set(cache: Path, test_cache: Path | None, picture: Path | None, independent: int) -> None:
    """Check the set "music" in CACHE: amounts, levels, stereo, shared clips, and what is heard of what was written."""
    clips = ClipSet(cache)
    held_out = clips.select("validation")
    found = {
        **amounts(clips),
        "sides": sides(clips, ClipSet(test_cache) if test_cache is not None else None),
        **levels(clips, held_out),
        "floors": floors(clips, held_out),
    }
    if independent:
        found["independent"] = heard_by_others(clips, held_out, independent)
    if picture is not None:
        draw_sheet(clips, picture)
    for name, value in found.items():
        show(f"{name}: {json.dumps(value)}")
    show(json.dumps(found))
