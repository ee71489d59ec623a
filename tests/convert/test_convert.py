"""Official checkpoints convert to ours and back without loss, and nothing unknown goes unnoticed."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sa3_convert import export_official
from sa3_convert.keys import fold_weight_norm, pairs, unfold_weight_norm

from sa3_mlx.assets import DEMO
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, file_hash, from_bf16_bits, write_tensors
from sa3_mlx.common.model.checkpoint import expected_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.model.sampling import Guidance, Sampling
from tests.support.foreign.official_checkpoint import (
    TINY,
    TINY_AUTOENCODER,
    TINY_VARIED,
    run,
    tensors,
    write_arrays,
    write_json,
    write_official,
)
from tests.support.full_golden import full_checkpoint, recipe
from tests.support.tiny_checkpoint import write_checkpoint


def folded(found: dict[str, tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The effective weight of every weight-normed map of an official file."""
    return {
        name: fold_weight_norm(found[name.replace("weight_v", "weight_g")][1], v)
        for name, (_, v) in found.items()
        if name.endswith("mapping.weight_v")
    }


def check_round_trip(source: Path, folder: Path, text: Path | None, tmp_path: Path, name: str) -> None:
    report = run(source, tmp_path / "ours", name=name)
    back = export_official(tmp_path / "ours", tmp_path / "back", force=False)
    before, after = tensors(source), tensors(tmp_path / "back" / "model.safetensors")
    assert sorted(before) == sorted(after)
    for key in before:
        if not key.endswith((".weight_g", ".weight_v", "inv_freq")):
            assert before[key][0] == after[key][0], key
            np.testing.assert_array_equal(before[key][1], after[key][1], err_msg=key)
    effect_before, effect_after = folded(before), folded(after)
    assert len(effect_before) == 2
    for key, weight in effect_before.items():  # measured: 5e-8 relative L2
        assert np.linalg.norm(effect_after[key] - weight) <= 1e-6 * np.linalg.norm(weight)
    if text is not None:
        exported = tensors(tmp_path / "back" / "t5gemma-b-b-ul2" / "model.safetensors")
        for key, (dtype, array) in tensors(text).items():
            name_there = key if key.startswith("model.") else f"model.{key}"
            assert exported[name_there][0] == dtype
            np.testing.assert_array_equal(exported[name_there][1], array)
    assert report.parts == back.parts
    assert report.hash == file_hash(tmp_path / "ours" / "model.safetensors")
    again = run(tmp_path / "back", tmp_path / "again", name=name)
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "ours" / "config.json").read_text()
    assert again.tensors == report.tensors
    assert folder.is_dir()


@pytest.mark.parametrize("case", ["tiny-s", "tiny-l"])
def test_golden_checkpoints_survive_the_round_trip_bit_exactly(golden, case, tmp_path):
    folder = golden / case
    text = golden / "tiny_t5gemma" / "model.safetensors"
    check_round_trip(folder / "weights.safetensors", folder, text, tmp_path, case)
    with (
        TensorFile.open(folder / "weights.safetensors") as before,
        TensorFile.open(tmp_path / "back" / "model.safetensors") as after,
    ):
        for key in before.names():
            if key.endswith("inv_freq"):
                np.testing.assert_array_equal(before.raw(key), after.raw(key))


@pytest.mark.parametrize("config", [TINY, TINY_AUTOENCODER, TINY_VARIED], ids=lambda config: config.name)
def test_synthetic_checkpoints_survive_the_round_trip(config, tmp_path):
    source = write_official(tmp_path / "source", config)
    text = source / "t5gemma-b-b-ul2" / "model.safetensors" if config.diffusion else None
    check_round_trip(source / "model.safetensors", source, text, tmp_path, config.name)
    assert ModelConfig.load(tmp_path / "ours") == config


