"""Show what ping-pong sampling keeps of what was asked for, step by step: ``python -m benchmarks renoising``.

Ping-pong alternates between an estimate of the clean latents and new noise. A few-step model estimates in one step
(euler:1:1); a base model by its whole sampler (dpmpp:15:3:0), which is as exact as it can. So one sees what is lost
because the model is wrong, and what because noise is added again and again.

Shapes: B batch, T latent frames, C latent channels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.options import RENDERED
from sa3_mlx.cli.home import find_model
from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.generation.clips import local_input
from sa3_mlx.common.generation.events import SeededNoise, batch_of
from sa3_mlx.common.generation.noise import INITIAL, step
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.generation.schedule import sigmas
from sa3_mlx.common.model.presets import LOGSNR
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.schema import ConfigError
from sa3_torch.evaluate.judge.classifier import features
from sa3_torch.evaluate.judge.judge import Judge
from sa3_torch.evaluate.real import captioned
from sa3_torch.evaluate.run import SEEDS_APART
from sa3_torch.guidance import GuidedVelocity
from sa3_torch.pipeline import Pipeline
from sa3_torch.samplers import SAMPLERS
from sa3_torch.train.data.clip_cache import CachedClip, ClipSet


@torch.no_grad()
def estimates(pipeline: Pipeline, setting: Sampling, items: Sequence[Item], steps: int) -> Iterator[list[Tensor]]:
    """Sample from noise, then again and again from the own result with noise of the next lower level of ping-pong.

    Yields the valid latents (T, C) of every item, ``steps`` times; no autoencoder is in between. Raises ConfigError for
    a sampler that adds noise itself.
    """
    request = Request(items=tuple(items), sampling=setting)
    planned, noise = plan(request, pipeline.config), SeededNoise([item.seed for item in items])
    diffusion, channels = pipeline.config.require_diffusion(), pipeline.config.same.latent_channels
    cond, null = pipeline.encode_texts(request, planned)
    dit = pipeline.dit_with(())
    device, dtype = next(dit.parameters()).device, next(dit.parameters()).dtype
    local = torch.from_numpy(local_input(planned, None, channels)).to(device, dtype)
    cond = replace(cond, local=local)
    velocity = GuidedVelocity(
        dit=dit, cond=dit.prepare(cond), null=None if null is None else dit.prepare(null), guidance=setting.guidance
    )

    def at(x: Tensor, t: np.ndarray) -> Tensor:
        return velocity(x.to(dtype), t).float()

    def no_noise(index: int) -> Tensor:
        raise ConfigError(f"{setting} adds noise itself, in step {index}; choose euler:1:1, or a sampler of an ODE")

    x = torch.from_numpy(batch_of(noise, INITIAL, planned.padding_mask.shape, channels)).to(device)
    levels = sigmas(LOGSNR, steps, 1.0, [1])[0, :-1].tolist()
    for index, level in enumerate(levels):
        if index:
            fresh = torch.from_numpy(batch_of(noise, step(index - 1), planned.padding_mask.shape, channels)).to(device)
            x = (1 - level) * x + level * fresh
        schedule = sigmas(
            diffusion.shift, setting.steps, [level] * len(items), planned.lengths.effective, schedule="monotone"
        )
        for state in SAMPLERS[setting.sampler](at, x, schedule, no_noise):
            last = state.x
        x = last
        yield [z[:valid] for z, valid in zip(x, planned.lengths.valid, strict=True)]


def measure(
    pipeline: Pipeline,
    setting: Sampling,
    clips: Sequence[CachedClip],
    judge: Judge,
    *,
    steps: int,
    seeds: int,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Measure after every step the share of sounds of the class of their clip and the mean confidence of the pitch,
    which is 1 for a single steady note and lower for chords and noises. ``advance`` is called after every step."""
    heard, confidence = np.zeros((seeds, steps)), np.zeros((seeds, steps))
    for seed in range(seeds):
        items = [
            Item(prompt=clip.caption, seconds=clip.seconds, seed=SEEDS_APART * seed + number)
            for number, clip in enumerate(clips)
        ]
        for index, latents in enumerate(estimates(pipeline, setting, items, steps)):
            sounds = [
                features(pipeline.decode(z.cpu().numpy())[: clip.samples])
                for z, clip in zip(latents, clips, strict=True)
            ]
            labels = [judge.classifier.classify_features(sound).label for sound in sounds]
            heard[seed, index] = np.mean([label == clip.label for label, clip in zip(labels, clips, strict=True)])
            confidence[seed, index] = np.mean([sound[-3] for sound in sounds])
            advance()
    return {"heard": heard.mean(0).tolist(), "confidence": confidence.mean(0).tolist()}


def _entry(text: str) -> tuple[str, Sampling]:
    """Read MODEL@SETTING. Raises click.UsageError and ConfigError."""
    name, _, setting = text.rpartition("@")
    if not name:
        raise click.UsageError(f"{text!r}: expected MODEL@SAMPLER:STEPS:GUIDANCE[:APG] such as demo@dpmpp:15:3:0")
    return name, Sampling.parse(setting)


@click.command()
@click.argument("models", metavar="MODEL@SETTING...", nargs=-1, required=True)
@RENDERED
@click.option("--label", default="chord", show_default=True, help="Class of the held-out prompts.")
@click.option("--steps", type=click.IntRange(1), default=8, show_default=True, help="Of ping-pong sampling.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="Repetitions.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=None, help="JSON file to write, too.")
def renoising(models: tuple[str, ...], data: Path, label: str, steps: int, seeds: int, out: Path | None) -> None:
    """Show what ping-pong sampling keeps of held-out prompts, step by step (PyTorch).

    \b
    python -m benchmarks renoising posttrain/model@euler:1:1 demo@dpmpp:15:3:0 --data sounds
    """
    judge, clips, found = Judge(), ClipSet(data), []
    for name, setting in [_entry(text) for text in models]:
        text = f"{name}@{setting}"
        pipeline = Pipeline.load(find_model(name, generates=True).folder)
        chosen = [clip for clip in captioned(clips, pipeline.config, "validation") if clip.label == label]
        if not chosen:
            labels = sorted({clip.label for clip in clips.select("validation") if clip.captions})
            raise click.UsageError(f"--label {label}: no held-out clip of that class; there are {', '.join(labels)}")
        with tqdm(total=steps * seeds, desc=text, unit="step") as bar:
            row = measure(pipeline, setting, chosen, judge, steps=steps, seeds=seeds, advance=bar.update)
        found.append({"model": text, **row})
        click.echo(text)
        for title, values in row.items():
            click.echo(f"  {title:12}" + "".join(f"{value:7.2f}" for value in values))
    result = {"label": label, "clips": len(chosen), "steps": steps, "seeds": seeds, "rows": found}
    if out is not None:
        write_json(out, result)
    click.echo(json.dumps(result))
