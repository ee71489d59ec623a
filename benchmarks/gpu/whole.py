"""Measure whole runs on a GPU: are they right, how long do they take, and what does a step of training need?"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sa3_mlx.cli.models.verify import networks as verified
from sa3_mlx.cli.models.verify.golden import Golden
from sa3_mlx.cli.models.verify.twin import Twin
from sa3_mlx.common.generation.conditioning import Conditioning
from sa3_mlx.common.generation.request import InitAudio, Inpaint, Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_torch.choices import using
from sa3_torch.dit import DiT
from sa3_torch.pipeline import Pipeline

from .journal import Row, Workbench
from .networks import RandomPipeline, config_of, random_part


def correctness(bench: Workbench) -> Iterator[Row]:
    """The demo on the CPU in fp32 beside the device in every type; and the outputs of the official code, if given."""
    plain = Pipeline.load("demo", device="cpu", dtype="float32", text_dtype="float32")
    requests = _requests(plain.config, 2 if bench.short else 8)
    wanted = {name: plain.generate(request) for name, request in requests.items()}
    for dtype in ("float32",) if bench.short else ("float32", "float16", "bfloat16"):
        for graphs in ("plain", "captured"):
            pipeline = Pipeline.load("demo", device=str(bench.device), dtype=dtype, text_dtype="float32")
            for name, request in requests.items():
                with using({"graphs": graphs}):
                    found = [pipeline.generate(request) for _ in range(2 if bench.short else 3)]
                errors = [_relative(a, b) for a, b in zip(found[-1].latents, wanted[name].latents, strict=True)]
                same = all(np.array_equal(found[0].audio[0], other.audio[0]) for other in found)
                yield {"case": name, "dtype": dtype, "graphs": graphs, "latents": max(errors), "repeats": same}
    if bench.golden is not None:
        for model in ("tiny-s", "tiny-l"):
            yield from goldens(bench, bench.golden / model)


def _requests(config: ModelConfig, steps: int) -> dict[str, Request]:
    one = (Item(prompt="piano note A4", seconds=1.5, seed=1),)
    rate = config.sample_rate
    sound = np.random.default_rng(0).uniform(-0.3, 0.3, (2 * rate, config.audio_channels)).astype(np.float32)
    guided = Sampling(sampler="euler", steps=steps, guidance=Guidance(scale=3))
    plain = Request(items=one, sampling=Sampling(sampler="pingpong", steps=steps))
    lengths = tuple(Item(prompt="snare drum", seconds=seconds, seed=k) for k, seconds in enumerate((1.0, 1.7, 2.6)))
    return {
        "plain": plain,
        "guided": replace(plain, sampling=guided),
        "negative": replace(plain, sampling=guided, items=(replace(one[0], negative_prompt="white noise"),)),
        "inpaint": replace(plain, inpaint=Inpaint(audio=sound, regions=((0.3, 0.9),))),
        "init": replace(plain, init=InitAudio(audio=sound, noise_level=0.7)),
        "three lengths": replace(plain, items=lengths, sampling=guided),
    }


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted.astype(np.float64)))


class _DeviceTwin(Twin):
    """Run the networks of the PyTorch twin on a device."""

    device = torch.device("cpu")

    def array(self, values: np.ndarray) -> Tensor:
        """Put numpy values on the device."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def load(self, folder: Path, part: str, dtype: str | None = "float32") -> Any:
        """Load a network and move it."""
        return super().load(folder, part, dtype).to(self.device)


