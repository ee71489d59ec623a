"""Train the judge's classifier, a network of one hidden layer, on the train split of the demo set.

Command: ``python -m sa3_torch.evaluate.judge.training CACHE [--out judge.npz]`` (a minute on one core). Every clip is
used as rendered and in damaged versions (dull, noisy, shortened, late), so that the classifier also works on the output
of small models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from sa3_mlx.common.terminal import show
from sa3_torch.train.data.clip_cache import SAMPLE_RATE, CachedClip, ClipSet
from sa3_torch.train.run.random import Purpose, generator

from .classifier import WEIGHTS, features
from .judge import Judge

HIDDEN = 40
VERSIONS = 4  # damaged versions of each clip
STEPS, BATCH, RATE, DECAY = 3000, 128, 2e-3, 2e-3


def class_name(clip: CachedClip) -> str:
    """Name the class of a clip: "note:piano", "kick"."""
    return f"{clip.label}:{clip.instrument}" if clip.instrument else clip.label


def damage(audio: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return a worse version (L,) of a clip (L, 1): half are low-passed, half noisy, some late, some cut short."""
    out = audio[:, 0].astype(np.float64)
    if rng.random() < 0.5:
        f = np.fft.rfftfreq(len(out), 1 / SAMPLE_RATE)
        cut = 2 ** rng.uniform(11.5, 14)  # 2.9 to 16 kHz
        out = np.fft.irfft(np.fft.rfft(out) / np.sqrt(1 + (f / cut) ** 2), len(out))
    if rng.random() < 0.5:
        out = out + 10 ** (rng.uniform(-65, -30) / 20) * np.abs(out).max() * rng.standard_normal(len(out))
    if rng.random() < 0.3:
        out = np.pad(out, (int(rng.integers(1, 2000)), 0))
    if rng.random() < 0.3 and len(out) > SAMPLE_RATE:
        out = out[: int(len(out) * rng.uniform(0.5, 1))]
    return out.astype(np.float32)


def table(clips: ClipSet, split: str, seed: int, classes: list[str]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return features (rows, F) and class numbers (rows,) of a split; the train split includes damaged versions."""
    rows, answers = [], []
    for index, clip in enumerate(clips.clips):
        if clip.split != split or clip.kind == "sample":
            continue
        audio = clips.read(clip)
        versions = [audio[:, 0]]
        if split == "train":
            versions += [damage(audio, generator(seed, Purpose.JUDGE_DAMAGE, index, v)) for v in range(VERSIONS)]
        rows += [features(version) for version in versions]
        answers += [classes.index(class_name(clip))] * len(versions)
    return np.stack(rows), np.array(answers)


def train(
    x: NDArray[np.float32], y: NDArray[np.int64], classes: int, seed: int, hidden: int = HIDDEN
) -> list[NDArray[np.float32]]:
    """Return [w1, b1, w2, b2] after AdamW on the cross entropy of x (rows, F), classes drawn equally often."""
    rng = generator(seed, Purpose.JUDGE_TRAINING)
    first = rng.standard_normal((x.shape[1], hidden)) * np.sqrt(2 / x.shape[1])
    second = rng.standard_normal((hidden, classes)) * np.sqrt(1 / hidden)
    weights = [torch.from_numpy(w) for w in (first, np.zeros(hidden), second, np.zeros(classes))]
    w1, b1, w2, b2 = (w.requires_grad_() for w in weights)
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=DECAY)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    chance = 1 / np.bincount(y, minlength=classes)[y]
    chance /= chance.sum()
    for _ in range(STEPS):
        pick = rng.choice(len(x), size=BATCH, p=chance)
        batch = torch.from_numpy(x[pick] + 0.1 * rng.standard_normal((BATCH, x.shape[1])))
        loss = F.cross_entropy((batch @ w1 + b1).relu() @ w2 + b2, torch.from_numpy(y[pick]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
    return [w.detach().numpy().astype(np.float32) for w in weights]


def train_classifier(sets: Sequence[ClipSet], out: Path, seed: int) -> None:
    """Write the weights of a classifier of all sounds in ``sets``; imported recordings are one class, "user"."""
    classes = sorted({class_name(clip) for clips in sets for clip in clips.clips if clip.kind != "sample"})
    tables = [table(clips, "train", seed, classes) for clips in sets]
    x, y = (np.concatenate(columns) for columns in zip(*tables, strict=True))
    mean, scale = x.mean(axis=0), x.std(axis=0) + 0.05
    w1, b1, w2, b2 = train((x - mean) / scale, y, len(classes), seed)
    w1, w2 = w1.astype(np.float16), w2.astype(np.float16)
    np.savez_compressed(out, classes=np.array(classes), mean=mean, scale=scale, w1=w1, b1=b1, w2=w2, b2=b2)


@click.command()
@click.argument("cache", type=click.Path(path_type=Path, exists=True))
@click.option("--out", type=click.Path(path_type=Path), default=WEIGHTS, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(cache: Path, out: Path, seed: int) -> None:
    """Train the classifier on the demo set in CACHE and print its accuracy on the validation clips."""
    clips = ClipSet(cache)
    train_classifier([clips], out, seed)
    held_out = [(clips.read(clip), clip) for clip in clips.select("validation") if clip.kind != "sample"]
    for key, value in Judge(out).evaluate(held_out).items():
        show(f"{key}: {value}")


if __name__ == "__main__":
    main()
