"""Train the networks of ``classifier.py`` on a cache of the set "music", and print the floors on its held-out clips.

``python -m sa3_torch.evaluate.judge.music.training CACHE [--through AUTOENCODER] [--out music.npz]``. Every clip is
used as it is, in a damaged version (dull, noisy, shortened, late) and as the autoencoder gives it back, so that the
networks know what small models make: without the last, they no longer know a third of the instruments behind one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sa3_mlx.common.measures.spectra import mono
from sa3_mlx.common.terminal import show
from sa3_torch.evaluate.judge.training import damage, train
from sa3_torch.pipeline import Pipeline
from sa3_torch.train.data.clip_cache import Audio, ClipSet
from sa3_torch.train.run.random import Purpose, generator

from .classifier import NETWORKS, WEIGHTS, class_of, describe
from .judge import MusicJudge, shares

HIDDEN = 96
VERSIONS = 1  # damaged versions of each clip
Rebuild = Callable[[Audio], Audio]  # audio (N, 2) -> what an autoencoder gives back of it (N, 2)


def table(
    clips: ClipSet, network: str, seed: int, rebuild: Rebuild | None = None
) -> tuple[NDArray[np.float32], list[str]]:
    """Return inputs (rows, F) and class names of all versions of the training clips that a network names."""
    rows, names = [], []
    for index, clip in enumerate(tqdm(clips.clips, desc=network, unit="clip", disable=None, delay=1)):
        named = class_of(clip)
        if clip.split != "train" or named is None or named[0] != network:
            continue
        audio = clips.read(clip)
        bpm = float(clip.fields.get("bpm", 120))
        versions = [mono(audio).astype(np.float32)]
        for version in range(VERSIONS):
            versions.append(damage(versions[0][:, None], generator(seed, Purpose.JUDGE_DAMAGE, index, version)))
        if rebuild is not None:
            versions.append(mono(rebuild(audio)).astype(np.float32))
        rows += [describe(each, network, bpm) for each in versions]
        names += [named[1]] * len(versions)
    return np.stack(rows), names


def through(autoencoder: Path) -> Rebuild:
    """Return what sends audio through an autoencoder, a folder with a model or only its autoencoder.

    Raises FileNotFoundError for a missing file, ValueError for one that does not fit.
    """
    pipeline = Pipeline.load(autoencoder)
    return lambda audio: pipeline.decode(pipeline.encode(audio))[: len(audio)]


def train_networks(clips: ClipSet, out: Path, seed: int, rebuild: Rebuild | None = None) -> None:
    """Write the weights of all networks to ``out``; ``rebuild`` gives one more version of every training clip."""
    made: dict[str, Any] = {}
    for network in NETWORKS:
        x, names = table(clips, network, seed, rebuild)
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
@click.option(
    "--through",
    "autoencoder",
    metavar="FOLDER",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="An autoencoder: learn every clip as it gives it back, too.",
)
@click.option("--out", type=click.Path(path_type=Path), default=WEIGHTS, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(cache: Path, autoencoder: Path | None, out: Path, seed: int) -> None:
    """Train the networks on the set in CACHE and print the judge's floors on its held-out clips, and behind the
    autoencoder."""
    clips = ClipSet(cache)
    rebuild = None if autoencoder is None else through(autoencoder)
    train_networks(clips, out, seed, rebuild)
    judge = MusicJudge(out)
    held_out = [(clip, clips.read(clip)) for clip in clips.select("validation")]
    for kind, found in shares((clip, judge.check(audio, clip)) for clip, audio in held_out).items():
        show(f"{kind}: {json.dumps(found)}")
    if rebuild is not None:
        for kind, found in shares((clip, judge.check(rebuild(audio), clip)) for clip, audio in held_out).items():
            show(f"{kind}, rebuilt: {json.dumps(found)}")


if __name__ == "__main__":
    main()