def goldens(bench: Workbench, given: Path) -> Iterator[Row]:
    """Compare networks of one golden model on the device in fp32: the worst case of every area."""
    folder = bench.folder / given.name
    command = [sys.executable, "-m", "sa3_mlx", "convert", str(given / "weights.safetensors"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    golden, twin = Golden.open(given), _DeviceTwin("torch")
    twin.__class__.device = bench.device
    for area in (verified.dit, verified.guidance, verified.same, verified.samplers):
        compared = [case for case in area(golden, twin, folder) if not case.skipped]
        worst = max(compared, key=lambda case: case.error / case.limit)
        yield {"golden": given.name, "area": area.__name__, "case": worst.case, "error": worst.error}


def latency(bench: Workbench) -> Iterator[Row]:
    """Whole generations without loading, 8 steps, with and without the six seconds of head-room."""
    graphs = {"graphs": "captured"}
    ways = {"plain": {}, "graphs": graphs}
    if not bench.short:
        ways["compiled, graphs"] = {"compiled_step": "compiled", "compiled_decoder": "compiled", **graphs}
    for name in ("small-music", "medium"):
        pipeline = RandomPipeline.of(name, bench)
        lengths = (5.0, 30.0, 120.0, 380.0) if not bench.short else (1.0,)
        for seconds in (length for length in lengths if length <= pipeline.config.max_seconds):
            for head_room in (None, 0.0):
                request = Request(
                    items=(Item(prompt="slow warm piano", seconds=seconds, seed=1),),
                    sampling=Sampling(sampler="pingpong", steps=2 if bench.short else 8),
                    head_room_seconds=head_room,
                )
                for label, way in ways.items():
                    with using(way):
                        for _ in range(2):
                            pipeline.generate(request)
                        took = bench.timed(partial(pipeline.generate, request))
                        stages = pipeline.generate(request).timings
                    row = {"model": name, "seconds": seconds, "head_room": head_room is None, "way": label, **took}
                    yield {**row, "stages_ms": {stage: 1e3 * value for stage, value in stages.items()}}
    if bench.official is not None:
        yield from _official(bench.official)


_OFFICIAL = """
import sys, time, json, torch
sys.path.insert(0, sys.argv[1])
from stable_audio_tools.models.factory import create_model_from_config
from stable_audio_tools.inference.generation import generate_diffusion_cond
for path in sys.argv[2:]:
    config = json.load(open(path))
    model = create_model_from_config(config).eval().cuda().half()
    for seconds in (5, 30, 120):
        def run():
            text = [{"prompt": "slow warm piano", "seconds_start": 0, "seconds_total": seconds}]
            size = seconds * config["sample_rate"] // 4096 * 4096
            generate_diffusion_cond(model, steps=8, conditioning=text, sample_size=size, device="cuda")
            torch.cuda.synchronize()
        run(); begun = time.perf_counter(); run()
        took = 1e3 * (time.perf_counter() - begun)
        print(json.dumps({"seconds": seconds, "ms": took, "config": path.split("/")[-1]}))
"""


def _official(checkout: Path) -> Iterator[Row]:
    """Time the official code with the model configurations that lie in its checkout, in a process of its own."""
    configs = sorted(map(str, checkout.rglob("model_config*.json")))
    command = [sys.executable, "-c", _OFFICIAL, str(checkout), *configs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    for line in done.stdout.splitlines():
        yield {"official": line}
    if done.returncode:
        yield {"official": "failed", "error": (done.stderr.strip().splitlines() or ["no reason"])[-1][:300]}


def training(bench: Workbench) -> Iterator[Row]:
    """Steps of the medium DiT at its longest clips, bf16 in autocast: with padding, masked or apart, or without;
    checkpointed or not, compiled."""
    config = config_of("medium", bench)
    assert config.diffusion is not None
    frames, batch = (6, 2) if bench.short else (4096, 2)
    dit = cast(DiT, random_part(config, "dit", bench.device, torch.float32)).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(dit.parameters(), fused=bench.device.type == "cuda")
    for label, padded, kept, compiled in (
        ("masked, checkpointed", True, False, False),
        ("apart, checkpointed", True, False, False),
        ("checkpointed", False, False, False),
        ("compiled, checkpointed", False, False, True),
        ("all kept", False, True, False),
    ):
        if compiled and bench.short:
            continue
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        unequal = "masked" if label.startswith("masked") else "apart"
        with using({"compiled_step": "compiled" if compiled else "plain", "unequal": unequal}):
            step = partial(_train_step, bench, config, dit, optimizer, frames, batch, padded, kept)
            took = bench.timed(step)
            busy = bench.busy(step)
        row: Row = {"step": label, "batch": batch, "frames": frames, **took, "per_second": 1e3 / took["ms"]}
        if bench.device.type == "cuda":
            row |= {"peak_bytes": torch.cuda.max_memory_allocated(bench.device)}
        yield row if busy is None else {**row, "gpu_waits": max(0.0, 1 - busy / took["ms"])}
    for name in ("foreach", "fused"):
        for parameter in dit.parameters():
            parameter.grad = torch.zeros_like(parameter)
        again = torch.optim.AdamW(dit.parameters(), foreach=name == "foreach", fused=name == "fused")
        yield {"step": f"AdamW, {name}", **bench.timed(again.step)}


@torch.enable_grad()
def _train_step(
    bench: Workbench,
    config: ModelConfig,
    dit: DiT,
    optimizer: torch.optim.Optimizer,
    frames: int,
    batch: int,
    padded: bool,
    kept: bool,
) -> None:
    assert config.diffusion is not None
    width, channels = config.diffusion.text_encoder.width, config.same.latent_channels
    device = bench.device
    valid = torch.arange(frames, device=device)[None].expand(batch, -1) < frames - 1 if padded else None
    cond = Conditioning(
        context=torch.randn(batch, 64, width, device=device),
        seconds=torch.randn(batch, width, device=device),
        local=torch.randn(batch, frames, 1 + channels, device=device),
        valid=valid,
    )
    x, target = (torch.randn(batch, frames, channels, device=device) for _ in range(2))
    time_of = torch.rand(batch, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        prepared = dit.prepare(cond)
        h, sequence = dit.begin(x, prepared)
        modulation = dit.modulation(time_of, prepared.seconds)
        final = len(dit.layers) - 1
        for k, (context, local) in enumerate(zip(prepared.contexts, prepared.local, strict=True)):
            given = (h, modulation, context, local, sequence, k == final)
            h = dit.layers[k](*given) if kept else checkpoint(dit.layers[k], *given, use_reentrant=False)
        velocity = dit.project_out(h)
    loss = (velocity.float() - target).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