def test_multipliers_of_the_feed_forward_set_the_shapes():
    ours, official = expected_tensors(TINY_VARIED), {pair.ours: pair for pair in pairs(TINY_VARIED, ("dit", "same"))}
    for name, width, inner in (("dit.layers.1", 128, 3 * 128), ("same.decoder.layers.2", 64, 2 * 64)):
        for kind, shape in (("in", (2 * inner, width)), ("out", (width, inner))):
            layer = f"{name}.ff.proj_{kind}.weight"
            assert ours[layer] == official[layer].official_shapes[0] == shape


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_kept_as_it_is(dtype, tmp_path):
    source = write_official(tmp_path / "source", TINY, dtype=dtype)
    report = run(source, tmp_path / "ours")
    assert set(report.dtypes) == {dtype, "BF16"}
    export_official(tmp_path / "ours", tmp_path / "back", force=False)
    before, after = tensors(source / "model.safetensors"), tensors(tmp_path / "back" / "model.safetensors")
    for key in before:  # the buffers are written anew, in float32
        if not key.endswith((".weight_g", ".weight_v", "inv_freq", "noise_scaling_factor")):
            assert before[key][0] == after[key][0] == dtype
            np.testing.assert_array_equal(before[key][1], after[key][1], err_msg=key)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_model_of_ours_comes_back_bit_exactly(dtype, tmp_path):
    """The mappings too, whose weight norm is kept in float32."""
    write_checkpoint(tmp_path / "wide", TINY)
    (tmp_path / "ours").mkdir()
    with TensorFile.open(tmp_path / "wide" / "model.safetensors") as file:
        entries = [array_entry(name, file.read(name), dtype) for name in file.names()]
        write_tensors(tmp_path / "ours" / "model.safetensors", entries, {"format": "sa3/1"})
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(tmp_path / "wide" / name, tmp_path / "ours" / name)
    export_official(tmp_path / "ours", tmp_path / "official", force=False)
    run(tmp_path / "official", tmp_path / "again", name="tiny")
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "ours" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("dtype", "tolerance"), [("F16", 1e-3), ("BF16", 8e-3)])
def test_weight_norm_of_half_precision_is_folded_in_float64(dtype, tolerance, tmp_path):
    source = write_official(tmp_path / "source", TINY_AUTOENCODER, dtype=dtype)
    run(source, tmp_path / "ours")
    with (
        TensorFile.open(source / "model.safetensors") as official,
        TensorFile.open(tmp_path / "ours" / "model.safetensors") as ours,
    ):
        prefix = "decoder.layers.3.mapping"
        exact = fold_weight_norm(official.read(f"{prefix}.weight_g"), official.read(f"{prefix}.weight_v"))
        np.testing.assert_allclose(ours.read("same.decoder.mapping.weight"), exact, rtol=tolerance, atol=1e-7)


def test_dit_with_conditioner_converts_without_autoencoder(tmp_path):
    source = write_official(tmp_path / "source", TINY, parts=("conditioner", "dit"))
    report = run(source, tmp_path / "ours")
    assert report.parts == ("text_encoder", "conditioner", "dit")
    with TensorFile.open(tmp_path / "ours" / "model.safetensors") as file:
        assert file.shapes() == dict(sorted(expected_tensors(TINY, report.parts).items()))
    back = export_official(tmp_path / "ours", tmp_path / "back", force=False)
    assert back.parts == report.parts
    assert sorted(tensors(tmp_path / "back" / "model.safetensors")) == sorted(tensors(source / "model.safetensors"))


def test_folded_kernel_acts_like_the_convolution():
    random = np.random.default_rng(1)
    g, v = random.standard_normal((5, 1, 1)), random.standard_normal((5, 4, 3))
    x = random.standard_normal((4, 7))
    kernel = g * v / np.sqrt((v**2).sum((1, 2), keepdims=True))
    padded = np.pad(x, ((0, 0), (1, 1)))
    convolved = np.stack([np.einsum("oik,ik->o", kernel, padded[:, t : t + 3]) for t in range(7)])  # (7, 5)
    taps = np.concatenate([padded[:, k : k + 7].T for k in range(3)], axis=1)  # (7, 12), tap outermost
    weight = fold_weight_norm(g, v)
    np.testing.assert_allclose(taps @ weight.T, convolved, rtol=1e-12)
    g_back, v_back = unfold_weight_norm(weight, 3)
    np.testing.assert_allclose(fold_weight_norm(g_back, v_back), weight, rtol=1e-12)


def test_whole_t5gemma_file_drops_its_decoder_and_says_so(tmp_path):
    source = write_official(tmp_path / "source", TINY)
    path = source / "t5gemma-b-b-ul2" / "model.safetensors"
    arrays = {name: from_bf16_bits(bits) for name, (_, bits) in tensors(path).items()}
    arrays |= {"model.decoder.norm.weight": np.ones(24, np.float32), "lm_head.out_proj.weight": np.ones(3, np.float32)}
    write_arrays(path, arrays, "BF16")
    dropped = run(source, tmp_path / "ours").dropped
    assert {"model.decoder.norm.weight", "lm_head.out_proj.weight"} <= set(dropped)
    assert sum(name.endswith("inv_freq") for name in dropped) == 1 + 1 + 3


def test_report_and_progress_tell_what_happened(tmp_path):
    source = write_official(tmp_path / "source", TINY)
    calls: list[tuple[int, int, str]] = []
    report = run(source, tmp_path / "ours", progress=lambda *call: calls.append(call))
    assert len(calls) == report.tensors == len(expected_tensors(TINY))
    assert calls[0][0] == 0 and all(total == report.bytes for _, total, _ in calls)
    assert report.parameters == sum(map(math.prod, expected_tensors(TINY).values()))
    text = str(report)
    for part in ("source", "tensors", f"{report.parameters:,}", report.hash, "inv_freq", "BF16"):
        assert part in text


def test_names_come_from_the_repository_or_the_folder_or_the_caller(tmp_path):
    source = write_official(tmp_path / "My Model", TINY_AUTOENCODER)
    assert run(source, tmp_path / "a").name == "my model"
    assert run(source, tmp_path / "b", name="other").name == "other"
    source = write_official(tmp_path / "s", TINY)
    data = json.loads((source / "model_config.json").read_text())
    prompt = data["model"]["conditioning"]["configs"][0]["config"]
    del prompt["model_path"]
    prompt |= {"repo_id": "stabilityai/stable-audio-3-small-music", "subfolder": "t5gemma-b-b-ul2"}
    write_json(source / "model_config.json", data)
    assert run(source, tmp_path / "c").name == "small-music"
    data["model"]["diffusion"]["diffusion_objective"] = "rectified_flow"
    write_json(source / "model_config.json", data)
    assert run(source, tmp_path / "d").name == "small-music-base"


