"""Adapters of the PEFT library: names, patterns of ranks and alphas, order of fused rows, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sa3_convert import open_adapter, write_peft
from sa3_convert.peft import diffusers_modules

from sa3_mlx.common.adapters.config import adaptable_layers
from sa3_mlx.common.adapters.format import Adapter
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, write_tensors
from sa3_mlx.common.model.config import ModelConfig
from tests.support.adapters import adapter_config, random_adapter
from tests.support.foreign.pipeline_files import transformer_shapes, write_pipeline

ATTENTION = "transformer_blocks.1.self_attn.to_qkv"
OUT = "transformer_blocks.0.self_attn.to_out"
LAYER = "dit.layers.1.self_attn.to_qkv"


@pytest.fixture(scope="module")
def folder(random_models: dict[str, Path]) -> Path:
    return random_models["tiny-l"]  # with differential attention


@pytest.fixture(scope="module")
def model(folder: Path) -> ModelConfig:
    return ModelConfig.load(folder)


def write_adapter_folder(folder: Path, tensors: dict[str, np.ndarray], **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, **settings}))
    write_tensors(folder / "adapter_model.safetensors", [array_entry(n, a) for n, a in tensors.items()], {})
    return folder


def matrices(module: str, outputs: int, inputs: int, rank: int, prefix: str = "base_model.model.") -> dict:
    draw = np.random.default_rng(rank)
    return {
        f"{prefix}{module}.lora_A.weight": draw.standard_normal((rank, inputs)).astype(np.float32),
        f"{prefix}{module}.lora_B.weight": draw.standard_normal((outputs, rank)).astype(np.float32),
    }


def update(adapter: Adapter, layer: str) -> np.ndarray:
    a, b = adapter.low_rank(layer)
    return b @ a


def test_every_layer_of_the_dit_has_the_name_of_diffusers(tmp_path):
    """Those of the pipeline whose names the tests write down."""
    from tests.support.foreign.official_checkpoint import run

    run(write_pipeline(tmp_path / "pipe"), tmp_path / "ours")
    config = ModelConfig.load(tmp_path / "ours")
    names = diffusers_modules(config)
    shapes = transformer_shapes()
    maps = {name.removesuffix(".weight") for name, s in shapes.items() if name.endswith(".weight") and len(s) >= 2}
    assert set(names.values()) == maps
    assert set(names) == {layer for layer in adaptable_layers(config) if layer.startswith("dit.")}


def test_rows_of_diffusers_are_brought_into_our_order(model, tmp_path):
    width = model.diffusion.dit.width
    tensors = matrices(ATTENTION, 5 * width, width, 4)
    adapter = open_adapter(write_adapter_folder(tmp_path / "a", tensors), model)
    a, b = tensors.values()
    q, q_, k, k_, v = np.split(b, 5)
    np.testing.assert_allclose(update(adapter, LAYER), 2.0 * np.concatenate([q, k, v, q_, k_]) @ a, rtol=1e-6)
    assert (adapter.config.type, adapter.config.rank, adapter.config.alpha) == ("lora", 4, 8.0)
    assert adapter.config.include == (LAYER,)


@pytest.mark.parametrize(
    "name",
    [
        "model.model.transformer.layers.1.self_attn.to_qkv",
        "model.transformer.layers.1.self_attn.to_qkv",
        "transformer.layers.1.self_attn.to_qkv",
        "layers.1.self_attn.to_qkv",
        "dit.layers.1.self_attn.to_qkv",
    ],
)
def test_official_and_own_names_keep_their_rows(name, model, tmp_path):
    width = model.diffusion.dit.width
    tensors = matrices(name, 5 * width, width, 4)
    adapter = open_adapter(write_adapter_folder(tmp_path / "a", tensors), model)
    a, b = tensors.values()
    np.testing.assert_allclose(update(adapter, LAYER), 2.0 * b @ a, rtol=1e-6)


def test_a_file_of_a_whole_pipeline_without_settings_has_the_scale_one(model, tmp_path):
    width = model.diffusion.dit.width
    tensors = matrices(OUT, width, width, 3, prefix="transformer.")
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_tensors(path, [array_entry(name, array) for name, array in tensors.items()], {})
    a, b = tensors.values()
    np.testing.assert_allclose(update(open_adapter(path, model), "dit.layers.0.self_attn.to_out"), b @ a, rtol=1e-6)


@pytest.mark.parametrize("root", [False, True])
def test_ranks_and_alphas_may_differ_by_module(root, model, tmp_path):
    width = model.diffusion.dit.width
    tensors = matrices(OUT, width, width, 2) | matrices(ATTENTION, 5 * width, width, 4)
    settings = {
        "rank_pattern": {r"0\.self_attn.to_out": 2},
        "alpha_pattern": {r"^transformer_blocks\.0\.self_attn.to_out": 6},
    }
    adapter = open_adapter(write_adapter_folder(tmp_path / "a", tensors, use_rslora=root, **settings), model)
    assert adapter.config.rank == 4
    a, b, c, d = tensors.values()
    scales = (6 / 2, 8 / 4) if not root else (6 / 2**0.5, 8 / 4**0.5)
    np.testing.assert_allclose(update(adapter, "dit.layers.0.self_attn.to_out"), scales[0] * b @ a, rtol=1e-5)
    q, q_, k, k_, v = np.split(d, 5)
    wanted = scales[1] * np.concatenate([q, k, v, q_, k_]) @ c
    np.testing.assert_allclose(update(adapter, LAYER), wanted, rtol=1e-5, atol=1e-5)


def test_convolutions_are_linear_maps_and_dora_has_its_magnitudes(model, tmp_path):
    channels = model.same.latent_channels
    tensors = matrices("preprocess_conv", channels, channels, 4)
    tensors = {name: array[..., None] for name, array in tensors.items()}
    magnitude = np.arange(1, channels + 1, dtype=np.float32).reshape(1, -1, 1)
    tensors["base_model.model.preprocess_conv.lora_magnitude_vector"] = magnitude
    adapter = open_adapter(write_adapter_folder(tmp_path / "a", tensors, use_dora=True), model)
    assert adapter.config.type == "dora-rows"
    np.testing.assert_array_equal(adapter.layers["dit.preprocess"]["magnitude"], magnitude.reshape(-1))


@pytest.mark.parametrize("kind", ["lora", "dora-rows"])
@pytest.mark.parametrize("include", [(), ("layers.[0-1].self_attn",), ("conditioner",)])
def test_ours_goes_out_and_comes_back(kind, include, folder, model, tmp_path):
    adapter = random_adapter(folder, adapter_config(kind, include=include))
    write_peft(tmp_path / "peft", adapter, model)
    found = open_adapter(tmp_path / "peft", model)
    assert found.layers.keys() == adapter.layers.keys()
    assert found.config == adapter.config or include
    for layer, tensors in adapter.layers.items():
        for name, values in tensors.items():
            np.testing.assert_array_equal(found.layers[layer][name], values, err_msg=layer)
    if include != ("conditioner",):
        settings = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert re.fullmatch(settings["target_modules"], ATTENTION)
        assert not re.fullmatch(settings["target_modules"], f"x.{ATTENTION}")


def test_what_the_model_does_not_have_is_listed_and_nothing_left_is_an_error(model, tmp_path, capsys):
    width = model.diffusion.dit.width
    good, other = matrices(OUT, width, width, 4), matrices("unet.mid_block.to_q", 8, 8, 4)
    adapter = open_adapter(write_adapter_folder(tmp_path / "a", good | other), model)
    assert list(adapter.layers) == ["dit.layers.0.self_attn.to_out"]
    assert "1 modules are not in tiny-l and left out: unet.mid_block.to_q" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"none of its 1 modules is in tiny-l \(unet.mid_block.to_q\)"):
        open_adapter(write_adapter_folder(tmp_path / "b", other), model)


SETTINGS = [
    ({"peft_type": "IA3"}, "peft_type"),
    ({"bias": "all"}, "bias"),
    ({"lora_bias": True}, "lora_bias"),
    ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"alpha_pattern": {"(a+)+$": 2}}, "more than a name"),
    ({"alpha_pattern": {"to_out": -1}}, "not a positive number"),
    ({"lora_alpha": 0.0}, "not a positive number"),
    ({"use_dora": "yes"}, "use_dora"),
]


@pytest.mark.parametrize(("settings", "words"), SETTINGS)
def test_settings_that_we_do_not_compute_are_refused(settings, words, model, tmp_path):
    width = model.diffusion.dit.width
    path = write_adapter_folder(tmp_path / "a", matrices(OUT, width, width, 4), **settings)
    with pytest.raises(ValueError, match=f"adapter_config.json.*{re.escape(words)}") as error:
        open_adapter(path, model)
    assert len(str(error.value).splitlines()) == 1


def _without(name: str):
    return lambda t: {k: v for k, v in t.items() if name not in k}


BROKEN = [
    (_without("lora_B"), "lacks lora_A or lora_B"),
    (lambda t: {**t, "base_model.model.proj_in.weight": np.ones((2, 2), np.float32)}, "none of a LoRA or DoRA"),
    (lambda t: {k: v[:, None, None] for k, v in t.items()}, "must be a matrix"),
    (lambda t: {k: v[:, :5] if "lora_A" in k else v for k, v in t.items()}, "of it needs"),
    (lambda t: {k: v * np.float32(np.nan) for k, v in t.items()}, "NaN"),
]


@pytest.mark.parametrize(("change", "words"), BROKEN)
def test_tensors_that_do_not_fit_are_refused(change, words, model, tmp_path):
    width = model.diffusion.dit.width
    path = write_adapter_folder(tmp_path / "a", change(matrices(OUT, width, width, 4)))
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        open_adapter(path, model)
    assert len(str(error.value).splitlines()) == 1


def test_pickles_and_other_types_are_refused(folder, model, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"\x80")
    for path in (tmp_path / "a", tmp_path / "a" / "adapter_model.bin"):
        with pytest.raises(ValueError, match="can run code"):
            open_adapter(path, model)
    with pytest.raises(ValueError, match="PEFT has lora and dora-rows"):
        write_peft(tmp_path / "b", random_adapter(folder, adapter_config("bora")), model)


def test_the_command_writes_and_uses_a_folder_of_peft(run, shared_home):
    from sa3_mlx.common.adapters.format import write_adapter

    adapter = random_adapter(shared_home / "models" / "little", adapter_config("lora", rank=2))
    write_adapter(Path("own.safetensors"), adapter)
    common = ("--model", "little")
    assert run("lora", "convert", "own.safetensors", "peft", "--to-peft", *common).code == 0
    assert run("lora", "convert", "own.safetensors", "peft", "--to-peft", *common).code == 2
    assert run("lora", "convert", "own.safetensors", "peft", "--to-peft", "--force", *common).code == 0
    assert run("lora", "convert", "peft", "back.safetensors", *common).code == 0
    assert run("lora", "convert", "own.safetensors", "x", "--to-peft", "--to-official", *common).code == 2
    if importlib.util.find_spec("mlx") is not None:
        quick = ("--seconds", "0.5", "--steps", "1", "--seed", "1", *common)
        assert run("generate", "bell", *quick, "--lora", "peft", "--out", "a.wav").code == 0
        assert run("generate", "bell", *quick, "--lora", "own.safetensors", "--out", "b.wav").code == 0
        np.testing.assert_array_equal(*(soundfile.read(name)[0] for name in ("a.wav", "b.wav")))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("peft", "diffusers", "torch")), reason="needs them"
)
@pytest.mark.parametrize("kind", ["lora", "dora-rows"])
def test_the_library_computes_the_same_weights(kind, tmp_path):
    """PEFT merges our adapter into the transformer of diffusers; our own formula gives the same; measured: 2e-7."""
    import torch
    from diffusers.models.transformers.transformer_stable_audio3 import StableAudio3DiTModel
    from peft import PeftModel

    from tests.support.adapters import oracle
    from tests.support.foreign.official_checkpoint import run

    run(write_pipeline(tmp_path / "pipe"), tmp_path / "ours")
    config = ModelConfig.load(tmp_path / "ours")
    adapter = random_adapter(tmp_path / "ours", adapter_config(kind, include=("dit.",)))
    write_peft(tmp_path / "peft", adapter, config)
    theirs = StableAudio3DiTModel.from_pretrained(tmp_path / "pipe" / "transformer", low_cpu_mem_usage=False)
    with torch.no_grad():
        merged = PeftModel.from_pretrained(theirs, tmp_path / "peft").merge_and_unload().state_dict()
    modules = diffusers_modules(config)
    assert len(adapter.layers) == len(modules)
    with TensorFile.open(tmp_path / "ours" / "model.safetensors") as file:
        for layer, tensors in adapter.layers.items():
            wanted = oracle(file.read(f"{layer}.weight").astype(np.float64), adapter.config, dict(tensors), 1.0)
            found = merged[f"{modules[layer]}.weight"].numpy().reshape(wanted.shape)
            if layer.endswith("self_attn.to_qkv"):
                q, q_, k, k_, v = np.split(found, 5)
                found = np.concatenate([q, k, v, q_, k_])
            assert np.linalg.norm(found - wanted) < 1e-6 * np.linalg.norm(wanted), layer
