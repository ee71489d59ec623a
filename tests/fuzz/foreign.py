"""Readers of other programs' models and adapters: archives of arrays, SentencePiece, pipelines, PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from sa3_convert import convert, open_adapter, write_peft
from sa3_convert.port.npz import ArrayFile
from sa3_convert.port.sentencepiece import sentencepiece_model, tokenizer_json

from sa3_mlx.common.model.config import ModelConfig
from tests.support.adapters import adapter_config, random_adapter
from tests.support.foreign.pipeline_files import write_pipeline
from tests.support.foreign.port_files import PORT, tokenizer_data, write_port_files
from tests.support.tiny import TINY
from tests.support.tiny_checkpoint import write_checkpoint

from .target import Given, Target


def _archive(folder: Path) -> dict[str, str]:
    arrays = {"a.weight": np.ones((3, 4), np.float32), "b": np.zeros((1, 0, 1), np.float16)}
    np.savez(folder / "x.npz", META=np.frombuffer(b"{}", np.uint8), **arrays)
    np.savez_compressed(folder / "y.npz", **arrays)
    return {"x.npz": "bytes", "y.npz": "bytes"}


def _read_archive(given: Given) -> None:
    with ArrayFile.open(given.path) as file:
        for name in file.names():
            file.read(name)


def _model(folder: Path) -> dict[str, str]:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(tokenizer_data(), "made"))
    return {"tokenizer.model": "bytes"}


def _read_model(given: Given) -> None:
    tokenizer_json(given.path.read_bytes(), str(given.path))


def _tokenizer(folder: Path) -> dict[str, str]:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_data()))
    return {"tokenizer.json": "json"}


def _read_tokenizer(given: Given) -> None:
    from sa3_mlx.common.files.objects import read_object

    sentencepiece_model(read_object(given.path), str(given.path))


def _port(folder: Path) -> dict[str, str]:
    write_port_files(folder, PORT["tiny-s"])
    return {"model_config.json": "json", "same_s_decoder_f32.npz": "bytes"}


def _pipeline(folder: Path) -> dict[str, str]:
    write_pipeline(folder, shards=2)
    index = "transformer/diffusion_pytorch_model.safetensors.index.json"
    return {
        "transformer/config.json": "json",
        "vae/config.json": "json",
        "scheduler/scheduler_config.json": "json",
        index: "json",
    }


def _read_folder(given: Given) -> None:
    convert(given.folder, given.folder / "ours", name="x", force=True, progress=None)


def _peft(folder: Path) -> dict[str, str]:
    model = write_checkpoint(folder / "model", TINY["tiny-l"])
    adapter = random_adapter(model, adapter_config("lora", include=("layers.0.self_attn",)))
    write_peft(folder / "peft", adapter, TINY["tiny-l"])
    return {"peft/adapter_config.json": "json", "peft/adapter_model.safetensors": "safetensors"}


def _read_peft(given: Given) -> None:
    open_adapter(given.folder / "peft", ModelConfig.load(given.folder / "model"))


_PORT_FILES = ("convert/port/read.py", "convert/port/layout.py")
_PEFT_FILES = ("convert/peft.py",)
TARGETS = (
    Target("archive", _archive, _read_archive, ("convert/port/npz.py",)),
    Target("sentencepiece", _model, _read_model, ("convert/port/sentencepiece.py",), forms=False),
    Target("tokenizer-out", _tokenizer, _read_tokenizer, ("convert/port/sentencepiece.py",), forms=False),
    Target("port", _port, _read_folder, _PORT_FILES, names_file=False, forms=False, seconds=10.0),
    Target(
        "diffusers",
        _pipeline,
        _read_folder,
        ("convert/diffusers/config.py", "convert/diffusers/read.py"),
        forms=False,
        names_file=False,
        seconds=10.0,
    ),
    Target("peft", _peft, _read_peft, _PEFT_FILES, names_file=False, forms=False),
)
