"""Official checkpoints convert to ours and back without loss, and nothing unknown goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from full_golden import full_checkpoint, recipe
from official_checkpoint import TINY, TINY_AUTOENCODER, write_arrays, write_json, write_official

from convert import convert, export_official
from convert.export_config import official_model_config
from convert.keys import TABLE, buffers, fold_weight_norm, pairs, unfold_weight_norm
from convert.model_config import parse_model_config
from convert.text_config import official_text_config
from sa3_mlx.spec.checkpoint import expected_tensors, parts_of
from sa3_mlx.spec.config import ConfigError, ModelConfig
from sa3_mlx.spec.presets import PRESETS
from sa3_mlx.spec.tensorfile import TensorFile, file_hash, from_bf16_bits


def run(source, out, *, name=None, force=False, progress=None):
    return convert(source, out, name=name, force=force, progress=progress)


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    with TensorFile.open(path) as file:
        return {name: (file.info(name)[0], file.raw(name)) for name in file.names()}


def folded(found: dict[str, tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The effective weight of every weight-normed map of an official file."""
    return {
        name: fold_weight_norm(found[name.replace("weight_v", "weight_g")][1], v)
        for name, (_, v) in found.items()
        if name.endswith("mapping.weight_v")
    }


# --- names and counts -------------------------------------------------------------------------------------------------

# sha256 of the sorted "name (shape)" lines of the published key tables, and their numbers of tensors and elements
PUBLISHED = {
    "small": ("small-music", ("conditioner", "dit", "same"), 685, 567_573_761, "45cc1573c4cf9be1"),
    "medium": ("medium", ("conditioner", "dit", "same"), 997, 2_305_495_793, "277c45791729f851"),
    "same-s": ("same-s", ("same",), 244, 108_244_721, "af1a0ab238acb69a"),
    "same-l": ("same-l", ("same",), 472, 852_127_457, "6a61e57670ed78f4"),
    "t5gemma-b-b-ul2": ("medium", ("text_encoder",), 134, 281_580_288, "c8d08ceb89e4c768"),
}


def official_layout(preset: str, parts: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    config = PRESETS[preset]
    layout = buffers(config, parts)
    for pair in pairs(config, parts):
        layout |= dict(zip(pair.official, pair.official_shapes, strict=True))
    if config.diffusion is None:
        return {name.removeprefix("pretransform.model."): shape for name, shape in layout.items()}
    return layout


@pytest.mark.parametrize("table", PUBLISHED)
def test_exported_layout_has_the_published_names_shapes_and_counts(table):
    preset, parts, count, elements, digest = PUBLISHED[table]
    layout = official_layout(preset, parts)
    assert len(layout) == count
    assert sum(map(math.prod, layout.values())) == elements
    lines = "\n".join(f"{name} {shape}" for name, shape in sorted(layout.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == digest


@pytest.mark.parametrize(("preset", "elements"), [("small-music", 459_130_896), ("medium", 1_453_170_192)])
def test_dit_has_the_published_number_of_elements(preset, elements):
    assert sum(map(math.prod, official_layout(preset, ("dit",)).values())) == elements


def test_large_has_the_derived_number_of_elements():
    assert sum(map(math.prod, official_layout("large", ("dit",)).values())) == 2_787_996_160 + 16  # RoPE buffer


@pytest.mark.parametrize("preset", PRESETS)
def test_names_are_a_bijection(preset):
    config = PRESETS[preset]
    found = pairs(config, parts_of(config))
    official = [name for pair in found for name in pair.official]
    assert {pair.ours: pair.shape for pair in found} == expected_tensors(config)
    assert len(set(official)) == len(official)
    assert not set(official) & set(buffers(config, parts_of(config)))


def test_every_row_of_the_table_is_used_by_some_preset():
    used = {re.sub(r"\.layers\.\d+\.", ".layers.{n}.", name) for name in expected_tensors(PRESETS["medium"])}
    no_bias = {f"dit.{name}.{fc}.bias" for name in ("to_cond_embed", "to_global_embed") for fc in ("fc1", "fc2")}
    assert set(TABLE) - used == no_bias


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [*PRESETS.values(), TINY, TINY_AUTOENCODER], ids=lambda config: config.name)
def test_configuration_survives_the_round_trip(config):
    text = None if config.diffusion is None else official_text_config(config.diffusion.text_encoder)
    official = json.loads(json.dumps(official_model_config(config)))
    parsed = parse_model_config(official, name=config.name, text_config=text)
    if config.name == "demo":  # its head-room is not a field of the official configuration
        assert parsed.to_dict()["diffusion"].pop("head_room_seconds") == 6.0
        assert parsed.diffusion.dit == config.diffusion.dit and parsed.same == config.same
    else:
        assert parsed == config


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("small", "small-music"), ("small-base", "small-music-base"), ("medium", "medium"),
        ("medium-base", "medium-base"), ("same-s", "same-s"), ("same-l", "same-l"),
    ],
)  # fmt: skip
def test_released_configurations_give_the_presets(golden, file, preset):
    data = json.loads((golden.parent / "spec" / "model_configs" / f"{file}.json").read_text())
    config = PRESETS[preset]
    text = None if config.diffusion is None else official_text_config(config.diffusion.text_encoder)
    assert parse_model_config(data, name=preset, text_config=text) == config


