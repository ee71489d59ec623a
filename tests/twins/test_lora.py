"""Adapters in both twins: every type, merged and unmerged, stacked, on quantized bases, in a part of the times."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sa3_mlx.common.adapters.applied import Applied, prepare_adapters
from sa3_mlx.common.adapters.config import ADAPTER_TYPES, AdapterType
from sa3_mlx.common.adapters.format import Adapter
from sa3_mlx.common.generation.request import Item, Request, Residency
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Guidance, Sampling
from sa3_mlx.common.quant.format import Grid
from sa3_mlx.common.quant.recipes import layers_of
from sa3_mlx.common.quant.writer import nearest, write_quantized
from tests.support.adapters import adapter_config, info_of, layer_tensors, oracle, random_adapter
from tests.support.twins import Twin, relative

LAYER = "dit.layers.0.ff.proj_in"
RANDOM = np.random.default_rng(3)
WEIGHT = (0.1 * RANDOM.standard_normal((40, 24))).astype(np.float32)
ITEMS = (Item(prompt="low kick", seconds=0.4, seed=1), Item(prompt="bell", seconds=0.7, seed=2))
REQUEST = Request(
    items=ITEMS, sampling=Sampling(sampler="pingpong", steps=3, guidance=Guidance(scale=2.0)), head_room_seconds=0.0
)


def one_layer(kind: AdapterType, seed: int = 0, trained: float = 1.0) -> Adapter:
    config = adapter_config(kind)
    tensors = layer_tensors(config, WEIGHT, np.random.default_rng(seed), trained=trained)
    return Adapter(info=info_of(config), layers={LAYER: tensors})


def adapted_layer(twin: Twin, adapters: list[Applied], *, bias: bool = True) -> tuple[Any, Any]:
    """A layer of WEIGHT with and without the adapters."""
    nn: Any
    if twin.name == "torch":
        import torch.nn as nn
    else:
        import mlx.nn as nn
    base = nn.Linear(24, 40, bias=bias)
    base.weight = nn.Parameter(twin.array(WEIGHT)) if twin.name == "torch" else twin.array(WEIGHT)
    updates, _ = twin.module("lora").updates_of(LAYER, twin.array(WEIGHT), adapters)
    return base, twin.module("lora").AdaptedLinear(base, updates)


def latents(
    twin: Twin, folder: Path, *adapters: Applied, merged: bool = False, request: Request = REQUEST
) -> np.ndarray:
    return np.concatenate(twin.pipeline(folder, adapters=adapters, merged=merged).generate(request).latents)


@pytest.fixture(scope="module")
def folder(random_models: dict[str, Path]) -> Path:
    return random_models["tiny-l"]


@pytest.fixture(scope="module")
def quantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every second layer that can be has 4 bits."""
    out = tmp_path_factory.mktemp("quantized") / "tiny"
    grids = dict.fromkeys(list(layers_of(ModelConfig.load(folder), "dit"))[::2], Grid(bits=4, group=32))
    quantizers = {path: partial(nearest, grid=grid) for path, grid in grids.items()}
    write_quantized(folder, out, recipe="test", grids=grids, quantizers=quantizers, velocity=None, force=False)
    return out


# --- one layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.5, -0.7])
@pytest.mark.parametrize("kind", ADAPTER_TYPES)
def test_weight_is_that_of_the_table(twin: Twin, kind: AdapterType, strength: float) -> None:
    adapter = one_layer(kind)
    found = twin.module("lora").merged_weight(LAYER, WEIGHT, [Applied(adapter=adapter, strength=strength)])
    wanted = oracle(WEIGHT, adapter.config, adapter.layers[LAYER], strength)
    assert relative(found, wanted) < 2e-6  # measured 2e-7
    assert relative(found, WEIGHT) > 0.05


@pytest.mark.parametrize("kind", ADAPTER_TYPES)
def test_untrained_adapter_is_the_identity(twin: Twin, kind: AdapterType) -> None:
    found = twin.module("lora").merged_weight(LAYER, WEIGHT, [Applied(adapter=one_layer(kind, trained=0.0))])
    assert relative(found, WEIGHT) < 1e-6


@pytest.mark.parametrize("kind", ADAPTER_TYPES)
def test_strength_zero_is_exact(twin: Twin, kind: AdapterType) -> None:
    found = twin.module("lora").merged_weight(LAYER, WEIGHT, [Applied(adapter=one_layer(kind), strength=0.0)])
    np.testing.assert_array_equal(found, WEIGHT)


