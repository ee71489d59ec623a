"""Read the official ``model_config.json`` into a ModelConfig [A3]; ``export_config`` writes it.

Each field is either taken, or checked to have the one value that our code implements, or listed here as left out on
purpose (training and memory only). Anything else is refused. An absent field means the default of the official
constructors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sa3_mlx.common.model.config import (
    HEAD_SIZE,
    TIMESTEP_FEATURES,
    DiffusionConfig,
    DiTConfig,
    ModelConfig,
    SAMEConfig,
    ShiftConfig,
)
from sa3_mlx.common.schema import ConfigError, quoted

from .fields import Fields
from .text_config import parse_text_config

TEXT_SUBFOLDER = "t5gemma-b-b-ul2"
DIFFUSION_TYPE = "diffusion_cond_inpaint"
AUTOENCODER_TYPE = "autoencoder"
OFFICIAL_FF_MULT_SAME = 3  # where the field is absent
HEAD_ROOM_SECONDS = 6.0  # a constant of the official generate() [B31]
LENGTHS = {"min_length": 256, "max_length": 4096}  # of the full and flux shifts [B24]
ANCHOR_LENGTH = 2000  # of the log-SNR shift [B24]

_Constants = tuple[tuple[str, Any, Any], ...]  # field, the one supported value, what the official code assumes
_HALF: _Constants = (
    ("dim_heads", HEAD_SIZE, 128),
    ("differential", True, True),
    ("variable_stride", True, False),
    ("dyt", True, True),
    ("mapping_bias", True, True),
    ("conformer", False, False),
    ("layer_scale", False, False),
    ("causal", False, False),
    ("feat_scale", False, False),
    ("cross_attn", False, False),
)
_DIT: _Constants = (
    ("transformer_type", "continuous_transformer", "continuous_transformer"),
    ("global_cond_type", "adaLN", "prepend"),
    ("timestep_cond_type", "global", "global"),
    ("timestep_features_type", "expo", "learned"),
    ("timestep_features_dim", TIMESTEP_FEATURES, 256),
    ("timestep_features_logsnr", False, False),
    ("timestep_embed_dim", None, None),
    ("norm_type", "rms_norm", "layer_norm"),
    ("patch_size", 1, 1),
    ("project_cond_tokens", True, True),
    ("project_global_cond", True, True),
    ("input_concat_dim", 0, 0),
    ("prepend_cond_dim", 0, 0),
    ("rotary_pos_emb", True, True),
    ("cross_attn_rotary_pos_emb", False, False),
    ("causal", False, False),
    ("conformer", False, False),
    ("layer_scale", False, False),
    ("use_sinusoidal_emb", False, False),
    ("use_abs_pos_emb", False, False),
    ("sliding_window", None, None),
    ("final_cross_attn_ix", -1, -1),
    ("modular_local_cond_configs", None, None),
)
_ATTENTION: _Constants = (
    ("qk_norm", "rms", "none"),
    ("qk_norm_eps", 1e-6, 1e-6),
    ("feat_scale", False, False),
    ("causal", False, False),
)
_FEED_FORWARD: _Constants = (
    ("no_bias", False, False),
    ("glu", True, True),
    ("use_conv", False, False),
    ("sinusoidal", False, False),
)


@dataclass(frozen=True)
class TextLocation:
    """Tell where a configuration says that its text encoder is."""

    folder: Path  # relative to the folder of model_config.json
    repo_id: str | None  # repository of the release that holds it


def text_location(data: object) -> TextLocation | None:
    """Find the text encoder of a parsed model_config.json; return None for an autoencoder alone.

    As in the official code ``subfolder`` lies in ``model_path``, if there is one, else in the folder of the release.
    Raises ConfigError where no text encoder is described.
    """
    root = Fields(data, "model_config")
    if root.take("model_type", str) == AUTOENCODER_TYPE:
        return None
    configs = root.child("model").child("conditioning").take("configs", list)
    for number, entry in enumerate(configs):
        fields = Fields(entry, f"model_config.model.conditioning.configs[{number}]")
        if fields.take("id", str) == "prompt":
            prompt = fields.child("config")
            model_path, subfolder = prompt.optional("model_path", str), prompt.optional("subfolder", str)
            if not model_path and not subfolder:
                subfolder = TEXT_SUBFOLDER
            return TextLocation(Path(model_path or "", subfolder or ""), prompt.optional("repo_id", str))
    raise ConfigError("model_config.model.conditioning.configs: no conditioner with id 'prompt'")


def parse_model_config(data: object, *, name: str, text_config: object | None) -> ModelConfig:
    """Read a parsed model_config.json and the parsed config.json of its text encoder, None for an autoencoder alone.

    Raises ConfigError, one line that names the field, for everything that our networks do not compute.
    """
    root = Fields(data, "model_config")
    model_type = root.take("model_type", str)
    if model_type not in (DIFFUSION_TYPE, AUTOENCODER_TYPE):
        raise ConfigError(
            f"model_config.model_type: got {quoted(model_type)}, supported: {DIFFUSION_TYPE!r}, {AUTOENCODER_TYPE!r}"
        )
    sample_rate, audio_channels = root.take("sample_rate", int), root.take("audio_channels", int, 2)
    sample_size = root.take("sample_size", int)  # means nothing for an autoencoder alone
    model = root.child("model")
    root.ignore("training", "svd_bases_path")
    root.done()
    if model_type == AUTOENCODER_TYPE:
        same = _autoencoder(model, audio_channels)
        return ModelConfig(name=name, sample_rate=sample_rate, audio_channels=audio_channels, same=same, diffusion=None)
    pretransform = model.child("pretransform")
    pretransform.constant("type", "autoencoder")
    pretransform.ignore("iterate_batch", "chunked")  # order of random draws and memory, not the result [B47, B48]
    pretransform.constant("scale", 1.0, default=1.0)
    same = _autoencoder(pretransform.child("config"), audio_channels)
    pretransform.done()
    model.constant("io_channels", same.latent_channels)
    if sample_size <= 0 or sample_size % same.samples_per_latent:
        raise ConfigError(
            f"model_config.sample_size: {sample_size} is not a positive multiple of the "
            f"{same.samples_per_latent} samples of a latent"
        )
    diffusion = _diffusion(model, same, sample_size // same.samples_per_latent, text_config)
    model.done()
    return ModelConfig(
        name=name, sample_rate=sample_rate, audio_channels=audio_channels, same=same, diffusion=diffusion
    )


def _autoencoder(fields: Fields, audio_channels: int) -> SAMEConfig:
    patched = fields.child("pretransform")
    patched.constant("type", "patched")
    patches = patched.child("config")
    patch_size = patches.take("patch_size", int)
    patches.constant("channels", audio_channels)
    patches.constant("oversampling", 1, default=1)
    patches.constant("postfilter_channels", 0, default=0)
    patches.done()
    patched.done()
    latent_channels = fields.take("latent_dim", int)
    encoder, decoder = (
        _half(fields.child(half), half, patch_size, audio_channels, latent_channels) for half in ("encoder", "decoder")
    )
    for name in ("stride", "width", "attention", "span", "ff_mult"):
        first, second = getattr(encoder, name), getattr(decoder, name)
        if first != second:
            raise ConfigError(f"{fields.where}: encoder and decoder must have the same {name}, got {first}, {second}")
    fields.constant("downsampling_ratio", decoder.samples_per_latent)
    for name in ("io_channels", "in_channels", "out_channels"):
        fields.constant(name, audio_channels, default=audio_channels)
    _bottleneck(fields.child("bottleneck"), latent_channels)
    fields.done()
    return replace(decoder, encoder_depth=encoder.encoder_depth)


def _bottleneck(fields: Fields, latent_channels: int) -> None:
    fields.constant("type", "softnorm")
    config = fields.child("config")
    config.constant("dim", latent_channels)
    config.constant("noise_augment_dim", 0, default=0)
    config.constant("auto_scale", True, default=False)  # without it there is no running_std
    config.ignore("noise_regularize", "freeze")  # training; decoder noise is a choice at run time [B47]
    config.done()
    fields.done()


def _one(fields: Fields, name: str, kind: type, default: list[Any] | None = None) -> Any:
    """Take the entry of a list with one entry per resampling stage; all known models have one stage."""
    values = fields.take(name, list) if default is None else fields.take(name, list, default)
    if len(values) != 1 or type(values[0]) is not kind:
        raise ConfigError(f"{fields.where}.{name}: got {quoted(values)}, supported: a list of one {kind.__name__}")
    return values[0]


def _half(outer: Fields, half: str, patch_size: int, audio_channels: int, latent_channels: int) -> SAMEConfig:
    """Read the encoder or decoder of SAME as an autoencoder whose other half is like it."""
    outer.ignore("type")
    if half == "decoder":
        outer.constant("soft_clip", False, default=False)
    fields, patch_width = outer.child("config"), patch_size * audio_channels
    fields.constant("in_channels" if half == "encoder" else "out_channels", patch_width)
    fields.constant("latent_dim", latent_channels)
    width = fields.take("channels", int, 128) * _one(fields, "c_mults", int)
    stride, depth = _one(fields, "strides", int), _one(fields, "transformer_depths", int)
    if width == patch_width:
        raise ConfigError(f"{fields.where}.channels: a width equal to the {patch_width} patch values has no mapping")
    fields.constants(_HALF)
    fields.ignore("checkpointing", "freeze_backbone")
    attention, span = _attention(fields, stride)
    sinusoidal, noise = 0, 0.0
    kernel: Literal[1, 3] = 1
    if half == "encoder":
        fields.constant("conv_mapping", False, default=False)
        fields.constant("mask_noise", 0.0, default=0.0)
    else:
        sinusoidal = _one(fields, "sinusoidal_blocks", int, [0])
        kernel = 3 if fields.take("conv_mapping", bool, False) else 1
        noise = fields.take("mask_noise", float, 0.0)
    ff_mult = _multiple(fields, "ff_mult", OFFICIAL_FF_MULT_SAME)
    fields.done()
    outer.done()
    return SAMEConfig(
        patch_size=patch_size,
        stride=stride,
        latent_channels=latent_channels,
        width=width,
        encoder_depth=depth,
        decoder_depth=depth,
        attention=attention,
        span=span,
        decoder_kernel=kernel,
        sine_gate_layers=min(max(0, sinusoidal - 1), depth),  # one less than the field says [B44]
        token_noise=noise,
        ff_mult=ff_mult,
    )


def _multiple(fields: Fields, name: str, default: int) -> int:
    """Take the inner width of a feed-forward in widths, a whole number."""
    value: float = fields.take(name, float, float(default))
    if value < 1 or not value.is_integer():
        raise ConfigError(f"{fields.where}.{name}: got {quoted(value)}, supported: whole numbers from 1")
    return int(value)


def _attention(fields: Fields, stride: int) -> tuple[Literal["chunked", "sliding"], int]:
    """Return the kind of attention and its span in latents."""
    window = fields.optional("sliding_window", list)
    if window is not None:
        if len(window) != 2 or window[0] != window[1] or type(window[0]) is not int:
            raise ConfigError(f"{fields.where}.sliding_window: got {quoted(window)}, supported: two equal numbers")
        fields.constant("chunk_midpoint_shift", False, default=False)
        fields.constant("chunk_size", 32, default=32)  # only rounds lengths up, and 32 is what generate() assumes [B31]
        return "sliding", window[0]
    fields.constant("chunk_midpoint_shift", True, default=False)
    chunk = fields.take("chunk_size", int, 128)
    if stride <= 0 or chunk % stride:
        raise ConfigError(f"{fields.where}.chunk_size: {chunk} must be a multiple of the stride {stride}")
    return "chunked", chunk // stride


def _diffusion(model: Fields, same: SAMEConfig, max_frames: int, text_config: object | None) -> DiffusionConfig:
    text_width, max_length, seconds_max = _conditioning(model.child("conditioning"))
    fields = model.child("diffusion")
    fields.constant("type", "dit")
    fields.constant("cross_attention_cond_ids", ["prompt", "seconds_total"])
    fields.constant("global_cond_ids", ["seconds_total"])
    fields.constant("local_add_cond_ids", ["inpaint_mask", "inpaint_masked_input"])
    for name in ("input_concat_ids", "prepend_cond_ids", "modular_local_cond_configs"):
        fields.constant(name, [], default=[])
    fields.ignore("mask_padding_attention", "use_effective_length_for_schedule")  # generate() says true to both
    fields.ignore("distribution_shift_options")  # training only
    objective = fields.take("diffusion_objective", str, "v")
    if objective not in ("rf_denoiser", "rectified_flow"):
        raise ConfigError(
            f"{fields.where}.diffusion_objective: got {quoted(objective)}, supported: 'rf_denoiser', 'rectified_flow'"
        )
    shift = _shift(fields)
    dit = _dit(fields.child("config"), same.latent_channels, text_width)
    fields.done()
    text_encoder = parse_text_config(text_config, max_length=max_length)
    if text_encoder.width != text_width:
        raise ConfigError(
            f"model_config.model.conditioning.cond_dim: {text_width} differs from the text encoder's "
            f"width {text_encoder.width}"
        )
    return DiffusionConfig(
        objective=objective,
        max_frames=max_frames,
        head_room_seconds=HEAD_ROOM_SECONDS,
        shift=shift,
        text_encoder=text_encoder,
        dit=dit,
        seconds_max=seconds_max,
    )


def _conditioning(fields: Fields) -> tuple[int, int, float]:
    """Return the width of the conditioning, the tokens of a prompt and the seconds where the duration saturates."""
    width = fields.take("cond_dim", int)
    fields.constant("default_keys", {}, default={})
    fields.constant("pre_encoded_keys", [], default=[])
    entries = [
        Fields(entry, f"{fields.where}.configs[{number}]") for number, entry in enumerate(fields.take("configs", list))
    ]
    found = {entry.take("id", str): entry for entry in entries}
    if sorted(found) != ["prompt", "seconds_total"] or len(entries) != 2:
        raise ConfigError(f"{fields.where}.configs: got ids {quoted(list(found))}, supported: prompt, seconds_total")
    found["prompt"].constant("type", "t5gemma")
    prompt = found["prompt"].child("config")
    max_length = prompt.take("max_length", int, 128)
    prompt.constant("padding_mode", "learned", default="zero")
    prompt.constant("project_out", False, default=False)
    prompt.constant("output_dim", width, default=width)
    prompt.constant("model_name", "google/t5gemma-b-b-ul2", default="google/t5gemma-b-b-ul2")
    prompt.ignore("enable_grad", "model_path", "repo_id", "subfolder")  # the last three: see text_location
    found["seconds_total"].constant("type", "number")
    seconds = found["seconds_total"].child("config")
    seconds.constant("min_val", 0, default=0)
    seconds_max = seconds.take("max_val", float, 1.0)
    if not 0 < seconds_max < math.inf:
        raise ConfigError(f"{seconds.where}.max_val: got {quoted(seconds_max)}, supported: finite numbers above 0")
    seconds.constant("fourier_features_type", "expo", default="learned")
    seconds.constant("output_dim", width, default=width)
    for part in (prompt, seconds, *entries, fields):
        part.done()
    return width, max_length, seconds_max


def _dit(fields: Fields, latent_channels: int, text_width: int) -> DiTConfig:
    width, depth = fields.take("embed_dim", int, 768), fields.take("depth", int, 12)
    fields.constant("io_channels", latent_channels, default=32)
    fields.constant("num_heads", width // HEAD_SIZE, default=8)
    fields.constant("cond_token_dim", text_width, default=0)
    fields.constant("global_cond_dim", text_width, default=0)
    fields.constant("local_add_cond_dim", latent_channels + 1, default=0)
    fields.constants(_DIT)
    fields.ignore("zero_init_branch_outputs", "abs_pos_emb_max_length")
    memory_tokens = fields.take("num_memory_tokens", int, 0)
    attention = fields.child("attn_kwargs")
    attention.constants(_ATTENTION)
    attention.ignore("zero_init_output")
    differential = attention.take("differential", bool, False)
    attention.done()
    feed_forward = Fields(fields.take("ff_kwargs", dict, {}), f"{fields.where}.ff_kwargs")
    ff_mult = _multiple(feed_forward, "mult", 4)
    feed_forward.constants(_FEED_FORWARD)
    feed_forward.ignore("zero_init_output", "conv_kernel_size")
    feed_forward.done()
    norm = Fields(fields.take("norm_kwargs", dict, {}), f"{fields.where}.norm_kwargs")
    norm.constant("eps", 1e-5, default=1e-5)
    norm.constant("fix_scale", False, default=False)
    norm.ignore("force_fp32")  # ours always does
    norm.done()
    fields.done()
    return DiTConfig(width=width, depth=depth, memory_tokens=memory_tokens, differential=differential, ff_mult=ff_mult)


def _shift(diffusion: Fields) -> ShiftConfig:
    name = "sampling_distribution_shift_options"
    if diffusion.optional(name, dict) is None:
        return ShiftConfig(type="logsnr", start=-6.2, end=2.0, rate=0.0)  # [B22]
    fields = diffusion.child(name)
    kind = fields.take("type", str, "full")
    match kind:
        case "none":
            shift = ShiftConfig(type="none", start=0.0, end=0.0, rate=0.0)
        case "logsnr":
            fields.constant("anchor_length", ANCHOR_LENGTH, default=ANCHOR_LENGTH)
            shift = ShiftConfig(
                type="logsnr",
                start=fields.take("anchor_logsnr", float, -6.2),
                end=fields.take("logsnr_end", float, 2.0),
                rate=fields.take("rate", float, 1.0),
            )
        case "full" | "flux":
            for length, value in LENGTHS.items():
                fields.constant(length, value, default=value)
            if kind == "full":
                sine = fields.take("use_sine", bool, False)
                start, end = fields.take("base_shift", float, 0.5), fields.take("max_shift", float, 1.15)
                shift = ShiftConfig(type="full", start=start, end=end, rate=float(sine))
            else:
                start, end = fields.take("alpha_min", float, 1.0), fields.take("alpha_max", float, 1.0)
                shift = ShiftConfig(type="flux", start=start, end=end, rate=0.0)
        case _:
            raise ConfigError(f"{fields.where}.type: got {quoted(kind)}, supported: none, full, flux, logsnr")
    fields.done()
    return shift