def test_absent_fields_mean_the_official_defaults():
    data = official_model_config(TINY)
    for half in ("encoder", "decoder"):
        config = data["model"]["pretransform"]["config"][half]["config"]
        for name in ("dyt", "differential", "conv_mapping", "mask_noise", "sinusoidal_blocks"):
            config.pop(name, None)
    del data["model"]["diffusion"]["config"]["attn_kwargs"]["differential"]
    data["model"]["diffusion"]["sampling_distribution_shift_options"] = {"type": "logsnr"}
    parsed = parse_model_config(data, name="x", text_config=official_text_config(TINY.diffusion.text_encoder))
    assert (parsed.same.decoder_kernel, parsed.same.sine_gate_layers, parsed.same.token_noise) == (1, 0, 0.0)
    assert parsed.diffusion.dit.differential is False
    assert parsed.diffusion.shift.rate == 1.0  # of a log-SNR shift that is given; 0 when no shift is given [B22]


@pytest.mark.parametrize(("blocks", "layers"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (9, 3)])
def test_b44_sine_gate_is_in_one_layer_less_than_the_field_says(blocks, layers):
    data = official_model_config(TINY_AUTOENCODER)
    data["model"]["decoder"]["config"]["sinusoidal_blocks"] = [blocks]
    assert parse_model_config(data, name="x", text_config=None).same.sine_gate_layers == layers