@pytest.mark.parametrize("kind", ADAPTER_TYPES)
def test_unmerged_layer_equals_the_merged_one(twin: Twin, kind: AdapterType) -> None:
    """Two adapters on one layer, the second on top of the first."""
    adapters = [Applied(adapter=one_layer(kind, 1)), Applied(adapter=one_layer("bora", 2), strength=0.6)]
    base, layer = adapted_layer(twin, adapters)
    weight = WEIGHT
    for applied in adapters:
        tensors = applied.adapter.layers[LAYER]
        weight = oracle(weight, applied.adapter.config, tensors, applied.strength)
    x = RANDOM.standard_normal((2, 5, 24)).astype(np.float32)
    wanted = x @ weight.T + twin.numpy(base.bias)
    assert relative(twin.numpy(layer(twin.array(x))), wanted) < 1e-5  # measured 3e-7


def test_stacked_adapters_commute_for_plain_lora_alone(twin: Twin) -> None:
    merged = twin.module("lora").merged_weight

    def both_orders(kind: AdapterType) -> float:
        pair = [Applied(adapter=one_layer(kind, 1)), Applied(adapter=one_layer(kind, 2), strength=0.5)]
        return relative(merged(LAYER, WEIGHT, pair), merged(LAYER, WEIGHT, pair[::-1]))

    assert both_orders("lora") < 1e-6
    assert both_orders("lora-xs") < 1e-6
    assert all(both_orders(kind) > 1e-3 for kind in ("dora-rows", "dora-cols", "bora"))


@pytest.mark.parametrize("kind", ["lora", "dora-rows"])
def test_equals_peft(kind: AdapterType) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    adapter = one_layer(kind)
    tensors = {name: torch.from_numpy(values) for name, values in adapter.layers[LAYER].items()}
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=False))
    model[0].weight.data = torch.from_numpy(WEIGHT)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"], use_dora=kind == "dora-rows")
    layer = peft.get_peft_model(model, config).base_model.model[0]
    layer.lora_A["default"].weight.data = tensors["lora_A"]
    layer.lora_B["default"].weight.data = tensors["lora_B"]
    if kind == "dora-rows":
        layer.lora_magnitude_vector["default"].weight.data = tensors["magnitude"]
    x = torch.from_numpy(RANDOM.standard_normal((5, 24)).astype(np.float32))
    _, ours = adapted_layer(Twin("torch"), [Applied(adapter=adapter)], bias=False)
    assert relative(ours(x).detach().numpy(), layer(x).detach().numpy()) < 2e-6


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "bora-xs"])
def test_model_with_adapters_is_the_same_merged_unmerged_and_in_both_twins(folder: Path, kind: AdapterType) -> None:
    """On every layer of DiT and conditioner. Measured: 3e-6."""
    for name in ("mlx.core", "torch"):
        pytest.importorskip(name)
    adapters = (
        Applied(adapter=random_adapter(folder, adapter_config(kind)), strength=0.8),
        Applied(
            adapter=random_adapter(folder, adapter_config("dora-rows", exclude=("seconds",)), seed=1), strength=0.3
        ),
    )
    mlx, torch = Twin("mlx"), Twin("torch")
    wanted = latents(mlx, folder, *adapters)
    assert relative(wanted, latents(mlx, folder)) > 0.05
    for twin, merged in ((mlx, True), (torch, False), (torch, True)):
        assert relative(latents(twin, folder, *adapters, merged=merged), wanted) < 2e-5


def test_strength_zero_leaves_the_model_as_it_is(twin: Twin, folder: Path) -> None:
    adapter = random_adapter(folder, adapter_config("dora-cols"))
    np.testing.assert_array_equal(latents(twin, folder, Applied(adapter=adapter, strength=0.0)), latents(twin, folder))


def test_quantized_base_stays_packed_unless_merged(folder: Path, quantized: Path) -> None:
    """Measured: 3e-6."""
    for name in ("mlx.core", "torch"):
        pytest.importorskip(name)
    import mlx.nn as nn

    config = adapter_config("dora-rows")
    adapter = Applied(adapter=random_adapter(folder, config))
    mlx = Twin("mlx")
    counts = []
    for merged in (False, True):
        dit = mlx.pipeline(quantized, adapters=[adapter], merged=merged).load_part("dit")
        counts.append(sum(isinstance(layer, nn.QuantizedLinear) for _, layer in dit.named_modules()))
    assert counts[0] > 0 and counts[1] == 0
    wanted = latents(mlx, quantized, adapter)
    assert relative(latents(mlx, quantized, adapter, merged=True), wanted) < 2e-5
    assert relative(latents(Twin("torch"), quantized, adapter), wanted) < 2e-5


