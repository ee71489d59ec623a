"""Measure the flow-matching loss by timestep on held-out latents, beside the zero and the Wiener baseline [T12.4].

Noise is independent of the data, nothing is kept as context, every clip counts the same. Shapes: B batch, T latent
frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray

from sa3_torch.conditioner import Conditioner
from sa3_torch.dit import DiT
from sa3_torch.pipeline import Pipeline
from sa3_torch.t5gemma import T5GemmaEncoder
from sa3_torch.train.flow.conditioning import ConditionInputs, conditioning
from sa3_torch.train.flow.path import interpolate
from sa3_torch.train.flow.wiener import WienerBaseline
from sa3_torch.train.run.random import Purpose, generator

from .latent_clap import padded

Array = NDArray[np.float32]
Velocity = Callable[[Array, float], Array]  # states (B, T, C) and their time -> (B, T, C)

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)


class FlowModel(Protocol):
    """Give the velocity of a model for conditions.

    ``condition`` takes captions and seconds of B clips, valid (B, T), and whether the prompt is left out.
    """

    def condition(
        self, captions: Sequence[str], seconds: Sequence[float], valid: NDArray[np.bool_], *, dropped: bool
    ) -> Velocity: ...


@dataclass(frozen=True, kw_only=True)
class LatentClip:
    """Hold one held-out clip: latents (T, C), its caption and its full duration."""

    latents: Array
    caption: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class FlowLosses:
    """Hold mean squared errors of the velocity; the tuples go with ``times``.

    ``shuffled_ratio``: loss with captions of other clips to the loss; ``dropped_ratio``: without captions.
    """

    times: tuple[float, ...]
    loss: tuple[float, ...]
    zero: tuple[float, ...]
    wiener_frame: tuple[float, ...]
    wiener_clip: tuple[float, ...]
    shuffled_ratio: float | None  # None when all captions are the same
    dropped_ratio: float
    clips: int

    @property
    def wiener(self) -> tuple[float, ...]:
        """Return at each time the better of both linear estimates."""
        return tuple(map(min, self.wiener_frame, self.wiener_clip))

    @property
    def wiener_ratio(self) -> float:
        """Return the loss relative to the Wiener baseline at the time where that is highest: below 0.9 is wanted."""
        return max(a / b for a, b in zip(self.loss, self.wiener, strict=True))

    @property
    def zero_ratio(self) -> float:
        """Return the mean loss relative to that of predicting zero."""
        return float(np.mean(self.loss) / np.mean(self.zero))


class TorchFlow:
    """Run the diffusion model of a PyTorch pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.dit = cast(DiT, pipeline.load_part("dit"))

    @torch.no_grad()
    def condition(
        self, captions: Sequence[str], seconds: Sequence[float], valid: NDArray[np.bool_], *, dropped: bool
    ) -> Velocity:
        """Prepare a batch of conditions; see ``FlowModel``."""
        pipeline, weight = self.pipeline, next(self.dit.parameters())
        encoder = cast(T5GemmaEncoder, pipeline.load_part("text_encoder"))
        conditioner = cast(Conditioner, pipeline.load_part("conditioner"))
        ids, mask = (torch.from_numpy(x).to(weight.device) for x in pipeline.tokenizer.encode(list(captions)))
        inputs = ConditionInputs(
            hidden=encoder(ids.long(), mask),
            mask=mask,
            seconds=np.array(seconds),
            local=weight.new_zeros(len(captions), 1, pipeline.config.same.latent_channels + 1),
            valid=None if valid.all() else torch.from_numpy(valid).to(weight.device),
        )
        cond = conditioning(conditioner, inputs)
        assert cond.context is not None
        cond = replace(cond, context=cond.context.to(weight.dtype), seconds=cond.seconds.to(weight.dtype))
        prepared = self.dit.prepare(cond.unconditional() if dropped else cond)

        @torch.no_grad()
        def velocity(x: Array, t: float) -> Array:
            states = torch.from_numpy(x).to(weight.device, weight.dtype)
            found = self.dit(states, torch.full((len(x),), t, device=weight.device), prepared)
            return cast(Array, found.float().cpu().numpy())

        return velocity