AUTOENCODER = ("model", "pretransform", "config")
DIT = ("model", "diffusion", "config")
REFUSED_FIELDS = [
    ((), "model_type", "diffusion_cond", "model_config.model_type"),
    ((), "flavour", 1, "model_config: unknown field.s. flavour"),
    ((), "sample_size", 1000, "sample_size: 1000 is not a positive multiple"),
    ((), "sample_rate", "8000", "sample_rate: expected int"),
    ((*AUTOENCODER, "encoder", "config"), "dim_heads", 128, "dim_heads: got 128"),
    ((*AUTOENCODER, "encoder", "config"), "strides", [4, 4], "strides: got"),
    ((*AUTOENCODER, "encoder", "config"), "chunk_size", 6, "chunk_size: 6 must be a multiple of the stride"),
    ((*AUTOENCODER, "encoder", "config"), "chunk_size", 16, "must have the same span"),
    ((*AUTOENCODER, "encoder", "config"), "conv_mapping", True, "conv_mapping: got True"),
    ((*AUTOENCODER, "decoder", "config"), "sliding_window", [1, 2], "sliding_window: got"),
    ((*AUTOENCODER, "decoder", "config"), "window_typo", 1, "unknown field.s. window_typo"),
    ((*AUTOENCODER, "decoder", "config"), "dyt", False, "dyt: got False"),
    ((*AUTOENCODER, "decoder"), "soft_clip", True, "soft_clip: got True"),
    ((*AUTOENCODER, "bottleneck"), "type", "vae", "bottleneck.type: got 'vae'"),
    ((*AUTOENCODER, "bottleneck", "config"), "noise_augment_dim", 4, "noise_augment_dim: got 4"),
    (AUTOENCODER, "downsampling_ratio", 2048, "downsampling_ratio: got 2048"),
    (DIT, "global_cond_type", "prepend", "global_cond_type: got 'prepend'"),
    (DIT, "timestep_features_logsnr", True, "timestep_features_logsnr: got True"),
    (DIT, "num_heads", 4, "num_heads: got 4"),
    (DIT, "patch_size", 2, "patch_size: got 2"),
    ((*DIT, "attn_kwargs"), "qk_norm", "l2", "qk_norm: got 'l2'"),
    ((*DIT, "norm_kwargs"), "eps", 1e-6, "eps: got 1e-06"),
    ((*DIT, "ff_kwargs"), "glu", False, "glu: got False"),
    (("model", "diffusion"), "diffusion_objective", "v", "diffusion_objective: got 'v'"),
    (("model", "diffusion"), "prepend_cond_ids", ["prompt"], "prepend_cond_ids"),
    (("model", "diffusion"), "sampling_distribution_shift_options", {"type": "cosine"}, "type: got 'cosine'"),
    (("model", "diffusion"), "sampling_distribution_shift_options", {"max_length": 5}, "max_length: got 5"),
    (("model", "conditioning"), "cond_dim", 32, "cond_dim|output_dim|cond_token_dim"),
    (("model", "conditioning"), "configs", [], "no conditioner with id 'prompt'|got ids"),
]


@pytest.mark.parametrize(("path", "field", "value", "message"), REFUSED_FIELDS)
def test_unsupported_fields_are_refused_by_name(path, field, value, message):
    data = json.loads(json.dumps(official_model_config(TINY)))
    target = data
    for key in path:
        target = target[key]
    target[field] = value
    with pytest.raises(ConfigError, match=message) as caught:
        parse_model_config(data, name="x", text_config=official_text_config(TINY.diffusion.text_encoder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [("sample_rate",), (*AUTOENCODER, "latent_dim"), (*DIT, "global_cond_type")])
def test_missing_fields_without_a_usable_default_are_refused(path):
    data = official_model_config(TINY)
    target = data
    for key in path[:-1]:
        target = target[key]
    del target[path[-1]]
    with pytest.raises(ConfigError, match=path[-1]):
        parse_model_config(data, name="x", text_config=official_text_config(TINY.diffusion.text_encoder))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attn_logit_softcapping", None), ("query_pre_attn_scalar", 256), ("num_key_value_heads", 1),
        ("sliding_window", 4), ("rope_theta", 1e6), ("hidden_activation", "relu"), ("head_dim", 8),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}), ("attention_bias", True), ("rms_norm_eps", 1e-5),
    ],
)  # fmt: skip
def test_text_encoders_of_another_arithmetic_are_refused(field, value):
    text = official_text_config(TINY.diffusion.text_encoder)
    text["encoder"][field] = value
    with pytest.raises(ConfigError, match="text encoder config"):
        parse_model_config(official_model_config(TINY), name="x", text_config=text)


# --- weights ----------------------------------------------------------------------------------------------------------


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
    with TensorFile.open(folder / "weights.safetensors") as before, TensorFile.open(
        tmp_path / "back" / "model.safetensors"
    ) as after:  # fmt: skip
        for key in before.names():
            if key.endswith("inv_freq"):
                np.testing.assert_array_equal(before.raw(key), after.raw(key))


