"""Adapter files, their patterns, and the official layout."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from sa3_convert import open_adapter, write_official_adapter
from sa3_convert.adapters import official_modules

from sa3_mlx.common.adapters.applied import Applied, check_adapter
from sa3_mlx.common.adapters.config import (
    ADAPTER_TYPES,
    AdapterConfig,
    AdapterType,
    adaptable_layers,
    expand,
    selected_layers,
)
from sa3_mlx.common.adapters.format import Adapter, read_adapter, write_adapter
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.schema import ConfigError
from tests.support.adapters import adapter_config, random_adapter


@pytest.fixture(scope="module")
def folder(random_models: dict[str, Path]) -> Path:
    return random_models["tiny-s"]


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    return ModelConfig.load(folder)


def assert_same(ours: Adapter, theirs: Adapter, *, rtol: float = 0.0) -> None:
    assert ours.layers.keys() == theirs.layers.keys()
    for layer, tensors in ours.layers.items():
        assert tensors.keys() == theirs.layers[layer].keys()
        for kind, values in tensors.items():
            np.testing.assert_allclose(theirs.layers[layer][kind], values, rtol=rtol, atol=rtol * 1e-2)


# --- patterns ---------------------------------------------------------------------------------------------------------


def test_ranges_in_patterns_stand_for_numbers() -> None:
    assert expand("layers.[0-2].") == ["layers.0.", "layers.1.", "layers.2."]
    assert expand("[1-2].x[8-9]") == ["1.x8", "1.x9", "2.x8", "2.x9"]
    assert sorted(expand(" l[3-1] ")) == ["l1", "l2", "l3"]
    assert expand("self_attn") == ["self_attn"]


def test_include_and_exclude_choose_layers(model: ModelConfig) -> None:
    def chosen(include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> set[str]:
        return set(selected_layers(adapter_config("lora", include=include, exclude=exclude), model))

    everything = set(adaptable_layers(model))
    assert chosen() == everything and "conditioner.seconds_embed" in everything
    assert chosen(("layers.[0-0].self_attn",)) == {f"dit.layers.0.self_attn.{name}" for name in ("to_qkv", "to_out")}
    assert chosen((), ("dit.",)) == {"conditioner.seconds_embed"}
    assert chosen(("ff.",), ("proj_in",)) == {f"dit.layers.{n}.ff.proj_out" for n in (0, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": ("",)}, "a pattern is empty"),
        ({"exclude": ("a[0-99999999]",)}, "stands for more than 10000 names"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": 0.0}, "alpha is 0"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        AdapterConfig.from_dict({**adapter_config("lora").to_dict(), **change})


def test_patterns_without_a_layer_are_refused(model: ModelConfig) -> None:
    with pytest.raises(ValueError, match="leave none of the 31 layers of tiny-s"):
        selected_layers(adapter_config("lora", include=("nowhere",)), model)


def test_rank_beyond_the_singular_vectors_is_refused(model: ModelConfig) -> None:
    with pytest.raises(ValueError, match=r"rank is 17: dit\.preprocess has 16 singular vectors"):
        selected_layers(adapter_config("lora-xs", rank=17, include=("dit.preprocess",)), model)
    with pytest.raises(ValueError, match="rank is 17: no layer has more than 16 inputs or outputs"):
        selected_layers(adapter_config("lora", rank=17, include=("dit.preprocess",)), model)
    for rank in (10**6, 2**63):
        with pytest.raises(ValueError, match=f"rank is {rank}: allowed is at least 1 and at most 65536"):
            adapter_config("lora", rank=rank)


@pytest.mark.parametrize(("strength", "interval"), [(float("nan"), (0, 1)), (1, (0.5, 0.2)), (1, (-1, 1)), (1, (0, 2))])
def test_bad_strengths_and_intervals_are_refused(folder: Path, strength: float, interval: tuple[float, float]) -> None:
    adapter = random_adapter(folder, adapter_config("lora", include=("preprocess",)))
    with pytest.raises(ValueError, match="allowed"):
        Applied(adapter=adapter, strength=strength, interval=interval)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ADAPTER_TYPES)
def test_a_written_file_is_read_back(folder: Path, tmp_path: Path, kind: AdapterType) -> None:
    adapter = random_adapter(folder, adapter_config(kind))
    write_adapter(tmp_path / "a.safetensors", adapter)
    found = read_adapter(tmp_path / "a.safetensors")
    assert found.info == adapter.info
    assert_same(adapter, found)


@pytest.mark.parametrize("kind", ADAPTER_TYPES)
def test_the_official_layout_goes_both_ways(
    folder: Path, model: ModelConfig, tmp_path: Path, kind: AdapterType
) -> None:
    """fp16 values; the singular vectors are left to the reader, as in the official files."""
    adapter = random_adapter(folder, adapter_config(kind))
    path = tmp_path / "official.safetensors"
    write_official_adapter(path, adapter, model)
    with TensorFile.open(path) as file:
        assert {file.info(name)[0] for name in file.names()} == {"F16"}
        assert "lora_config" in file.metadata
    found = open_adapter(path, model)
    assert found.config == adapter.config
    kept = {
        layer: {name: values for name, values in tensors.items() if name not in ("U", "V")}
        for layer, tensors in adapter.layers.items()
    }
    assert_same(dataclasses.replace(adapter, layers=kept), found, rtol=1e-3)


def test_official_names_are_those_of_the_public_loader(folder: Path, model: ModelConfig, tmp_path: Path) -> None:
    """Modules as seen from inside the wrapper of the DiT and from the conditioner; their patterns choose them alone."""
    layers = ("dit.layers.1.ff.proj_in", "dit.layers.1.local_embed.fc2", "dit.preprocess", "conditioner.seconds_embed")
    write_official_adapter(
        tmp_path / "a.safetensors", random_adapter(folder, adapter_config("dora-rows", include=layers)), model
    )
    modules = [
        "conditioners.seconds_total.embedder.embedding.1",
        "model.preprocess_conv",
        "model.transformer.layers.1.ff.ff.0.proj",
        "model.transformer.layers.1.to_local_embed.2",
    ]
    with TensorFile.open(tmp_path / "a.safetensors") as file:
        names = [f"{m}.parametrizations.weight.0.{k}" for m in modules for k in ("lora_A", "lora_B", "magnitude")]
        assert file.names() == sorted(names)
        data = json.loads(file.metadata["lora_config"])
    assert data["include"] == modules and data["exclude"] is None
    assert (data["rank"], data["alpha"], data["adapter_type"]) == (3, 6.0, "dora-rows")
    assert [m for m in official_modules(model).values() if any(i in m for i in modules)] == [
        official_modules(model)[layer] for layer in official_modules(model) if layer in layers
    ]


def test_every_layer_of_the_released_models_has_an_official_name() -> None:
    for name in ("small-music", "medium"):
        modules = official_modules(PRESETS[name])
        assert modules.keys() == adaptable_layers(PRESETS[name]).keys()
        assert len(set(modules.values())) == len(modules)


def test_old_and_foreign_forms_of_the_official_layout_are_read(
    folder: Path, model: ModelConfig, tmp_path: Path
) -> None:
    """The type "dora" with magnitudes of two axes, names without "model.", derived tensors, no metadata at all."""
    for kind, shape in (("dora-rows", (-1, 1)), ("dora-cols", (1, -1))):
        adapter = random_adapter(folder, adapter_config(kind, include=("to_qkv",)))  # type: ignore[arg-type]
        entries = []
        for layer, tensors in adapter.layers.items():
            module = official_modules(model)[layer].removeprefix("model.")
            for name, values in tensors.items():
                values = values.reshape(shape) if name == "magnitude" else values
                entries.append(array_entry(f"{module}.parametrizations.weight.0.{name}", values, "F32"))
            entries.append(array_entry(f"{module}.parametrizations.weight.0.baked_vnorm_row", np.ones(3, np.float32)))
        write_tensors(tmp_path / "old.safetensors", entries, {"lora_config": json.dumps({"adapter_type": "dora"})})
        found = open_adapter(tmp_path / "old.safetensors", model)
        assert (found.config.type, found.config.rank, found.config.alpha) == (kind, 3, 3.0)
        assert_same(adapter, found)


def test_adapters_of_other_models_are_refused(random_models: dict[str, Path], model: ModelConfig) -> None:
    """tiny-l has wider fused projections, its other layers have the same shapes."""
    adapter = random_adapter(random_models["tiny-l"], adapter_config("lora"))
    with pytest.raises(ValueError, match=r"25 of its 31 layers fit tiny-s \(.*to_.* needs"):
        check_adapter(adapter, model)
    fitting = random_adapter(random_models["tiny-l"], adapter_config("lora", include=("to_out", "ff.")))
    assert check_adapter(fitting, model) == len(fitting.layers) == 8


def test_bad_files_are_refused_in_one_line(folder: Path, model: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def refused(message: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            open_adapter(path, model)
        assert "\n" not in str(error.value)

    refused("no such file")
    path.write_bytes(b"nothing")
    refused("not a safetensors file")
    write_tensors(path, [array_entry("x", np.ones(2, np.float32))], {})
    refused("no adapter of sa3, the official tools or PEFT")
    one = np.ones((3, 16), np.float32)
    key = "model.preprocess_conv.parametrizations.weight.0"
    write_tensors(path, [array_entry(f"{key}.lora_A", one)], {})
    refused("0 of its 1 layers fit")
    write_tensors(path, [array_entry(f"{key}.lora_A", one * np.nan)], {})
    refused("NaN")
    write_tensors(path, [array_entry(f"{key}.lora_A", one)], {"lora_config": "{"})
    refused("not valid JSON")
    write_tensors(path, [array_entry(f"{key}.lora_A", one)], {"lora_config": '{"adapter_type": "loha"}'})
    refused("adapter_type is 'loha'")
    write_tensors(path, [array_entry("model.nowhere.parametrizations.weight.0.lora_A", one)], {})
    refused(r"0 of its 1 layers are in tiny-s \(not model\.nowhere\)")
    adapter = random_adapter(folder, adapter_config("lora", include=("preprocess",)))
    write_adapter(path, adapter)
    path.write_bytes(path.read_bytes()[:-4])
    refused("truncated")


def test_pickles_are_never_opened(model: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only \.safetensors files can be read"):
        open_adapter(tmp_path / "a.ckpt", model)
