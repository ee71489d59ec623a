"""How well a model that learns by flow matching predicts velocities of held-out latents [T4.9]."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from sa3_torch.train.run.random import step_generator

from .conditioning import Networks
from .latent_data import LatentData
from .masks import Masks
from .matching import FlowDraw, velocity_errors
from .wiener import FRAMES_MOST, WienerBaseline

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
VALIDATION_BATCHES = 2


class FlowValidation:
    """Measure ``networks`` on the first held-out batches, with fixed noise."""

    def __init__(self, networks: Networks, data: LatentData, seed: int) -> None:
        self.networks, self.data, self.seed = networks, data, seed

    def measure(self) -> dict[str, float]:
        """Return the error by time with nothing kept and independent noise; how much worse it gets with the captions of
        other items, and with none (neither prompt nor duration token); and, by the error of the best linear velocity of
        single frames, the ratio at the time where it is largest."""
        times, found = VALIDATION_TIMES, np.zeros((4, VALIDATION_BATCHES, len(VALIDATION_TIMES)))
        for index in range(VALIDATION_BATCHES):
            batch = self.data.validation.batch(index)
            random = step_generator(self.seed, index)
            noise = torch.randn(batch.latents.shape, generator=random)
            order = torch.randperm(len(batch.items), generator=random)
            other = replace(batch, ids=batch.ids[order], mask=batch.mask[order])
            masks = Masks.nothing_kept(batch.valid)
            for place, time in enumerate(times):
                known = batch.latents.numpy(), batch.valid.numpy(), noise.numpy()
                drawn = FlowDraw(batch=batch, t=torch.full((len(order),), time), masks=masks, noise=noise)
                without = replace(drawn, drop=torch.ones(len(order), dtype=torch.bool))
                found[:, index, place] = (
                    self._error(drawn),
                    self._error(replace(drawn, batch=other)),
                    self._error(without),
                    self.linear.errors(*known, time).mean(),
                )
        errors, shuffled, dropped, linear = found
        mean = float(np.mean(errors.mean(0)))
        return {
            "flow": mean,
            "shuffled_ratio": float(np.mean(shuffled)) / mean,
            "dropped_ratio": float(np.mean(dropped)) / mean,
            "wiener_ratio": float((errors.sum(0) / linear.sum(0)).max()),
            **{f"flow_t{time}": float(error) for time, error in zip(times, errors.mean(0), strict=True)},
        }

    def _error(self, drawn: FlowDraw) -> float:
        return float(velocity_errors(self.networks, drawn)[0].mean())

    @cached_property
    def linear(self) -> WienerBaseline:
        """Fit the baseline to the frames of evenly chosen training items."""
        items = [item for item in self.data.latents.items if item.split == "train"]
        every = max(1, sum(item.frames for item in items) // FRAMES_MOST)
        return WienerBaseline([self.data.latents.read(item).numpy() for item in items[::every]], "frame")
