"""Read the folder of a trained latent CLAP, and put one into a model, which then ranks what it makes [T6].

A folder of format "sa3-clap/1" carries the frozen text encoder that it was trained on. In a model only the two towers
are kept, in a file of their own: the text encoder is there already.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from sa3_mlx.common.files.atomic import write_text
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import FLOATS, TensorEntry, TensorFile, all_finite, tensors_hash, write_tensors
from sa3_mlx.common.schema import ConfigError, quoted

from .checkpoint import CLAP_FILE, CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, check_tensors, expected_tensors
from .config import FORMAT, LatentClapConfig, ModelConfig

CLAP_FORMAT = "sa3-clap/1"
TEXT_TENSORS = "text_encoder."  # of the frozen encoder in the folder
_SCALE = "log_scale"  # of cosines in training; order is the same without it
_OWN = "clap."  # of the tensors in a model


def read_clap(folder: Path) -> LatentClapConfig:
    """Read ``folder/config.json`` of a trained latent CLAP. Raises FileNotFoundError or ConfigError."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG_FILE} there; expected a folder made by 'sa3 train clap'")
    data = read_object(path)
    found = data.pop("format", None)
    if found != CLAP_FORMAT:
        raise ConfigError(
            f"{path}: format is {quoted(found)}, expected {CLAP_FORMAT!r}, a folder made by 'sa3 train clap'"
        )
    return LatentClapConfig.from_dict(data, where=str(path))


def add_clap(model: Path, clap: Path) -> str:
    """Put the latent CLAP of a folder into a model in place of the one that it has; return the hash of its file.

    The model's weights stay as they are. After every step of it the model is whole. Raises FileNotFoundError,
    ConfigError, and ValueError for a CLAP that does not belong to the model or is damaged.
    """
    config, about = ModelConfig.load(model), read_clap(clap)
    _check_belongs(model, config, clap, about)
    new = replace(config, clap=about)
    wanted = {name.removeprefix(_OWN): shape for name, shape in expected_tensors(new, ["clap"]).items()}
    with TensorFile.open(clap / WEIGHTS_FILE) as file:
        found = {name: shape for name, shape in file.shapes().items() if not name.startswith(TEXT_TENSORS)}
        check_tensors({**wanted, _SCALE: (1,)}, found, str(file.path))
        for name in wanted:
            dtype = file.info(name)[0]
            if dtype not in FLOATS or not all_finite(file.raw(name), dtype):
                raise ValueError(f"{file.path}: tensor {name} has values that are no finite floats; train it again")
        if config.clap is not None:
            write_text(model / CONFIG_FILE, replace(config, clap=None).to_json())
        entries = [TensorEntry(_OWN + name, *file.info(name), partial(file.raw, name)) for name in wanted]
        digest = write_tensors(model / CLAP_FILE, entries, {"format": FORMAT})
    write_text(model / CONFIG_FILE, new.to_json())
    return digest


def _check_belongs(model: Path, config: ModelConfig, clap: Path, about: LatentClapConfig) -> None:
    """Raise ValueError unless a latent CLAP was trained with autoencoder and text encoder of the model."""
    config.require_diffusion()
    for part, own in (("same", about.autoencoder), ("text_encoder", about.text_encoder)):
        found = tensors_hash(model / WEIGHTS_FILE, f"{part}.")
        if found != own:
            raise ValueError(
                f"{clap}: was trained with another {part}, {own}, than that of {model}, {found}: train one with this "
                "model, or put it into the one that this was quantized from"
            )
    if read_object(model / TOKENIZER_FILE) != read_object(clap / TOKENIZER_FILE):
        raise ValueError(f"{clap}: its tokenizer is not that of {model}: train one with this model")
