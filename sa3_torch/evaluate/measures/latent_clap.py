"""Measure whether sounds match their prompts, by a CLAP on latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sa3_torch.train.clap.network import LatentClap
from sa3_torch.train.run.random import Purpose, generator

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class ClapAdherence:
    """Hold mean cosines of sounds with their own prompt and with another one, None if all have the same prompt.

    ``first``: the share of sounds whose own prompt is the nearest of all ``prompts``. ``own_of`` and ``first_of`` are
    their values for every sound.
    """

    own: float
    other: float | None
    first: float
    prompts: int
    own_of: tuple[float, ...]
    first_of: tuple[bool, ...]


@torch.no_grad()
def clap_adherence(
    clap: LatentClap, latents: Sequence[NDArray[np.float32]], prompts: Sequence[str], *, seed: int = 0
) -> ClapAdherence:
    """Measure clean latents (T, C), one a sound, beside their prompts. Raises ValueError for other counts, or none."""
    if not latents or len(latents) != len(prompts):
        raise ValueError(f"{len(latents)} latents and {len(prompts)} prompts: expected as many, and at least one")
    names = sorted(set(prompts))
    text = clap.embed_text(*clap.encode(names)).double().cpu().numpy()
    parts = [_embed(clap, latents[i : i + _BATCH]) for i in range(0, len(latents), _BATCH)]
    audio = np.concatenate(parts)  # (sounds, E)
    cosine = audio @ text.T
    own = np.array([names.index(prompt) for prompt in prompts])
    rows, rng = np.arange(len(own)), generator(seed, Purpose.OTHER_TEXTS)
    other = None
    if len(names) > 1:
        other = float(cosine[rows, (own + rng.integers(1, len(names), len(own))) % len(names)].mean())
    nearest = cosine.argmax(axis=1) == own
    return ClapAdherence(
        own=float(cosine[rows, own].mean()),
        other=other,
        first=float(nearest.mean()),
        prompts=len(names),
        own_of=tuple(cosine[rows, own].tolist()),
        first_of=tuple(nearest.tolist()),
    )


def _embed(clap: LatentClap, latents: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    z, valid = padded(latents)
    found = clap.embed_audio(torch.from_numpy(z), torch.from_numpy(valid), torch.zeros(len(z)))
    return np.asarray(found.double().cpu().numpy())


def padded(latents: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Pad latents (T, C) of several lengths with zeros at the end -> (B, T, C), valid (B, T)."""
    frames = max(len(z) for z in latents)
    z = np.stack([np.pad(clip, ((0, frames - len(clip)), (0, 0))) for clip in latents])
    return z, np.arange(frames)[None] < np.array([len(clip) for clip in latents])[:, None]