@pytest.mark.parametrize("config", [TINY, TINY_AUTOENCODER], ids=lambda config: config.name)
def test_synthetic_checkpoints_survive_the_round_trip(config, tmp_path):
    source = write_official(tmp_path / "source", config)
    text = source / "t5gemma-b-b-ul2" / "model.safetensors" if config.diffusion else None
    check_round_trip(source / "model.safetensors", source, text, tmp_path, config.name)
    assert ModelConfig.load(tmp_path / "ours") == config


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


@pytest.mark.parametrize(("dtype", "tolerance"), [("F16", 1e-3), ("BF16", 8e-3)])
def test_weight_norm_of_half_precision_is_folded_in_float64(dtype, tolerance, tmp_path):
    source = write_official(tmp_path / "source", TINY_AUTOENCODER, dtype=dtype)
    run(source, tmp_path / "ours")
    with TensorFile.open(source / "model.safetensors") as official, TensorFile.open(
        tmp_path / "ours" / "model.safetensors"
    ) as ours:  # fmt: skip
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
        "import convert, sa3_mlx.spec.checkpoint\n"
        "assert 'huggingface_hub' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[1])


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


# --- refusals ---------------------------------------------------------------------------------------------------------


def edit_weights(source: Path, change) -> None:
    arrays = {name: array for name, (_, array) in tensors(source / "model.safetensors").items()}
    change(arrays)
    write_arrays(source / "model.safetensors", arrays, "F32")


