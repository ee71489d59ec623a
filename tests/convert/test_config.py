"""Official configurations become ours and back; what ours cannot express is refused by the name of its field."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from sa3_convert.export_config import official_model_config
from sa3_convert.model_config import parse_model_config
from sa3_convert.text_config import official_text_config

from sa3_mlx.common.model.presets import PRESETS
from sa3_mlx.common.schema import ConfigError
from tests.support.foreign.official_checkpoint import TINY, TINY_AUTOENCODER, TINY_VARIED


@pytest.mark.parametrize(
    "config", [*PRESETS.values(), TINY, TINY_AUTOENCODER, TINY_VARIED], ids=lambda config: config.name
)
def test_configuration_survives_the_round_trip(config):
    text = None if config.diffusion is None else official_text_config(config.diffusion.text_encoder)
    official = json.loads(json.dumps(official_model_config(config)))
    parsed = parse_model_config(official, name=config.name, text_config=text)
    if config.diffusion is not None:  # what is no field there: see ``beside``
        assert parsed.diffusion.head_room_seconds == 6.0 and parsed.sampling is None and parsed.dial is None
        head_room = config.diffusion.head_room_seconds
        parsed = replace(parsed, diffusion=replace(parsed.diffusion, head_room_seconds=head_room))
        parsed = replace(parsed, sampling=config.sampling, dial=config.dial)
    assert parsed == config


@pytest.mark.parametrize(
    ("file", "preset"),
    [
        ("small", "small-music"),
        ("small-base", "small-music-base"),
        ("medium", "medium"),
        ("medium-base", "medium-base"),
        ("same-s", "same-s"),
        ("same-l", "same-l"),
    ],
)
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
    del data["model"]["diffusion"]["config"]["ff_kwargs"]
    del data["model"]["conditioning"]["configs"][1]["config"]["max_val"]
    data["model"]["diffusion"]["sampling_distribution_shift_options"] = {"type": "logsnr"}
    parsed = parse_model_config(data, name="x", text_config=official_text_config(TINY.diffusion.text_encoder))
    assert (parsed.same.decoder_kernel, parsed.same.sine_gate_layers, parsed.same.token_noise) == (1, 0, 0.0)
    assert parsed.diffusion.dit.differential is False
    assert (parsed.diffusion.dit.ff_mult, parsed.same.ff_mult, parsed.diffusion.seconds_max) == (4, 3, 1.0)
    assert parsed.diffusion.shift.rate == 1.0  # of a log-SNR shift that is given; 0 when no shift is given [B22]


@pytest.mark.parametrize(("blocks", "layers"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 3), (9, 3)])
def test_b44_sine_gate_is_in_one_layer_less_than_the_field_says(blocks, layers):
    data = official_model_config(TINY_AUTOENCODER)
    data["model"]["decoder"]["config"]["sinusoidal_blocks"] = [blocks]
    assert parse_model_config(data, name="x", text_config=None).same.sine_gate_layers == layers


AUTOENCODER = ("model", "pretransform", "config")
DIT = ("model", "diffusion", "config")
SECONDS = ("model", "conditioning", "configs", 1)
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
    ((*DIT, "ff_kwargs"), "mult", 2.5, "ff_kwargs.mult: got 2.5, supported: whole numbers"),
    ((*AUTOENCODER, "decoder", "config"), "ff_mult", 0, "decoder.config.ff_mult: got 0"),
    ((*AUTOENCODER, "decoder", "config"), "ff_mult", 4, "must have the same ff_mult, got 3, 4"),
    ((*SECONDS, "config"), "min_val", 1, "configs.1..config.min_val: got 1, supported: 0"),
    ((*SECONDS, "config"), "max_val", 0, "configs.1..config.max_val: got 0.0"),
    ((*SECONDS, "config"), "max_val", float("inf"), "configs.1..config.max_val: got inf"),
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
        ("attn_logit_softcapping", None),
        ("query_pre_attn_scalar", 256),
        ("num_key_value_heads", 1),
        ("sliding_window", 4),
        ("rope_theta", 1e6),
        ("hidden_activation", "relu"),
        ("head_dim", 8),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
        ("attention_bias", True),
        ("rms_norm_eps", 1e-5),
    ],
)
def test_text_encoders_of_another_arithmetic_are_refused(field, value):
    text = official_text_config(TINY.diffusion.text_encoder)
    text["encoder"][field] = value
    with pytest.raises(ConfigError, match="text encoder config"):
        parse_model_config(official_model_config(TINY), name="x", text_config=text)
