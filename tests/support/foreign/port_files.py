"""Files of the official MLX port with random weights, written with numpy alone: what our reader must understand."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from sa3_convert.export_config import official_model_config
from sa3_convert.port.sentencepiece import SPACE, sentencepiece_model

from sa3_mlx.common.model.config import ModelConfig
from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import weight

VOCABULARY = 320
_S, _L = (TINY[name] for name in ("tiny-s", "tiny-l"))
PORT = {  # with enough tokens for the 256 bytes
    name: replace(
        config,
        diffusion=replace(
            config.require_diffusion(),
            text_encoder=replace(config.require_diffusion().text_encoder, vocab_size=VOCABULARY),
        ),
    )
    for name, config in {"tiny-s": _S, "tiny-l": _L}.items()
}


def tokenizer_data() -> dict[str, object]:
    """A tokenizer.json of Gemma's kind with a few joins."""
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", *(f"<0x{number:02X}>" for number in range(256))]
    vocabulary += [*"abcdehkst", SPACE]
    merges = [("k", "e"), ("b", "e"), (SPACE, "s"), ("be", "at"), ("a", "t"), ("ke", "d")]
    vocabulary += ["".join(pair) for pair in merges]
    special = dict.fromkeys(vocabulary[:4], True) | {"\n\n": False}
    return {
        "version": "1.0",
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
        "added_tokens": [
            {
                "id": vocabulary.index(text),
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": hidden,
            }
            for text, hidden in special.items()
        ],
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {text: number for number, text in enumerate(vocabulary)},
            "merges": merges,
        },
    }


def port_arrays(config: ModelConfig) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of the four files, by file; written down from the port's modules, not from our table of names."""
    diffusion = config.require_diffusion()
    dit, same, text = diffusion.dit, config.same, diffusion.text_encoder
    width, channels = dit.width, same.latent_channels
    rows = (5, 2, 3) if dit.differential else (3, 1, 2)
    arrays: dict[str, tuple[int, ...]] = {
        "preprocess_conv.weight": (channels, 1, channels),
        "postprocess_conv.weight": (channels, 1, channels),
        "to_cond_embed.0.weight": (width, text.width),
        "to_cond_embed.2.weight": (width, width),
        "to_global_embed.0.weight": (width, text.width),
        "to_global_embed.2.weight": (width, width),
        "to_timestep_embed.0.weight": (width, 256),
        "to_timestep_embed.0.bias": (width,),
        "to_timestep_embed.2.weight": (width, width),
        "to_timestep_embed.2.bias": (width,),
        "transformer.project_in.weight": (width, channels),
        "transformer.project_out.weight": (channels, width),
        "transformer.memory_tokens": (dit.memory_tokens, width),
        "transformer.global_cond_embedder.0.weight": (width, width),
        "transformer.global_cond_embedder.0.bias": (width,),
        "transformer.global_cond_embedder.2.weight": (6 * width, width),
        "transformer.global_cond_embedder.2.bias": (6 * width,),
        "cond.padding_embedding": (text.width,),
        "cond.seconds_total_weight": (text.width, 256),
        "cond.seconds_total_bias": (text.width,),
    }
    for layer in range(dit.depth):
        prefix = f"transformer.layers.{layer}"
        arrays |= {
            f"{prefix}.pre_norm.weight": (width,),
            f"{prefix}.cross_attend_norm.weight": (width,),
            f"{prefix}.ff_norm.weight": (width,),
            f"{prefix}.to_scale_shift_gate": (6 * width,),
            f"{prefix}.self_attn.to_qkv.weight": (rows[0] * width, width),
            f"{prefix}.self_attn.to_out.weight": (width, width),
            f"{prefix}.cross_attn.to_q.weight": (rows[1] * width, width),
            f"{prefix}.cross_attn.to_kv.weight": (rows[2] * width, width),
            f"{prefix}.cross_attn.to_out.weight": (width, width),
            **{f"{prefix}.{a}_attn.{n}_norm.weight": (64,) for a in ("self", "cross") for n in "qk"},
            f"{prefix}.ff.ff.0.proj.weight": (8 * width, width),
            f"{prefix}.ff.ff.0.proj.bias": (8 * width,),
            f"{prefix}.ff.ff.2.weight": (width, 4 * width),
            f"{prefix}.ff.ff.2.bias": (width,),
            f"{prefix}.to_local_embed.seq.0.weight": (width, channels + 1),
            f"{prefix}.to_local_embed.seq.0.bias": (width,),
            f"{prefix}.to_local_embed.seq.2.weight": (width, width),
            f"{prefix}.to_local_embed.seq.2.bias": (width,),
        }
    encoder = {"running_std": (1,), "scaling_factor": (1, channels, 1), "bias": (1, channels, 1)}
    patch, kernel = config.audio_channels * same.patch_size, same.decoder_kernel
    encoder |= _same_half(same.width, same.encoder_depth, (same.width, patch, 1), (channels, same.width), "project_out")
    decoder = {"running_std": (1,)}
    decoder |= _same_half(
        same.width, same.decoder_depth, (patch, same.width, kernel), (same.width, channels), "project_in"
    )
    encoded = {"embed_tokens.weight": (text.vocab_size, text.width), "norm.weight": (text.width,)}
    for layer in range(text.depth):
        prefix = f"layers.{layer}"
        encoded |= {f"{prefix}.self_attn.{name}_proj.weight": (text.width, text.width) for name in "qkvo"}
        encoded |= {
            f"{prefix}.{name}_layernorm.weight": (text.width,)
            for name in ("pre_self_attn", "post_self_attn", "pre_feedforward", "post_feedforward")
        }
        encoded |= {f"{prefix}.mlp.{name}_proj.weight": (text.intermediate, text.width) for name in ("gate", "up")}
        encoded[f"{prefix}.mlp.down_proj.weight"] = (text.width, text.intermediate)
    shapes = {"dit": (arrays, np.float16), "encoder": (encoder, np.float32), "decoder": (decoder, np.float32)}
    shapes["text"] = (encoded, np.float16)
    return {
        role: {
            name: weight("same.bottleneck.running_std" if name == "running_std" else f"{role}.{name}", shape).astype(t)
            for name, shape in found.items()
        }
        for role, (found, t) in shapes.items()
    }


