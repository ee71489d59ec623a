"""Pipelines of diffusers convert to ours: names, order of fused rows, shards, and the same numbers as that library."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from sa3_convert.diffusers.config import parse_pipeline

from sa3_mlx.common.files.safetensors import TensorFile, file_hash
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.features import fourier_features
from sa3_mlx.common.model.presets import PRESETS
from tests.support.foreign.official_checkpoint import run
from tests.support.foreign.pipeline_files import (
    DURATION,
    SCHEDULER,
    TEXT,
    TRANSFORMER,
    VAE,
    check_sizes,
    official_text_config,
    pipeline_arrays,
    write_json,
    write_pipeline,
)

QKV = "transformer_blocks.1.self_attn.to_qkv.weight"


def test_a_pipeline_converts_with_its_rows_in_our_order(tmp_path):
    arrays = pipeline_arrays()
    report = run(write_pipeline(tmp_path / "Pipe", arrays), tmp_path / "ours")
    config = ModelConfig.load(tmp_path / "ours")
    check_sizes(config)
    assert (config.name, config.diffusion.objective) == ("pipe", "rf_denoiser")
    assert report.dropped == ("freqs", "model.model.transformer.rotary_pos_emb.inv_freq")
    q, q_, k, k_, v = np.split(arrays["transformer"][QKV], 5)
    with TensorFile.open(tmp_path / "ours" / "model.safetensors") as file:
        np.testing.assert_array_equal(
            file.raw("dit.layers.1.self_attn.to_qkv.weight"), np.concatenate([q, k, v, q_, k_])
        )
        same = arrays["vae"]["decoder.blocks.0.transformers.2.attn.to_qkv.weight"]
        q, q_, k, k_, v = np.split(same, 5)
        found = file.raw("same.decoder.layers.2.self_attn.to_qkv.weight")
        np.testing.assert_array_equal(found, np.concatenate([q, k, v, q_, k_]))
        kv = arrays["transformer"]["transformer_blocks.0.cross_attn.to_kv.weight"]
        np.testing.assert_array_equal(file.raw("dit.layers.0.cross_attn.to_kv.weight"), kv)
        np.testing.assert_array_equal(
            file.raw("conditioner.padding_embedding"), arrays["transformer"]["prompt_padding_embedding"]
        )


def test_shards_are_read_through_their_index(tmp_path):
    run(write_pipeline(tmp_path / "one"), tmp_path / "first", name="x")
    run(write_pipeline(tmp_path / "three", shards=3), tmp_path / "second", name="x")
    assert file_hash(tmp_path / "first" / "model.safetensors") == file_hash(tmp_path / "second" / "model.safetensors")


def medium() -> dict[str, dict]:
    transformer = {"_class_name": "StableAudio3DiTModel"}  # the library's defaults are those of medium
    vae = {"encoder_channels": 256, "encoder_transformer_depths": [12], "decoder_sinusoidal_blocks": [8]}
    text = official_text_config(PRESETS["medium"].diffusion.text_encoder)
    return {
        "transformer": transformer,
        "vae": vae,
        "duration_embedder": {},
        "text_encoder": text,
        "scheduler": SCHEDULER,
    }


def test_medium_is_known_by_its_sizes_and_its_scheduler():
    assert parse_pipeline(medium(), name=None, fallback="folder") == PRESETS["medium"]
    base = medium() | {"scheduler": {**SCHEDULER, "stochastic_sampling": False}}
    assert parse_pipeline(base, name=None, fallback="folder") == PRESETS["medium-base"]


CHANGED = [
    ("transformer", "patch_size", 2, "transformer.patch_size"),
    ("transformer", "num_heads", 4, "transformer.num_heads"),
    ("transformer", "ff_mult", 2.5, "whole numbers"),
    ("transformer", "new_field", 1, "unknown field"),
    ("vae", "dim_heads", 128, "vae.dim_heads"),
    ("vae", "sliding_window", 2, "vae.sliding_window"),
    ("vae", "use_differential_attention", False, "vae.use_differential"),
    ("vae", "encoder_strides", [4, 4], "one whole number"),
    ("vae", "encoder_sinusoidal_blocks", [3], "encoder_sinusoidal_blocks"),
    ("vae", "encoder_sinusoidal_blocks", [{"a": 1}], "encoder_sinusoidal_blocks"),
    ("vae", "encoder_sinusoidal_blocks", [], "encoder_sinusoidal_blocks"),
    ("transformer", "ff_mult", float("inf"), "whole numbers"),
    ("transformer", "ff_mult", float("nan"), "whole numbers"),
    ("duration_embedder", "min_freq", 1.0, "duration_embedder.min_freq"),
    ("scheduler", "_class_name", "DDIMScheduler", "scheduler._class_name"),
    ("scheduler", "shift", 3.0, "scheduler.shift"),
    ("scheduler", "use_karras_sigmas", True, "use_karras_sigmas"),
]


@pytest.mark.parametrize(("component", "field", "value", "words"), CHANGED)
def test_what_we_do_not_compute_is_refused(component, field, value, words):
    configs = {
        "transformer": TRANSFORMER,
        "vae": VAE,
        "duration_embedder": DURATION,
        "scheduler": SCHEDULER,
        "text_encoder": official_text_config(TEXT),
    }
    configs[component] = {**configs[component], field: value}
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        parse_pipeline(configs, name="x", fallback="x")
    assert len(str(error.value).splitlines()) == 1


def _arrays(component: str, change):
    def edit(folder: Path) -> None:
        arrays = pipeline_arrays()
        change(arrays[component])
        write_pipeline(folder, arrays)

    return edit


def _index(change):
    def edit(folder: Path) -> None:
        write_pipeline(folder, shards=2)
        (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        path = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
        data = json.loads(path.read_text())
        change(data["weight_map"])
        write_json(path, data)

    return edit


BROKEN = {
    "missing": (_arrays("transformer", lambda a: a.pop(QKV)), "missing: model.model.transformer.layers.1.self_attn"),
    "extra": (_arrays("vae", lambda a: a.update(extra=np.ones(2, np.float32))), "unexpected: pretransform.model.extra"),
    "shape": (_arrays("transformer", lambda a: a.update({QKV: a[QKV][:-1]})), "wrong shape"),
    "nan": (_arrays("vae", lambda a: a["encoder.proj.bias"].fill(np.nan)), "encoder.proj.bias has NaN"),
    "other": (lambda f: write_json(f / "model_index.json", {"_class_name": "FluxPipeline"}), "'FluxPipeline'"),
    "no_folder": (lambda f: (f / "tokenizer").rename(f / "words"), "no folder tokenizer"),
    "no_weights": (lambda f: (f / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "no weights there"),
    "tokenizer": (lambda f: write_json(f / "tokenizer" / "tokenizer.json", {}), "not a tokenizer"),
    "index_lies": (_index(lambda places: places.pop("memory_tokens")), "do not hold what it says"),
    "index_leaves": (_index(lambda places: places.update(memory_tokens="../../x.safetensors")), "is not the name"),
    "index_pickle": (_index(lambda places: places.update(memory_tokens="model.bin")), "is not the name"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_one_line_and_nothing_is_left(kind, tmp_path):
    edit, words = BROKEN[kind]
    edit(write_pipeline(tmp_path / "pipe"))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)) as error:
        run(tmp_path / "pipe", tmp_path / "ours")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "ours").exists()


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
def test_the_networks_of_the_library_give_the_same_numbers(tmp_path):
    """Velocity, encoder and decoder of tiny random networks, whose norms have our eps."""
    torch, mx = pytest.importorskip("torch"), pytest.importorskip("mlx.core")
    from diffusers.models.autoencoders.autoencoder_same import AutoencoderSAME
    from diffusers.models.transformers.transformer_stable_audio3 import StableAudio3DiTModel

    from sa3_mlx.dit import Conditioning
    from sa3_mlx.weights import load_part

    class Features(torch.nn.Module):
        def forward(self, t):
            return torch.from_numpy(fourier_features(t.numpy().reshape(-1)))

    run(write_pipeline(tmp_path / "pipe", shards=2), tmp_path / "ours")
    config = ModelConfig.load(tmp_path / "ours")
    theirs = StableAudio3DiTModel.from_pretrained(tmp_path / "pipe" / "transformer", low_cpu_mem_usage=False)
    for module in theirs.modules():
        if type(module).__name__ == "StableAudio3RMSNorm" and module.gamma.numel() == 128:
            module.eps = 1e-5  # of the official code [A14]
    theirs.timestep_features = Features()  # the library's lose the last bits of large angles [B5]
    draw = np.random.default_rng(1)
    x, context, seconds, local = (
        draw.standard_normal(shape).astype(np.float32) for shape in ((1, 10, 16), (1, 6, 48), (1, 48), (1, 10, 17))
    )
    with torch.no_grad():
        wanted = theirs(
            torch.from_numpy(x).transpose(1, 2),
            torch.tensor([0.3]),
            torch.from_numpy(context),
            torch.from_numpy(seconds),
            local_add_cond=torch.from_numpy(local).transpose(1, 2),
        ).sample.transpose(1, 2)
    dit = load_part(tmp_path / "ours", config, "dit", mx.float32)
    prepared = dit.prepare(
        Conditioning(
            context=mx.array(context),
            repeats=mx.ones((1, 6)),
            seconds=mx.array(seconds),
            local=mx.array(local),
            valid=None,
        )
    )
    close(dit(mx.array(x), np.array([0.3], np.float32), prepared), wanted, 2e-6)
    vae = AutoencoderSAME.from_pretrained(tmp_path / "pipe" / "vae", low_cpu_mem_usage=False)
    same = load_part(tmp_path / "ours", config, "same", mx.float32)
    audio = draw.standard_normal((1, 512 * 5, 2)).astype(np.float32)
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(audio).transpose(1, 2)).latents.transpose(1, 2)
        sound = vae.decode(latents.transpose(1, 2)).sample.transpose(1, 2)
    close(same.encode(mx.array(audio)), latents, 1e-5)
    close(same.decode(mx.array(latents.numpy())), sound, 1e-5)


def close(found, wanted, tolerance: float) -> None:
    difference = np.linalg.norm(np.array(found) - wanted.numpy()) / np.linalg.norm(wanted.numpy())
    print(difference)
    assert difference < tolerance, difference
