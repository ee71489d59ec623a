"""Show a run of stage 0: sounds, and a picture of what its networks make of them [T1.7].

Shapes: B batch, N audio samples, T latent frames, C latent channels, F one-sided bins, K windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sa3_mlx.common.files.atomic import new_file
from sa3_torch.train.data.augment import chirp
from sa3_torch.train.data.clip_cache import Audio
from sa3_torch.train.run.logs import save_sound
from sa3_torch.train.run.random import Purpose, generator

from .adversary import Adversary
from .reconstruct import Reconstructor
from .semantics import Regressors, Semantics

DEMO_CLIPS = 6
SIZE, HOP = 512, 128  # of the spectra to which discriminators are sensitive
CHIRP_SEED = 7  # from 240 Hz up to 10.8 kHz


def save_demo(
    through: Reconstructor, semantics: Semantics | None, adversary: Adversary | None, path: Path, step: int
) -> None:
    """Write ``path`` (.wav), its spectrogram (.png), and beside it NAME-latents.png.

    Original and reconstruction of six held-out clips follow in turn, then those of a chirp, the same in every run. The
    picture shows, for the originals in turn: latents, targets and outputs of the heads, sensitivity of the
    discriminators.
    """
    held_out = through.clips.select("validation")
    chosen = held_out[:: max(1, len(held_out) // DEMO_CLIPS)][:DEMO_CLIPS]
    sounds = [through.audio(clip) for clip in chosen] + [
        chirp(generator(CHIRP_SEED, Purpose.DEMO_CHIRP), through.samples // 2)
    ]
    outputs = [through.again(sound) for sound in sounds]
    pieces = [piece for pair in zip(sounds, outputs, strict=True) for piece in pair]
    title = f"step {step}: original, reconstruction of {len(chosen)} clips and a chirp"
    save_sound(path, np.concatenate(pieces), through.sample_rate, title=title)

    latents = [through.latents(sound) for sound in sounds]
    rows = {"latents": _flat(latents)}
    if semantics is not None and semantics.config.regressors_weight:
        rows |= heads(semantics.regressors, sounds, latents)
    if adversary is not None:
        real, fake = (torch.from_numpy(np.concatenate(x))[None].to(through.device) for x in (sounds, outputs))
        rows["discriminators' sensitivity, log10"] = sensitivity(adversary, real, fake)[0].log10().cpu().numpy()
    draw_rows(path.with_name(f"{path.stem}-latents.png"), rows, title=f"step {step}: {len(chosen)} clips and a chirp")


def heads(regressors: Regressors, sounds: list[Audio], latents: list[Tensor]) -> dict[str, NDArray[np.float32]]:
    """Return targets and outputs of every head, (all T, n) each, for latents (1, T, C) of sounds (N, 2)."""
    targets = []
    for sound, z in zip(sounds, latents, strict=True):
        padded = np.pad(sound, ((0, max(0, regressors.config.size - len(sound))), (0, 0)))
        targets.append(regressors.targets(torch.from_numpy(padded)[None].to(z.device), z.shape[1]))
    outputs = [regressors(z.float()) for z in latents]
    found = {}
    for name in targets[0]:
        found[f"{name}, targets"] = _flat([row[name] for row in targets])
        found[f"{name}, outputs"] = _flat([row[name] for row in outputs])
    return found


@torch.enable_grad()
def sensitivity(adversary: Adversary, real: Tensor, fake: Tensor) -> Tensor:
    """Return the size of the gradient of the generator's adversarial term by the spectrum of decoded audio.

    (B, N, channels) each -> (B, K, F), the mean over channels. The input of the discriminators has no noise.
    """
    window = torch.hann_window(SIZE, device=fake.device)
    signals = fake.detach().float().transpose(1, 2).flatten(0, 1)
    spectrum = torch.stft(signals, SIZE, HOP, window=window, return_complex=True).requires_grad_()
    decoded = torch.istft(spectrum, SIZE, HOP, window=window, length=fake.shape[1])
    decoded = decoded.unflatten(0, (len(fake), -1)).transpose(1, 2)
    (gradient,) = torch.autograd.grad(adversary.generator_term(real.detach(), decoded), spectrum)
    return gradient.abs().unflatten(0, (len(fake), -1)).mean(1).transpose(1, 2).clamp_min(1e-12)


def draw_rows(path: Path, rows: Mapping[str, NDArray[np.float32]], *, title: str) -> None:
    """Draw a panel per row, an array (time, bins) of any length; all are as wide as the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.5 + 1.8 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)
    for panel, (name, values) in zip(axes.flat, rows.items(), strict=True):
        image = panel.imshow(values.T, aspect="auto", origin="lower", interpolation="nearest")
        figure.colorbar(image, ax=panel, pad=0.01)
        panel.set_title(name, fontsize=9)
        panel.set_xticks([])
    figure.suptitle(title)
    with new_file(path) as partial:
        figure.savefig(partial, dpi=80, format="png")


def _flat(values: list[Tensor]) -> NDArray[np.float32]:
    """Concatenate (1, T, n) -> (all T, n)."""
    return np.asarray(torch.cat([value[0] for value in values]).float().cpu().numpy(), dtype=np.float32)
