"""A diffusers pipeline of Stable Audio 3 with random weights, its names written down from that library's modules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from sa3_convert.text_config import official_text_config

from sa3_mlx.common.files.safetensors import array_entry, write_tensors
from sa3_mlx.common.model.config import ModelConfig, TextEncoderConfig
from tests.support.tiny_checkpoint import weight

TEXT = TextEncoderConfig(vocab_size=20, width=48, intermediate=96, depth=2, heads=3, max_length=256)
TRANSFORMER = {
    "_class_name": "StableAudio3DiTModel",
    "_diffusers_version": "0.40.0",
    "io_channels": 16,
    "patch_size": 1,
    "embed_dim": 128,
    "depth": 2,
    "num_heads": 2,
    "cond_token_dim": 48,
    "global_cond_dim": 48,
    "local_add_cond_dim": 17,
    "timestep_features_dim": 256,
    "ff_mult": 4.0,
    "num_memory_tokens": 4,
    "use_differential_attention": True,
}
VAE = {
    "_class_name": "AutoencoderSAME",
    "_diffusers_version": "0.40.0",
    "audio_channels": 2,
    "patch_size": 32,
    "encoder_channels": 64,
    "encoder_c_mults": [2],
    "encoder_strides": [16],
    "encoder_transformer_depths": [3],
    "latent_dim": 16,
    "use_differential_attention": True,
    "dim_heads": 64,
    "ff_mult": 3,
    "sliding_window": 1,
    "encoder_sinusoidal_blocks": [0],
    "decoder_sinusoidal_blocks": [2],
    "sampling_rate": 8000,
}
DURATION = {"_class_name": "StableAudio3DurationEmbedder", "output_dim": 48, "fourier_dim": 256, "max_val": 384.0}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.40.0",
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "stochastic_sampling": True,
}
TOKENIZER = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<pad>": 0, "<unk>": 3}, "unk_token": "<unk>"}}


def transformer_shapes() -> dict[str, tuple[int, ...]]:
    width, channels, text = 128, 16, 48
    shapes: dict[str, tuple[int, ...]] = {
        "prompt_padding_embedding": (text,),
        "memory_tokens": (4, width),
        "preprocess_conv.weight": (channels, channels, 1),
        "postprocess_conv.weight": (channels, channels, 1),
        "proj_in.weight": (width, channels),
        "proj_out.weight": (channels, width),
        "rotary_pos_emb.inv_freq": (16,),
        "to_cond_embed.0.weight": (width, text),
        "to_cond_embed.2.weight": (width, width),
        "to_global_embed.0.weight": (width, text),
        "to_global_embed.2.weight": (width, width),
    }
    for name, sizes in {"to_timestep_embed": (256, width), "global_cond_embedder": (width, 6 * width)}.items():
        shapes |= {f"{name}.0.weight": (width, sizes[0]), f"{name}.0.bias": (width,)}
        shapes |= {f"{name}.2.weight": (sizes[1], width), f"{name}.2.bias": (sizes[1],)}
    for layer in range(2):
        prefix = f"transformer_blocks.{layer}"
        shapes |= {f"{prefix}.{name}.gamma": (width,) for name in ("pre_norm", "cross_attend_norm", "ff_norm")}
        shapes |= {f"{prefix}.{a}_attn.{n}_norm.gamma": (64,) for a in ("self", "cross") for n in "qk"}
        shapes |= {
            f"{prefix}.to_scale_shift_gate": (6 * width,),
            f"{prefix}.self_attn.to_qkv.weight": (5 * width, width),
            f"{prefix}.self_attn.to_out.weight": (width, width),
            f"{prefix}.cross_attn.to_q.weight": (2 * width, width),
            f"{prefix}.cross_attn.to_kv.weight": (3 * width, width),
            f"{prefix}.cross_attn.to_out.weight": (width, width),
            f"{prefix}.ff.proj_in.weight": (8 * width, width),
            f"{prefix}.ff.proj_in.bias": (8 * width,),
            f"{prefix}.ff.proj_out.weight": (width, 4 * width),
            f"{prefix}.ff.proj_out.bias": (width,),
            f"{prefix}.to_local_embed.0.weight": (width, channels + 1),
            f"{prefix}.to_local_embed.0.bias": (width,),
            f"{prefix}.to_local_embed.2.weight": (width, width),
            f"{prefix}.to_local_embed.2.bias": (width,),
        }
    return shapes


def vae_shapes() -> dict[str, tuple[int, ...]]:
    width, patch, channels = 128, 64, 16
    shapes: dict[str, tuple[int, ...]] = {
        "bottleneck.scale": (1, channels, 1),
        "bottleneck.bias": (1, channels, 1),
        "bottleneck.running_std": (1,),
        "encoder.proj.weight": (channels, width),
        "encoder.proj.bias": (channels,),
        "decoder.proj.weight": (width, channels),
        "decoder.proj.bias": (width,),
    }
    for half, (out, into) in {"encoder": (width, patch), "decoder": (patch, width)}.items():
        prefix = f"{half}.blocks.0"
        shapes |= {
            f"{prefix}.new_tokens": (1, 1, width),
            f"{prefix}.mapping.weight_g": (out, 1, 1),
            f"{prefix}.mapping.weight_v": (out, into, 1),
            f"{prefix}.mapping.bias": (out,),
        }
        for layer in range(3):
            inner = f"{prefix}.transformers.{layer}"
            for norm, size in (("norm_attn", width), ("norm_ff", width), ("attn.q_norm", 64), ("attn.k_norm", 64)):
                shapes |= {f"{inner}.{norm}.alpha": (1,)}
                shapes |= {f"{inner}.{norm}.{kind}": (size,) for kind in ("gamma", "beta")}
            shapes |= {
                f"{inner}.attn.to_qkv.weight": (5 * width, width),
                f"{inner}.attn.to_out.weight": (width, width),
                f"{inner}.ff.proj_in.weight": (6 * width, width),
                f"{inner}.ff.proj_in.bias": (6 * width,),
                f"{inner}.ff.proj_out.weight": (width, 3 * width),
                f"{inner}.ff.proj_out.bias": (width,),
            }
    return shapes


def text_shapes() -> dict[str, tuple[int, ...]]:
    width = TEXT.width
    shapes: dict[str, tuple[int, ...]] = {"encoder.embed_tokens.weight": (TEXT.vocab_size, width)}
    shapes["encoder.norm.weight"] = (width,)
    for layer in range(TEXT.depth):
        prefix = f"encoder.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {
            f"{prefix}.{name}_layernorm.weight": (width,)
            for name in ("pre_self_attn", "post_self_attn", "pre_feedforward", "post_feedforward")
        }
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (TEXT.intermediate, width) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (width, TEXT.intermediate)
    return shapes


def pipeline_arrays() -> dict[str, dict[str, np.ndarray]]:
    """The tensors of every component."""
    shapes = {
        "transformer": transformer_shapes(),
        "vae": vae_shapes(),
        "text_encoder": text_shapes(),
        "duration_embedder": {"linear.weight": (48, 256), "linear.bias": (48,), "freqs": (128,)},
    }
    arrays = {
        component: {
            name: weight("same.running_std" if name.endswith("running_std") else f"{component}.{name}", shape)
            for name, shape in found.items()
        }
        for component, found in shapes.items()
    }
    arrays["transformer"]["rotary_pos_emb.inv_freq"] = (10_000.0 ** -(np.arange(0, 32, 2) / 32)).astype(np.float32)
    return arrays


def write_pipeline(folder: Path, arrays: dict[str, dict[str, np.ndarray]] | None = None, *, shards: int = 1) -> Path:
    """Write a pipeline folder; the transformer in so many files."""
    arrays = pipeline_arrays() if arrays is None else arrays
    write_json(folder / "model_index.json", {"_class_name": "StableAudio3Pipeline", "_diffusers_version": "0.40.0"})
    text = official_text_config(TEXT)
    for component, config in (
        ("transformer", TRANSFORMER),
        ("vae", VAE),
        ("duration_embedder", DURATION),
        ("text_encoder", text),
    ):
        write_json(folder / component / "config.json", config)
        stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
        entries = [array_entry(name, array) for name, array in arrays[component].items()]
        if shards == 1 or component != "transformer":
            write_tensors(folder / component / f"{stem}.safetensors", entries, {})
            continue
        places = {}
        for number in range(shards):
            name = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
            write_tensors(folder / component / name, entries[number::shards], {})
            places |= {entry.name: name for entry in entries[number::shards]}
        write_json(folder / component / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": places})
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "tokenizer" / "tokenizer.json", TOKENIZER)
    return folder


def write_json(path: Path, data: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), encoding="utf-8")


def check_sizes(config: ModelConfig) -> None:
    """The sizes above, as ours has them."""
    assert config.diffusion is not None
    dit, same = config.diffusion.dit, config.same
    assert (dit.width, dit.depth, dit.memory_tokens, dit.differential, dit.ff_mult) == (128, 2, 4, True, 4)
    assert (same.width, same.encoder_depth, same.decoder_depth, same.sine_gate_layers) == (128, 3, 3, 1)
    assert (same.patch_size, same.stride, same.latent_channels, same.attention) == (32, 16, 16, "sliding")
    assert (config.sample_rate, config.diffusion.text_encoder, config.diffusion.max_frames) == (8000, TEXT, 4096)
