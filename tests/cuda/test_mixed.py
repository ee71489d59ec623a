"""SAME in mixed precision: what is 16 bits, what stays fp32, and how far the sound is off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn

from sa3_mlx.common.model.presets import PRESETS
from sa3_torch import attention
from sa3_torch.choices import using
from sa3_torch.layers import HalfLinear, halve_products
from sa3_torch.same import SAME
from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import weight
from tests.support.twins import Twin, relative

RATE = 8000


def _pair(same: SAME, way: str, half: str, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Results in fp32 and in that way."""
    run = same.decode if half == "decoder" else same.encode
    with torch.no_grad():
        wanted = run(x).numpy()
        halve_products(same.get_submodule(half).get_submodule("layers"), torch.float16, wide=way == "products")
        return run(x).numpy(), wanted


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize(
    ("way", "bounds"),
    [
        ("products", {"decoder": 2.5e-3, "encoder": 1.6e-3}),  # measured 2.5e-4 (tiny-s), 4.9e-4; 2.5e-4, 3.2e-4
        ("float16", {"decoder": 3.4e-3, "encoder": 3.2e-3}),  # measured 4.4e-4, 6.8e-4; 4.8e-4, 6.4e-4
    ],
)
def test_a_sound_in_mixed_precision_stays_near(
    random_models: dict[str, Path], model: str, way: str, bounds: dict[str, float]
) -> None:
    for half, bound in bounds.items():
        same = Twin("torch").load(random_models[model], "same")
        shape = (1, 40, 16) if half == "decoder" else (1, 40 * 512, 2)
        x = torch.from_numpy(np.random.default_rng(1).standard_normal(shape, np.float32))
        found, wanted = _pair(same, way, half, x)
        assert found.dtype == np.float32
        error = relative(found, wanted)
        assert 1e-5 < error < bound


def test_products_and_attention_are_in_16_bits_and_nothing_else(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual that every block takes and gives, what activations take, and the maps beside each other."""
    pipeline = Twin("torch").pipeline(random_models["tiny-l"])
    seen: dict[str, set[torch.dtype]] = {"heads": set(), "residual": set(), "weights": set(), "ends": set()}
    real = attention._attend

    def watched(maps, v, mask):  # type: ignore[no-untyped-def]
        seen["heads"].add(v.dtype)
        return real(maps, v, mask)

    monkeypatch.setattr(attention, "_attend", watched)
    with using({"autoencoder": "float16"}):
        decoder = pipeline.autoencoder("decoder").decoder
        for block in decoder.layers:
            block.register_forward_hook(lambda _m, given, made: seen["residual"].update((given[0].dtype, made.dtype)))
        pipeline.decode(np.zeros((20, 16), np.float32))
    seen["weights"] = {layer.weight.dtype for layer in decoder.layers.modules() if isinstance(layer, HalfLinear)}
    seen["ends"] = {layer.weight.dtype for layer in (decoder.project_in, decoder.mapping)}
    assert seen == {
        "heads": {torch.float16},
        "residual": {torch.float32},
        "weights": {torch.float16},
        "ends": {torch.float32},
    }
    assert not any(type(module) is nn.Linear for module in decoder.layers.modules())


def test_another_way_reads_the_autoencoder_again(random_models: dict[str, Path]) -> None:
    """Rounded weights do not become fp32 by being asked to."""
    pipeline, latents = Twin("torch").pipeline(random_models["tiny-s"]), np.ones((9, 16), np.float32)
    wanted = pipeline.decode(latents)
    with using({"autoencoder": "float16"}):
        assert not np.array_equal(pipeline.decode(latents), wanted)
    np.testing.assert_array_equal(pipeline.decode(latents), wanted)


def test_a_bias_of_another_type_is_refused_on_a_gpu() -> None:
    q, bias = torch.zeros(1, 2, 3, 64, dtype=torch.float16, device="meta"), torch.zeros(1, 1, 1, 3, device="meta")
    with pytest.raises(ValueError, match=r"a bias of torch\.float32 for queries of torch\.float16"):
        attention.attend(q, q, q, bias)
    assert attention.attend(q, q, q, bias.half()).shape == (1, 3, 128)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "way", "bound"),
    [
        ("small-music", "products", 1e-3),
        ("medium", "products", 1.3e-2),
        ("small-music", "float16", 3e-3),
        ("medium", "float16", 1.3e-2),
    ],
)
def test_the_error_at_real_sizes(model: str, way: str, bound: float) -> None:
    """Random weights, 8 frames: measured 3.1e-4, 2.6e-3, 6.4e-4 and 3.9e-3."""
    config = PRESETS[model]
    with torch.device("meta"):
        same = SAME(config.same, config.audio_channels)
    state = {name: torch.from_numpy(weight(name, tuple(value.shape))) for name, value in same.state_dict().items()}
    same.load_state_dict(state, assign=True)
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 8, config.same.latent_channels), np.float32))
    found, wanted = _pair(same.requires_grad_(False), way, "decoder", z)
    assert 1e-5 < relative(found, wanted) < bound
