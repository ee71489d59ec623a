"""Train the networks of ``classifier.py`` on a cache of the set "music", and print the floors on its held-out clips.

``python -m sa3_torch.evaluate.judge.music.training CACHE [--out music.npz]``. Every clip is used as it is and in a
damaged version (dull, noisy, shortened, late), so that the networks also work on the output of small models.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.measures.spectra import mono
from sa3_mlx.common.terminal import show
from sa3_torch.evaluate.judge.training import damage, train
from sa3_torch.train.data.clip_cache import ClipSet
from sa3_torch.train.run.random import Purpose, generator

from .classifier import NETWORKS, WEIGHTS, class_of, describe
from .judge import MusicJudge, shares

HIDDEN = 96
VERSIONS = 1  # damaged versions of each clip


def table(clips: ClipSet, network: str, seed: int) -> tuple[NDArray[np.float32], list[str]]:
    """Return inputs (rows, F) and class names of the training clips that a network names, damaged ones among them."""
    rows, names = [], []
    for index, clip in enumerate(clips.clips):
        named = class_of(clip)
        if clip.split != "train" or named is None or named[0] != network:
            continue
        audio = mono(clips.read(clip)).astype(np.float32)
        bpm = float(clip.fields.get("bpm", 120))
        versions = [audio]
        for version in range(VERSIONS):
            versions.append(damage(audio[:, None], generator(seed, Purpose.JUDGE_DAMAGE, index, version)))
        rows += [describe(each, network, bpm) for each in versions]
        names += [named[1]] * len(versions)
    return np.stack(rows), names


def train_networks(clips: ClipSet, out: Path, seed: int) -> None:
    """Write the weights of all networks."""
    made: dict[str, Any] = {}
    for network in NETWORKS:
        x, names = table(clips, network, seed)
        classes = sorted(set(names))
        mean, scale = x.mean(axis=0), x.std(axis=0) + 0.05
        y = np.array([classes.index(name) for name in names])
        w1, b1, w2, b2 = train((x - mean) / scale, y, len(classes), seed, HIDDEN)
        parts = {"mean": mean, "scale": scale, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
        made |= {f"{network}_{name}": value.astype(np.float16) for name, value in parts.items()}
        made[f"{network}_classes"] = np.array(classes)
    np.savez_compressed(out, allow_pickle=False, **made)


@click.command()
@click.argument("cache", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), default=WEIGHTS, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(cache: Path, out: Path, seed: int) -> None:
    """Train the networks on the set in CACHE and print the judge's floors on its held-out clips."""
    clips = ClipSet(cache)
    train_networks(clips, out, seed)
    judge = MusicJudge(out)
    for kind, found in shares(
        (clip, judge.check(clips.read(clip), clip)) for clip in clips.select("validation")
    ).items():
        show(f"{kind}: {json.dumps(found)}")


if __name__ == "__main__":
    main()