# --- times ------------------------------------------------------------------------------------------------------------


def test_adapter_is_on_in_its_interval_alone(twin: Twin, folder: Path) -> None:
    """The conditioner is left out: it runs once, with every adapter."""
    adapter = random_adapter(folder, adapter_config("dora-rows", include=("dit.",)))
    calls: list[tuple[tuple[Applied, ...], list[float]]] = []

    def make(on: tuple[Applied, ...]) -> Any:
        def velocity(x: Any, t: np.ndarray) -> Any:
            calls.append((on, t.tolist()))
            return x * 0 + len(on)

        return velocity

    applied = Applied(adapter=adapter, interval=(0.3, 0.6))
    gated = twin.module("lora").GatedVelocity((applied,), make)
    x = twin.array(np.zeros((3, 2, 1), np.float32))
    found = twin.numpy(gated(x, np.array([0.1, 0.5, 0.9], np.float32)))
    np.testing.assert_array_equal(found[:, 0, 0], [0, 1, 0])
    assert [on for on, _ in calls] == [(), (applied,)]
    gated(x, np.array([0.4, 0.5, 0.6 - 1e-6], np.float32))
    assert [on for on, _ in calls[2:]] == [(applied,)]


def test_interval_splits_a_run(twin: Twin, folder: Path) -> None:
    """Off at all visited times equals no adapter, and no item depends on its batch."""
    adapter = random_adapter(folder, adapter_config("dora-rows", include=("dit.",)))
    off = Applied(adapter=adapter, interval=(0.0, 0.0))
    np.testing.assert_array_equal(latents(twin, folder, off), latents(twin, folder))
    half = Applied(adapter=adapter, interval=(0.0, 0.99))  # off in the first step
    both = latents(twin, folder, half)
    assert relative(both, latents(twin, folder)) > 1e-2
    assert relative(both, latents(twin, folder, Applied(adapter=adapter))) > 1e-3
    alone = [latents(twin, folder, half, request=dataclasses.replace(REQUEST, items=(item,))) for item in ITEMS]
    assert relative(np.concatenate(alone), both) < 2e-5


def test_merged_adapter_with_an_interval_is_refused(twin: Twin, folder: Path) -> None:
    adapter = random_adapter(folder, adapter_config("lora"))
    with pytest.raises(ValueError, match=r"interval is 0-0\.5: a merged adapter is on at all times"):
        twin.pipeline(folder, adapters=[Applied(adapter=adapter, interval=(0.0, 0.5))], merged=True)


@pytest.mark.parametrize("residency", ["phase", "step"])
def test_freed_and_streamed_parts_are_adapted_again(twin: Twin, folder: Path, residency: Residency) -> None:
    pipeline = twin.pipeline(folder, adapters=[Applied(adapter=random_adapter(folder, adapter_config("bora")))])
    first = pipeline.generate(REQUEST)
    *_, last = pipeline.stream(REQUEST, residency=residency)
    assert pipeline.loaded == ()
    for ours, theirs in zip(first.latents, last.generation.latents, strict=True):
        assert relative(ours, theirs) < 1e-5


# --- bases of the -xs types -------------------------------------------------------------------------------------------


def test_missing_singular_vectors_are_found_in_the_model(folder: Path) -> None:
    adapter = random_adapter(folder, adapter_config("lora-xs"))
    bare = {name: {"M_xs": tensors["M_xs"]} for name, tensors in adapter.layers.items()}
    (found,) = prepare_adapters(
        [Applied(adapter=dataclasses.replace(adapter, layers=bare))], folder, ModelConfig.load(folder), merged=False
    )
    for name, tensors in adapter.layers.items():
        for kind in ("U", "V"):
            np.testing.assert_array_equal(found.adapter.layers[name][kind], tensors[kind])


def test_singular_vectors_of_a_quantized_model_are_refused(folder: Path, quantized: Path) -> None:
    adapter = random_adapter(folder, adapter_config("lora-xs"))
    bare = {name: {"M_xs": tensors["M_xs"]} for name, tensors in adapter.layers.items()}
    applied = Applied(adapter=dataclasses.replace(adapter, layers=bare))
    with pytest.raises(ValueError, match=r"needs singular vectors of the weights that .* was quantized from"):
        prepare_adapters([applied], quantized, ModelConfig.load(folder), merged=False)
