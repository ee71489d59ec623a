"""Write a model of ours as the .npz files of the official MLX port."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np

from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import OnTensor, TensorEntry, TensorFile, all_finite, file_hash, watched
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE, check_tensors, expected_tensors
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.quant.format import Quantization

from ..beside import write_beside
from ..export_config import official_model_config
from ..folder import check_out, check_space, report_of
from ..report import Report
from ..source import MODEL_CONFIG_FILE
from ..text_config import official_text_config
from .layout import META, PARTS, ROLES, STORED, TOKENIZER, ArrayPlace, Role, also_in, file_names, is_known, places
from .npz import Blob, write_arrays
from .read import find_port
from .sentencepiece import sentencepiece_model

_META_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "attn_logit_softcapping",
    "query_pre_attn_scalar",
)


def export_port(folder: Path, out: Path, *, force: bool, progress: OnTensor | None = None) -> Report:
    """Write a checkpoint of ours as the files that the official MLX port loads.

    The DiT and the text encoder are stored in half precision and SAME in single, as the port names its files; what the
    port does not read (model_config.json, sa3.json) lies beside, so that the way back needs no name. Raises
    FileNotFoundError, ValueError and OSError with a one-line message: for a quantized model, for one of sizes that the
    port has no modules for, and for a tokenizer that SentencePiece cannot express.
    """
    config = ModelConfig.load(folder)
    if not is_known(config):
        raise ValueError(f"{config.name}: the official MLX port has modules for the sizes of small and medium only")
    return write_port(folder, out, config, force=force, progress=progress)


def write_port(folder: Path, out: Path, config: ModelConfig, *, force: bool, progress: OnTensor | None) -> Report:
    """Do so for a model of any size."""
    start = time.monotonic()
    check_out(out, force=force, replaceable=lambda path: find_port(path) is not None)
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        if Quantization.read(file) is not None:
            raise ValueError(f"{folder}: is quantized; export the model that it was made from")
        check_tensors(expected_tensors(config, PARTS), file.shapes(), str(file.path))
        path = folder / TOKENIZER_FILE
        blobs = (Blob(META, _meta(config)), Blob(TOKENIZER, sentencepiece_model(read_object(path), str(path))))
        listing = [
            (role, _entry(place, role, file))
            for role in ROLES
            for place in places(config)
            if role in (place.role, also_in(place))
        ]
        entries = [entry for _, entry in listing]
        check_space(out, entries)
        roles = [role for role, _ in listing]
        turns = list(zip(roles, watched(entries, progress), strict=True))
        with new_folder(out.absolute()) as new:
            for role in ROLES:
                arrays: list[TensorEntry | Blob] = [entry for own, entry in turns if own == role]
                write_arrays(new / file_names(config)[role], [*arrays, *(blobs if role == "text" else ())])
            write_json(new / MODEL_CONFIG_FILE, official_model_config(config))
            write_beside(new, config)
            digest = file_hash(new / file_names(config)["dit"])
    return report_of(config.name, str(folder), out, PARTS, entries, digest, start=start)


def _meta(config: ModelConfig) -> bytes:
    encoder = official_text_config(config.require_diffusion().text_encoder)["encoder"]
    return json.dumps({name: encoder[name] for name in _META_FIELDS} | {"pad_token_id": 0}).encode()


def _entry(place: ArrayPlace, role: Role, file: TensorFile) -> TensorEntry:
    dtype = "F32" if place.name.startswith("cond.") else STORED[role]

    def load() -> np.ndarray:
        array = file.raw(place.pair.ours) if file.info(place.pair.ours)[0] == dtype else file.read(place.pair.ours)
        if place.pair.layout == "weight_norm" and place.shape[2] > 1:
            array = array.reshape(place.shape[0], place.shape[2], place.shape[1]).transpose(0, 2, 1)
        with np.errstate(over="ignore"):
            array = np.ascontiguousarray(array, np.float16 if dtype == "F16" else np.float32)
        if not all_finite(array, dtype):
            raise ValueError(
                f"{file.path}: tensor {place.pair.ours} has values beyond half precision, which the port has"
            )
        return array.reshape(place.shape)

    return TensorEntry(place.name, dtype, place.shape, load)
