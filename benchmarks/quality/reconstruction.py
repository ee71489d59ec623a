"""How well an autoencoder gives held-out sounds back: metrics and the judge on reconstructions."""

from __future__ import annotations

from typing import Any

import numpy as np

from sa3_mlx.common.generation.pipeline import BasePipeline
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.judge.pitch import still_voiced
from sa3_torch.train.autoencoder.metrics import effective_rank, log_mel_l1, si_sdr, spectral_convergence
from sa3_torch.train.data.clip_cache import ClipSet


def measure(pipeline: BasePipeline[Any], clips: ClipSet, decoder: BasePipeline[Any] | None = None) -> dict[str, Any]:
    """Over all captioned validation clips; SI-SDR and spectral convergence are medians over notes and chords, the share
    of voiced frames that still are is a mean over notes.

    ``decoder``: another one that decodes the latents.
    """
    decode = (decoder or pipeline).decode
    pairs, tonal, voiced, latents, mel = [], [], [], [], []
    for clip in (clip for clip in clips.select("validation") if clip.captions):
        audio = np.repeat(clips.read(clip)[:, :1], 2, axis=1)
        z = pipeline.encode(audio)
        output = decode(z)[: len(audio)]
        pairs.append((output, clip))
        latents.append(z)
        mel.append(log_mel_l1(audio, output))
        if clip.kind in ("note", "chord"):
            tonal.append((si_sdr(audio, output), spectral_convergence(audio, output)))
        if clip.kind == "note" and (share := still_voiced(audio, output)) is not None:
            voiced.append(share)
    stacked = np.concatenate(latents)
    return {
        "si_sdr_tonal": float(np.median([a for a, _ in tonal])),
        "spectral_convergence_tonal": float(np.median([b for _, b in tonal])),
        "notes_still_voiced": float(np.mean(voiced)) if voiced else None,
        "log_mel_l1": float(np.mean(mel)),
        "effective_rank": effective_rank(stacked),
        "latent_std": float(stacked.std()),
        **Judge().evaluate(pairs),
    }
