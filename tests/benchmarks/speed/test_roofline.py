"""The FLOPs counted from a configuration are those of the executed graph, at tiny and at real sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from benchmarks.speed import roofline
from sa3_mlx.common.chips import Chip
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from tests.support.tiny import TINY

torch = pytest.importorskip("torch")
CONFIGS = {name: PRESETS[name] for name in ("small-music", "medium", "first")} | TINY


def _executed(run: Callable[[], object]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


@cache
def _part(config: ModelConfig, part: str):
    from sa3_torch.weights import build_part

    with torch.device("meta"):  # shapes alone: nothing is computed, whatever the size
        return build_part(config, part)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frames", [13, 54])
def test_autoencoder(name: str, frames: int):
    config = CONFIGS[name]
    same, model = config.same, _part(config, "same")
    latents = torch.empty(1, frames, same.latent_channels, device="meta")
    assert _executed(lambda: model.decode(latents)) == roofline.decoder(frames, same, config.audio_channels).flops
    audio = torch.empty(1, frames * same.samples_per_latent, config.audio_channels, device="meta")
    assert _executed(lambda: model.encode(audio)) == roofline.encoder(frames, same, config.audio_channels).flops


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("frames", [7, 324])
def test_diffusion_transformer(name: str, frames: int):
    from sa3_torch.dit import Conditioning

    config = CONFIGS[name]
    diffusion, channels, context = config.diffusion, config.same.latent_channels, 11
    assert diffusion is not None
    dit, width = _part(config, "dit"), diffusion.text_encoder.width
    cond = Conditioning(
        context=torch.empty(1, context, width, device="meta"),
        seconds=torch.empty(1, width, device="meta"),
        local=torch.empty(1, 1, 1 + channels, device="meta"),
        valid=None,
    )
    prepared = dit.prepare(cond)
    assert _executed(lambda: dit.prepare(cond)) == roofline.prepare(context, 1, diffusion, channels).flops
    x, t = torch.empty(1, frames, channels, device="meta"), torch.empty(1, device="meta")
    counted = roofline.velocity(frames, context, diffusion, channels) + roofline.modulation(1, diffusion)
    assert _executed(lambda: dit(x, t, prepared)) == counted.flops


@pytest.mark.parametrize("name", CONFIGS)
def test_text_encoder(name: str):
    config, tokens = CONFIGS[name], 9
    assert config.diffusion is not None
    encoder = _part(config, "text_encoder")
    ids, mask = (torch.zeros(1, tokens, dtype=kind, device="meta") for kind in (torch.long, torch.bool))
    assert _executed(lambda: encoder(ids, mask)) == roofline.text_encoder(tokens, config.diffusion.text_encoder).flops


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_read_once(name: str):
    """The count of weights is that of the matrices of the checkpoint, each in its stage."""
    from sa3_mlx.common.model.checkpoint import expected_tensors

    config = CONFIGS[name]
    diffusion, same = config.diffusion, config.same
    assert diffusion is not None
    matrices = {
        tensor: shape[0] * shape[1]
        for tensor, shape in expected_tensors(config).items()
        if len(shape) == 2 and not tensor.endswith(("embed_tokens.weight", "memory_tokens"))
    }

    def of(prefix: str) -> int:
        return sum(size for tensor, size in matrices.items() if tensor.startswith(prefix))

    channels = same.latent_channels
    dit = roofline.prepare(5, 1, diffusion, channels) + roofline.modulation(1, diffusion)
    assert (dit + roofline.velocity(20, 5, diffusion, channels)).weights == of("dit.")
    assert roofline.decoder(20, same, config.audio_channels).weights == of("same.decoder.")
    assert roofline.encoder(20, same, config.audio_channels).weights == of("same.encoder.")
    assert roofline.text_encoder(5, diffusion.text_encoder).weights == of("text_encoder.")


def test_floors_of_the_published_sizes():
    """Against totals worked out by hand in another place: 8 steps of the reduced graph, 24 tokens (TFLOP)."""
    for name, seconds, tflop in (("small-music", 30, 3.06), ("medium", 30, 12.47), ("medium", 120, 49.11)):
        stages = roofline.stages(PRESETS[name], seconds, tokens=24, steps=8)
        flops = sum(stage.count.flops for stage in stages) / 1e12
        # ours has the head room of 6 s, prunes the last block and halves chunks: up to a fifth more on short clips
        assert 0.9 * tflop < flops < 1.25 * tflop, (name, seconds, flops)


def test_a_floor_is_the_longer_of_arithmetic_and_traffic():
    chip = next(chip for chip in Chip.load_all() if chip.name == "M5")
    count = roofline.linear(1000, 1000, 1000)
    stage = roofline.StageCount(name="x", count=count, width=4, precise=True)
    assert roofline.seconds_at_least(stage, chip, tf32=False) == max(2e9 / 4.0e12, 4 * 3e6 / 153.6e9)
    assert roofline.seconds_at_least(stage, chip, tf32=True) == max(2e9 / 8.1e12, 4 * 3e6 / 153.6e9)
    half = roofline.StageCount(name="x", count=count, width=2, precise=False)
    assert roofline.seconds_at_least(half, chip, tf32=False) == pytest.approx(2e9 / 16.2e12)


def test_every_chip_is_complete():
    names = [chip.name for chip in Chip.load_all()]
    assert {"M1", "M2", "M3", "M4", "M5", "H100", "H200"} <= set(names) and len(set(names)) == len(names)
    assert all(chip.source and chip.fp16 >= chip.fp32 for chip in Chip.load_all())
