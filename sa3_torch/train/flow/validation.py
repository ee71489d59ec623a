"""How well a model that learns by flow matching predicts velocities of held-out latents [T4.9].

Shapes: B items, T latent frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sa3_torch.train.run import parallel
from sa3_torch.train.run.random import Purpose, item_noise, step_generator

from .conditioning import Networks
from .latent_data import LatentData
from .masks import Masks
from .matching import FlowDraw, velocity_errors
from .path import interpolate
from .wiener import FRAMES_MOST, WienerBaseline

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
VALIDATION_BATCHES = 2


class FlowValidation:
    """Measure ``networks`` on the first held-out batches, with fixed noise."""

    def __init__(self, networks: Networks, data: LatentData, seed: int) -> None:
        self.networks, self.data, self.seed = networks, data, seed
        self._linear: Tensor | None = (
            None  # summed errors of the best linear velocity (batches, times): they never change
        )

    def measure(self, shares: Sequence[slice]) -> dict[str, float]:
        """Return the error by time with nothing kept and independent noise; how much worse it gets with the captions of
        other items, and with none (neither prompt nor duration token); and, by the error of the best linear velocity of
        single frames, the ratio at the time where it is largest.

        ``shares``: the rows of a batch that this process measures; all processes together have all of them.
        """
        times, count = VALIDATION_TIMES, self.data.validation.batch_size
        device = self.networks.device
        found = torch.zeros(3, VALIDATION_BATCHES, len(times), dtype=torch.float64, device=device)
        linear = torch.zeros(VALIDATION_BATCHES, len(times), dtype=torch.float64, device=device)
        for index in range(VALIDATION_BATCHES):
            order = torch.randperm(count, generator=step_generator(self.seed, index)).tolist()
            for rows in shares:
                drawn, other, noise = self._draw(index, rows, order)
                without = replace(drawn, drop=torch.ones(len(drawn.t), dtype=torch.bool))
                for place, time in enumerate(times):
                    for row, each in enumerate((drawn, other, without)):
                        found[row, index, place] += self._error(each, noise, time)
                    if self._linear is None:
                        linear[index, place] += self._linear_error(drawn, noise, time)
        if self._linear is None:
            self._linear = parallel.total(linear)
        errors, shuffled, dropped = (parallel.total(found) / count).cpu().numpy()
        mean = float(np.mean(errors.mean(0)))
        return {
            "flow": mean,
            "shuffled_ratio": float(np.mean(shuffled)) / mean,
            "dropped_ratio": float(np.mean(dropped)) / mean,
            "wiener_ratio": float((errors.sum(0) / (self._linear / count).sum(0).cpu().numpy()).max()),
            **{f"flow_t{time}": float(error) for time, error in zip(times, errors.mean(0), strict=True)},
        }

    def _draw(self, index: int, rows: slice, order: list[int]) -> tuple[FlowDraw, FlowDraw, Tensor]:
        """Return items of a batch, the same with the captions of others, and their noise (B, T, C)."""
        data, device = self.data.validation, self.networks.device
        batch, texts = data.batch(index, rows), data.plan(index).texts
        ids, mask = data.texts([texts[i] for i in order[rows]])
        noise = item_noise(rows, tuple(batch.latents.shape[1:]), self.seed, Purpose.HELD_OUT_NOISE, index, device)
        drawn = FlowDraw(batch=batch.to(device), t=torch.zeros(len(ids)), masks=Masks.nothing_kept(batch.valid))
        return drawn, replace(drawn, batch=replace(drawn.batch, ids=ids.to(device), mask=mask.to(device))), noise

    def _error(self, drawn: FlowDraw, noise: Tensor, time: float) -> Tensor:
        at = replace(drawn, t=torch.full_like(drawn.t, time))
        return velocity_errors(self.networks, at, noise)[0].double().sum()

    def _linear_error(self, drawn: FlowDraw, noise: Tensor, time: float) -> Tensor:
        """Return the error of ``linear`` as ``WienerBaseline.errors`` does, computed where the latents are."""
        frame, device = self.linear.frame, noise.device
        # what it does to each direction, as one matrix
        matrix = torch.from_numpy(frame.velocity(np.eye(len(frame.mean)) + (1 - time) * frame.mean, time) + frame.mean)
        z, eps, mean = drawn.batch.latents.double(), noise.double(), torch.from_numpy(frame.mean).to(device)
        with torch.autocast(device.type, enabled=False):
            velocity = (interpolate(z, eps, time) - (1 - time) * mean) @ matrix.to(device) - mean
        valid = drawn.masks.valid.to(device)
        return (((velocity - (eps - z)).square().mean(-1) * valid).sum(1) / valid.sum(1)).sum()

    @cached_property
    def linear(self) -> WienerBaseline:
        """Fit the baseline to the frames of evenly chosen training items."""
        items = [item for item in self.data.latents.items if item.split == "train"]
        every = max(1, sum(item.frames for item in items) // FRAMES_MOST)
        return WienerBaseline([self.data.latents.read(item).numpy() for item in items[::every]], "frame")