@pytest.mark.parametrize(
    ("model_path", "subfolder", "place"),
    [
        ("text", "t5", "source/text/t5"),
        ("../text", "t5", "text/t5"),
        ("text", None, "source/text"),
        (None, "t5", "source/t5"),
        (None, None, "source/t5gemma-b-b-ul2"),
    ],
)
def test_model_path_and_subfolder_of_the_text_encoder_are_joined(tmp_path, model_path, subfolder, place):
    source = write_official(tmp_path / "source", TINY)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (source / "t5gemma-b-b-ul2").rename(tmp_path / place)
    data = json.loads((source / "model_config.json").read_text())
    prompt = data["model"]["conditioning"]["configs"][0]["config"]
    prompt |= {"model_path": model_path, "subfolder": subfolder}
    write_json(source / "model_config.json", data)
    assert "text_encoder" in run(source, tmp_path / "ours").parts


def test_force_replaces_only_checkpoints(tmp_path):
    source = write_official(tmp_path / "source", TINY_AUTOENCODER)
    out = tmp_path / "out"
    run(source, out)
    (out / "left over").write_text("x")
    run(source, out, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not a converted checkpoint, so it is not replaced"):
        run(source, other, force=True)
    assert (other / "thesis.txt").read_text() == "x"
    export_official(out, tmp_path / "back", force=False)
    with pytest.raises(ValueError, match="exists already"):
        export_official(out, tmp_path / "back", force=False)
    export_official(out, tmp_path / "back", force=True)


def test_a_perturbed_tensor_changes_the_hash(tmp_path):
    a = run(write_official(tmp_path / "a", TINY_AUTOENCODER), tmp_path / "oa", name="x").hash
    b = run(write_official(tmp_path / "b", TINY_AUTOENCODER), tmp_path / "ob", name="x").hash
    c = run(write_official(tmp_path / "c", TINY_AUTOENCODER, seed=1), tmp_path / "oc", name="x").hash
    assert a == b != c


def test_converter_needs_neither_torch_nor_mlx():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['mlx'] = sys.modules['mlx.core'] = None\n"
        "import sa3_convert, sa3_mlx.common.model.checkpoint\n"
        "assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


@pytest.mark.slow
def test_full_size_weights_arrive_under_our_names(golden, tmp_path):
    folder = full_checkpoint(golden, "same-s", tmp_path)
    weights = recipe(golden)
    with TensorFile.open(folder / "model.safetensors") as file:
        assert sum(math.prod(shape) for shape in file.shapes().values()) == 108_243_249  # without buffers and g, v
        for pair in pairs(PRESETS["same-s"], ("same",)):
            if pair.layout != "weight_norm":
                expected = weights.tensor(pair.official[0], pair.official_shapes[0]).reshape(pair.shape)
                np.testing.assert_array_equal(file.raw(pair.ours), expected, err_msg=pair.ours)
    assert [path.name for path in tmp_path.iterdir()] == ["same-s"]


def test_what_the_official_layout_has_no_place_for_survives_the_round_trip(tmp_path):
    """The usual sampling, dial, head-room and examples lie in a file beside; a released model needs none."""
    sampling = Sampling(sampler="dpmpp", steps=12, guidance=Guidance(scale=3.0, apg=0.5))
    dial = ModelConfig.load(DEMO).dial
    config = replace(
        TINY,
        sampling=sampling,
        dial=dial,
        diffusion=replace(TINY.diffusion, head_room_seconds=0.5),
        examples=("rain on tin", "a bell"),
    )
    write_checkpoint(tmp_path / "ours", config)
    export_official(tmp_path / "ours", tmp_path / "official", force=False)
    run(tmp_path / "official", tmp_path / "again", name="tiny")
    assert ModelConfig.load(tmp_path / "again") == config
    write_checkpoint(tmp_path / "plain", TINY)
    export_official(tmp_path / "plain", tmp_path / "other", force=False)
    assert not (tmp_path / "other" / "sa3.json").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ('{"format": "sa3-beside/2"}', "format"),
        ('{"format": "sa3-beside/1", "steps": 3}', "unknown field"),
        ('{"format": "sa3-beside/1", "dial": {"official": [1]}}', "dial: missing field"),
        ('{"format": "sa3-beside/1", "sampling": {"sampler": "none", "steps": 3}}', "sampler is 'none'"),
        ('{"format": "sa3-beside/1", "examples": [1]}', "examples"),
    ],
)
def test_a_damaged_file_beside_is_refused(text, words, tmp_path):
    source = write_official(tmp_path / "official", TINY)
    (source / "sa3.json").write_text(text)
    with pytest.raises(ValueError, match=f"sa3.json.*{words}"):
        run(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
