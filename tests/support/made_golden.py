"""Reference folders made with our own networks, for cases of ``sa3 verify`` that the official ones do not have."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sa3_convert import export_official

from sa3_mlx.common.files.safetensors import array_entry, write_tensors
from sa3_mlx.common.generation.events import Finished, Stepped
from sa3_mlx.common.generation.noise import INITIAL, NoiseStream, noise
from sa3_mlx.common.generation.plan import plan
from sa3_mlx.common.generation.request import Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Sampling
from tests.support.twins import Twin


def write_golden(
    folder: Path, checkpoint: Path, area: str, cases: dict[str, dict[str, Any]], tensors: dict[str, np.ndarray]
) -> Path:
    """Write a folder of one area; the names of ``tensors`` begin with that of their case."""
    export_official(checkpoint, folder, force=False)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    write_tensors(
        folder / f"{area}.safetensors", [array_entry(name, np.array(array)) for name, array in tensors.items()], {}
    )
    manifest = {"cases": {f"{area}:{name}": entry for name, entry in cases.items()}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def record_run(
    twin: Twin, checkpoint: Path, case: str, *, prompt: str, seconds: float, steps: int, head_room: float, frames: int
) -> dict[str, np.ndarray]:
    """Run a pingpong model whose longest clip has so many frames, and keep what an official run keeps."""
    pipeline, config = twin.pipeline(checkpoint), ModelConfig.load(checkpoint)
    pipeline.config = replace(config, diffusion=replace(config.require_diffusion(), max_frames=frames))
    sampling = Sampling(sampler="pingpong", steps=steps)
    item = Item(prompt=prompt, seconds=seconds, seed=3)
    request = Request(items=(item,), sampling=sampling, head_room_seconds=head_room, crossfade_ms=None)
    planned, found = plan(request, pipeline.config), dict[str, np.ndarray]()

    def draw(_item: int, purpose: NoiseStream, frames: int, channels: int, start: int) -> np.ndarray:
        drawn = noise(item.seed, purpose, frames, channels, start=start)
        found[f"noise{0 if purpose == INITIAL else purpose.index + 1}"] = drawn.T[None]
        return drawn

    for event in pipeline.stream(request, noise=draw):
        if isinstance(event, Stepped):
            found[f"step{event.index}_denoised"] = twin.numpy(event.denoised).swapaxes(1, 2)
        elif isinstance(event, Finished):
            found["out"] = np.clip(event.generation.audio[0].T[None], -1, 1)
    ids, mask = (twin.array(array) for array in pipeline.tokenizer.encode([prompt]))
    encoder, conditioner = (twin.load(checkpoint, part) for part in ("text_encoder", "conditioner"))
    context, duration = conditioner(encoder(ids, mask), mask, np.array([seconds]))
    found |= {"in_cross_attn_cond": twin.numpy(context), "in_global_cond": twin.numpy(duration)}
    found |= {"sigmas": planned.sigmas, "padding_mask": planned.padding_mask.astype(np.uint8)}
    return {f"{case}.{name}": array for name, array in found.items()}