def truncate(source: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def set_value(source: Path, name: str, value: float) -> None:
    edit_weights(source, lambda arrays: arrays[name].reshape(-1).__setitem__(-1, value))


QKV = "model.model.transformer.layers.1.self_attn.to_qkv.weight"
MAPPING = "pretransform.model.decoder.layers.3.mapping"
TEXT = "t5gemma-b-b-ul2"
BROKEN = {
    "truncated": (truncate, "truncated"),
    "not_safetensors": (lambda s: (s / "model.safetensors").write_bytes(b"<html>Not here</html>"), "not a safetensor"),
    "missing_key": (lambda s: edit_weights(s, lambda a: a.pop(QKV)), f"missing: {re.escape(QKV)}"),
    "extra_key": (
        lambda s: edit_weights(s, lambda a: a.update({"model.model.extra": np.ones(2, np.float32)})),
        r"unexpected: model.model.extra \(2,\)",
    ),
    "wrong_shape": (
        lambda s: edit_weights(s, lambda a: a.update({QKV: a[QKV][:-1]})),
        f"wrong shape: {re.escape(QKV)} is",
    ),
    "nan": (lambda s: set_value(s, QKV, np.nan), f"tensor {re.escape(QKV)} has NaN"),
    "infinity": (lambda s: set_value(s, f"{MAPPING}.bias", np.inf), f"tensor {re.escape(MAPPING)}.bias has NaN"),
    "zero_weight_norm": (lambda s: edit_weights(s, lambda a: a[f"{MAPPING}.weight_v"].fill(0)), "weight_v has NaN"),
    "other_rope": (
        lambda s: edit_weights(s, lambda a: a["model.model.transformer.rotary_pos_emb.inv_freq"].fill(0.5)),
        "other RoPE frequencies",
    ),
    "integer_weights": (
        lambda s: write_arrays(s / "model.safetensors", {QKV: np.ones((640, 128))}, "F64"),
        "missing|dtype",
    ),
    "no_config": (lambda s: (s / "model_config.json").unlink(), "no model_config.json there"),
    "config_not_json": (lambda s: (s / "model_config.json").write_text("{"), "not valid JSON"),
    "config_not_an_object": (lambda s: (s / "model_config.json").write_text("[]"), "expected an object"),
    "no_weights": (lambda s: (s / "model.safetensors").unlink(), "no model.safetensors there"),
    "several_weights": (
        lambda s: [(s / "model.safetensors").rename(s / "a.safetensors"), (s / "b.safetensors").write_bytes(b"")],
        "several other weight files",
    ),
    "no_text_encoder": (lambda s: (s / TEXT / "model.safetensors").unlink(), "the text encoder is missing"),
    "no_text_config": (lambda s: (s / TEXT / "config.json").unlink(), "the text encoder is missing"),
    "no_tokenizer": (lambda s: (s / TEXT / "tokenizer.json").unlink(), "the tokenizer is missing"),
    "tokenizer_not_json": (lambda s: (s / TEXT / "tokenizer.json").write_text("version"), "not valid JSON"),
    "tokenizer_of_another_kind": (lambda s: write_json(s / TEXT / "tokenizer.json", {"a": 1}), "not a tokenizer"),
    "text_encoder_of_another_size": (
        lambda s: write_arrays(s / TEXT / "model.safetensors", {"model.encoder.norm.weight": np.ones(8)}, "BF16"),
        "missing: text|missing: model.encoder|wrong shape: model.encoder.norm.weight",
    ),
    "autoencoder_weights_with_a_full_config": (
        lambda s: edit_weights(
            s, lambda a: [a.update({n.removeprefix("pretransform.model."): a.pop(n)}) for n in list(a)]
        ),
        "unexpected: decoder.layers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_in_one_line_and_leave_nothing(case, tmp_path):
    change, message = BROKEN[case]
    source = write_official(tmp_path / "source", TINY)
    change(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(source, tmp_path / "ours")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_all_faults_of_a_file_are_listed_in_one_error(tmp_path):
    source = write_official(tmp_path / "source", TINY)

    def change(arrays):
        del arrays[QKV], arrays[f"{MAPPING}.bias"]
        arrays["surprise"] = np.ones(3, np.float32)
        arrays["model.model.preprocess_conv.weight"] = np.ones((6, 6), np.float32)

    edit_weights(source, change)
    with pytest.raises(ValueError, match=r"4 tensor\(s\)") as caught:
        run(source, tmp_path / "ours")
    for word in (QKV, f"{MAPPING}.bias", "surprise", "preprocess_conv"):
        assert word in str(caught.value)


def test_sources_that_are_no_official_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no released model has that name \(small-music"):
        run("small-musik", tmp_path / "ours")
    with pytest.raises(ValueError, match="large: there are no public weights"):
        run("large", tmp_path / "ours")
    source = write_official(tmp_path / "source", TINY_AUTOENCODER)
    (source / "model.ckpt").write_bytes(b"\x80")
    with pytest.raises(ValueError, match="pickled checkpoints"):
        run(source / "model.ckpt", tmp_path / "ours")
    run(source, tmp_path / "ours")
    with pytest.raises(ValueError, match="already in the sa3 format"):
        run(tmp_path / "ours", tmp_path / "again")
    with pytest.raises(ValueError, match="exists already"):
        run(source, tmp_path / "ours")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="exists and is not a converted checkpoint"):
        run(source, tmp_path / "file", force=True)


def test_export_refuses_what_does_not_fit_its_configuration(tmp_path):
    run(write_official(tmp_path / "source", TINY_AUTOENCODER), tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        export_official(tmp_path / "source", tmp_path / "back", force=False)
    with TensorFile.open(tmp_path / "ours" / "model.safetensors") as file:
        arrays = {name: file.raw(name) for name in file.names() if name != "same.encoder.new_token"}
    write_arrays(tmp_path / "ours" / "model.safetensors", arrays, "F32")
    with pytest.raises(ValueError, match=r"missing: same\.encoder\.new_token"):
        export_official(tmp_path / "ours", tmp_path / "back", force=False)
    assert not (tmp_path / "back").exists()


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    source = write_official(tmp_path / "source", TINY_AUTOENCODER)
    monkeypatch.setattr("convert.official.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="GB needed"):
        run(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_interruption_leaves_nothing(tmp_path):
    source = write_official(tmp_path / "source", TINY_AUTOENCODER)

    def interrupt(done, total, name):
        if done > total // 2:
            raise KeyboardInterrupt(name)

    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "ours", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
