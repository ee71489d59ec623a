"""Make a sound that the demo model does not know, to teach it: bells, ``python -m benchmarks bells``.

The recipe of Chowning, The Synthesis of Complex Audio Spectra by Means of Frequency Modulation (1973): a modulator at
1.4 times the carrier, whose index falls with the amplitude, so that an inharmonic strike fades to a sine.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import soundfile

from sa3_torch.train.data.clip_cache import SAMPLE_RATE, Audio
from sa3_torch.train.demo_set.sounds import note_name
from sa3_torch.train.run.random import Purpose, generator

RATIO = 1.4
PITCHES = range(48, 72)  # the octaves that the demo's words name
HELD_OUT = (50, 55, 60, 65, 70)
SECONDS = 1.5


def caption(midi: int) -> str:
    """Name a bell as the demo's prompts name notes."""
    return f"bell note {note_name(midi)}"


def bell(midi: int, rng: np.random.Generator) -> Audio:
    """Make one strike, (1.5 s, 1) at 44.1 kHz with a peak of 0.5 to 0.8; index 4 to 8, decay 0.5 to 0.9 s."""
    t = np.arange(int(SECONDS * SAMPLE_RATE)) / SAMPLE_RATE
    hz = 440 * 2 ** ((midi - 69) / 12)
    fall = np.exp(-t / rng.uniform(0.5, 0.9))
    modulator = rng.uniform(4, 8) * fall * np.sin(2 * np.pi * RATIO * hz * t)
    strike = np.minimum(1, t / 0.002) * fall * np.sin(2 * np.pi * hz * t + modulator)
    strike *= np.minimum(1, (SECONDS - t) / 0.05)  # no click where it is cut
    return np.asarray(rng.uniform(0.5, 0.8) * strike / np.abs(strike).max(), dtype=np.float32)[:, None]


@click.command()
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--strikes", type=click.IntRange(1), default=8, show_default=True, help="Of every pitch.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def bells(out: Path, strikes: int, seed: int) -> None:
    """Write bells with captions to OUT, for `sa3 data import`, and prompts: of taught pitches, and of unseen ones."""
    out.mkdir(parents=True, exist_ok=True)
    taught = sorted(set(PITCHES) - set(HELD_OUT))
    for midi in taught:
        for number in range(strikes):
            name = f"bell-{midi}-{number}"
            soundfile.write(out / f"{name}.wav", bell(midi, generator(seed, Purpose.BELL, midi, number)), SAMPLE_RATE)
            (out / f"{name}.txt").write_text(caption(midi) + "\n", encoding="utf-8")
    for name, pitches in (("taught", taught[::3]), ("unseen", HELD_OUT)):
        lines = "".join(f"{SECONDS:g} {caption(midi)}\n" for midi in pitches)
        (out / f"{name}.txt").write_text(lines, encoding="utf-8")
    click.echo(f"{strikes * len(taught)} bells in {out}; next: sa3 data import {out} SET")
