"""Measure how well the networks beside an autoencoder do on held-out crops [T1.10].

Shapes: B crops, N audio samples, T latent frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from sa3_torch.train.autoencoder.metrics import r_squared
from sa3_torch.train.data.crops import AudioBatch, Crops
from sa3_torch.train.flow.times import truncated_logit_normal
from sa3_torch.train.run.random import Purpose, purpose_generator

from .regressors import Regressors, pitch_class
from .terms import Semantics

BATCH, CROPS = 16, 96  # of a comparison by the critic, and in all

Encode = Callable[[Tensor], Tensor]  # (B, N, channels) -> (B, T, C)


@torch.no_grad()
def measure_semantics(
    semantics: Semantics, encode: Encode, crops: Crops, pitches: Mapping[str, int | None]
) -> dict[str, float]:
    """Return measures of the networks that are on; ``pitches``: MIDI number by clip id, None for what has none.

    "alignment_of_zero": error of the velocity over that of predicting zero. "critic_accuracy": share of mismatched
    triples that score below the true one. "NAME_r2" by head; "pitch_class": share of crops of notes whose pitch class
    is that of the highest bin of all chroma heads together. Without variance, or notes, a measure is left out.
    """
    count = max(1, CROPS // crops.items)
    batches = [crops.batch(step) for step in range(count)]
    device = next(semantics.parameters()).device
    audio = [batch.audio.to(device) for batch in batches]
    latents = [encode(sound).float() for sound in audio]
    found: dict[str, float] = {}
    if semantics.config.alignment_weight:
        found |= _alignment(semantics, latents)
    if semantics.config.critic_weight:
        found["critic_accuracy"] = float(
            np.mean([_accuracy(semantics, *row) for row in zip(audio, latents, batches, strict=True)])
        )
    if semantics.config.regressors_weight:
        known = [pitches.get(name) for batch in batches for name in batch.ids]
        found |= _heads(semantics.regressors, audio, latents, known)
    return found


def _alignment(semantics: Semantics, latents: list[Tensor]) -> dict[str, float]:
    error = zero = 0.0
    for step, z in enumerate(latents):
        random = purpose_generator(semantics.seed, Purpose.SEMANTICS_HELD_OUT, step)
        t = truncated_logit_normal(torch.rand(len(z), generator=random, dtype=torch.float64))
        noise = torch.randn(z.shape, generator=random)
        terms = semantics.alignment.loss(z, t.to(z.device), noise.to(z.device), detach=True)
        error, zero = error + float(terms["alignment"]), zero + float(terms["alignment_zero"])
    return {"alignment_of_zero": error / zero}


def _accuracy(semantics: Semantics, audio: Tensor, z: Tensor, batch: AudioBatch) -> float:
    ids, mask = (x.to(z.device) for x in semantics.words.encode(batch.captions))
    same = torch.unique(ids, dim=0, return_inverse=True)[1]
    text = semantics.words(ids, mask)
    terms = semantics.critic.loss(audio, text, mask, z, same, None, rows=slice(None), detach=True)
    return float(terms["critic_accuracy"])


def _heads(
    regressors: Regressors, audio: list[Tensor], latents: list[Tensor], pitches: list[int | None]
) -> dict[str, float]:
    """Return the measures of the heads; ``pitches`` of all crops in order."""
    targets = [regressors.targets(sound, z.shape[1]) for sound, z in zip(audio, latents, strict=True)]
    outputs = [regressors(z) for z in latents]
    found: dict[str, float] = {}
    for name in outputs[0]:
        target, output = (torch.cat([row[name] for row in rows]).flatten(0, 1) for rows in (targets, outputs))
        share = r_squared(target.cpu().numpy(), output.float().cpu().numpy())
        if share is not None:
            found[f"{name}_r2"] = share
    chroma = torch.cat([torch.stack([row[name] for name in regressors.bands]).sum((0, 2)) for row in outputs])  # (B, n)
    found_classes = pitch_class(chroma.float()).tolist()
    right = [is_ == midi % 12 for is_, midi in zip(found_classes, pitches, strict=True) if midi is not None]
    return {**found, "pitch_class": float(np.mean(right))} if right else found