def flow_losses(
    model: FlowModel,
    clips: Sequence[LatentClip],
    training: Sequence[Array],
    *,
    times: tuple[float, ...] = TIMES,
    seed: int = 0,
    batch: int = 32,
    advance: Callable[[int], None] = lambda _: None,
) -> FlowLosses:
    """Measure held-out ``clips``; ``training``: latents (T, C) to which the linear baselines are fitted.

    ``advance`` is called with the number of clips that are done. Raises ValueError without clips.
    """
    if not clips:
        raise ValueError("the flow-matching loss needs held-out latents with captions; there are none")
    baselines = [WienerBaseline(training, scope) for scope in ("frame", "clip")]
    names = ("loss", "zero", "frame", "clip", "shuffled", "dropped")
    sums = {name: np.zeros(len(times)) for name in names}
    order, shuffled = sorted(range(len(clips)), key=lambda i: len(clips[i].latents)), other_captions(clips, seed)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        z, valid = padded([clips[i].latents for i in rows])
        generators = [generator(seed, Purpose.FLOW_NOISE, i) for i in rows]
        noise = np.stack([random.standard_normal(z.shape[1:], np.float32) for random in generators])
        velocities = _velocities(model, [clips[i] for i in rows], [shuffled[i] for i in rows], valid)
        for place, t in enumerate(times):
            x = interpolate(z, noise, t).astype(np.float32)
            for name, velocity in velocities.items():
                sums[name][place] += _errors(velocity(x, t) - (noise - z), valid).sum()
            for name, baseline in zip(("frame", "clip"), baselines, strict=True):
                sums[name][place] += baseline.errors(z, valid, noise, t).sum()
        sums["zero"] += baselines[0].zero_errors(z, valid, noise).sum()
        advance(len(rows))
    mean = {name: tuple((values / len(clips)).tolist()) for name, values in sums.items()}
    different = len({clip.caption for clip in clips}) > 1
    return FlowLosses(
        times=times,
        loss=mean["loss"],
        zero=mean["zero"],
        wiener_frame=mean["frame"],
        wiener_clip=mean["clip"],
        shuffled_ratio=sum(mean["shuffled"]) / sum(mean["loss"]) if different else None,
        dropped_ratio=sum(mean["dropped"]) / sum(mean["loss"]),
        clips=len(clips),
    )


def _velocities(
    model: FlowModel, clips: Sequence[LatentClip], others: Sequence[str], valid: NDArray[np.bool_]
) -> dict[str, Velocity]:
    """Condition the model on the captions of clips, on ``others`` and on none."""
    captions, seconds = [clip.caption for clip in clips], [clip.seconds for clip in clips]
    return {
        "loss": model.condition(captions, seconds, valid, dropped=False),
        "shuffled": model.condition(others, seconds, valid, dropped=False),
        "dropped": model.condition(captions, seconds, valid, dropped=True),
    }


def other_captions(clips: Sequence[LatentClip], seed: int) -> list[str]:
    """Draw for every clip a caption of another one, as often as it occurs; its own if there is no other caption."""
    captions, rng = [clip.caption for clip in clips], generator(seed, Purpose.OTHER_CAPTIONS)
    found = []
    for caption in captions:
        others = [other for other in captions if other != caption] or [caption]
        found.append(others[int(rng.integers(len(others)))])
    return found


def _errors(wrong: Array, valid: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the mean square of (B, T, C) over each item's valid frames: (B,)."""
    squares = np.square(wrong.astype(np.float64)).mean(axis=2) * valid
    return np.asarray(squares.sum(axis=1) / valid.sum(axis=1))