def _same_half(width: int, depth: int, mapping: tuple[int, ...], outer: tuple[int, int], name: str):
    shapes: dict[str, tuple[int, ...]] = {
        "new_tokens": (1, 1, width),
        "mapping.weight": mapping,
        "mapping.bias": mapping[:1],
        f"{name}.weight": outer,
        f"{name}.bias": outer[:1],
    }
    for layer in range(depth):
        prefix = f"blocks.{layer}"
        for norm, size in (("pre_norm", width), ("ff_norm", width), ("attn.q_norm", 64), ("attn.k_norm", 64)):
            shapes |= {f"{prefix}.{norm}.alpha": (1,)}
            shapes |= {f"{prefix}.{norm}.{kind}": (size,) for kind in ("gamma", "beta")}
        shapes |= {
            f"{prefix}.attn.to_qkv.weight": (5 * width, width),
            f"{prefix}.attn.to_out.weight": (width, width),
            f"{prefix}.ff.glu_proj.weight": (6 * width, width),
            f"{prefix}.ff.glu_proj.bias": (6 * width,),
            f"{prefix}.ff.proj_out.weight": (width, 3 * width),
            f"{prefix}.ff.proj_out.bias": (width,),
        }
    return shapes


def names_of(config: ModelConfig) -> dict[str, str]:
    """The file of every role."""
    kind = "s" if config.same.attention == "chunked" else "l"
    return {
        "dit": f"dit_{config.name}_f16.npz",
        "encoder": f"same_{kind}_encoder_f32.npz",
        "decoder": f"same_{kind}_decoder_f32.npz",
        "text": "t5gemma_f16.npz",
    }


def write_port_files(folder: Path, config: ModelConfig, arrays: dict[str, dict[str, np.ndarray]] | None = None) -> Path:
    """The four files and a model_config.json for the sizes -> the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = port_arrays(config) if arrays is None else arrays
    for role, name in names_of(config).items():
        blobs = {} if role != "text" else text_blobs(config)
        np.savez(folder / name, **{**blobs, **arrays[role]})  # what a test gives comes last
    (folder / "model_config.json").write_text(json.dumps(official_model_config(config)))
    return folder


def text_blobs(config: ModelConfig) -> dict[str, np.ndarray]:
    """META and TOKENIZER_MODEL."""
    text = config.require_diffusion().text_encoder
    meta = {
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "num_key_value_heads": text.heads,
        "head_dim": text.width // text.heads,
        "query_pre_attn_scalar": text.width // text.heads,
        "intermediate_size": text.intermediate,
        "vocab_size": text.vocab_size,
    }
    model = sentencepiece_model(tokenizer_data(), "made")
    return {
        "META": np.frombuffer(json.dumps(meta).encode(), np.uint8),
        "TOKENIZER_MODEL": np.frombuffer(model, np.uint8),
    }


def npy(array: np.ndarray, **options: object) -> bytes:
    """The bytes of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)  # type: ignore[arg-type]
    return buffer.getvalue()
