"""Find the official checkpoint that a user points at: a folder or a .safetensors file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.config import FORMAT

from .fields import about
from .model_config import TextLocation, text_location

MODEL_CONFIG_FILE = "model_config.json"


@dataclass(frozen=True, kw_only=True)
class OfficialSource:
    """Describe an official checkpoint on disk."""

    label: str  # for the report
    folder: Path  # of model_config.json
    weights: Path
    model_config: Any  # parsed model_config.json
    text: TextFolder | None  # None for an autoencoder alone
    name_hint: str


@dataclass(frozen=True, kw_only=True)
class TextFolder:
    """Locate a text encoder and its tokenizer on disk."""

    weights: Path
    config: Any  # parsed config.json
    tokenizer: Path


def find_source(source: str | Path) -> OfficialSource:
    """Read everything but the weights. Raises FileNotFoundError and ValueError."""
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source}: no such folder or file; released models are had with 'sa3 get'")
    folder, label = path if path.is_dir() else path.parent, str(source)
    weights = path if path.is_file() else None  # None: the one in the folder
    if is_ours(folder):
        raise ValueError(f"{label}: already in the sa3 format; use the folder as it is")
    if weights is not None and weights.suffix != ".safetensors":
        raise ValueError(f"{weights}: only .safetensors files can be read (pickled checkpoints can run code)")
    config_path = folder / MODEL_CONFIG_FILE
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder}: no {MODEL_CONFIG_FILE} there; it must lie beside the weights")
    model_config = read_object(config_path)
    with about(label):
        location = text_location(model_config)
    return OfficialSource(
        label=label,
        folder=folder,
        weights=weights or _weights_in(folder),
        model_config=model_config,
        text=None if location is None else _text_folder(folder, location),
        name_hint=_name_hint(folder, location, model_config),
    )


def is_ours(folder: Path) -> bool:
    """Tell whether the folder is a checkpoint of format sa3."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        return False
    try:
        return read_object(path).get("format") == FORMAT
    except (ValueError, OSError):
        return False


def _weights_in(folder: Path) -> Path:
    if (folder / WEIGHTS_FILE).is_file():
        return folder / WEIGHTS_FILE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found)
        raise ValueError(f"{folder}: no {WEIGHTS_FILE}, and several other weight files ({names}); give one of them")
    raise FileNotFoundError(f"{folder}: no {WEIGHTS_FILE} there")


def _text_folder(folder: Path, location: TextLocation) -> TextFolder:
    """Find the three files of a text encoder. Raises FileNotFoundError and ValueError, which name the file."""
    text = folder / location.folder
    for name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE):
        if not (text / name).is_file():
            what = "tokenizer" if name == TOKENIZER_FILE else "text encoder"
            origin = f" (it comes with https://huggingface.co/{location.repo_id})" if location.repo_id else ""
            raise FileNotFoundError(f"{text}: no {name}, so the {what} is missing{origin}")
    tokenizer = read_object(text / TOKENIZER_FILE)
    if not isinstance(tokenizer.get("model"), dict):
        raise ValueError(f"{text / TOKENIZER_FILE}: not a tokenizer of the tokenizers library (no 'model' in it)")
    return TextFolder(
        weights=text / WEIGHTS_FILE, config=read_object(text / CONFIG_FILE), tokenizer=text / TOKENIZER_FILE
    )


def _name_hint(folder: Path, location: TextLocation | None, model_config: Any) -> str:
    """Turn 'stabilityai/stable-audio-3-small-music' into 'small-music'; without a repository take the folder's name."""
    if location is None or location.repo_id is None:
        return folder.resolve().name.lower() or "model"
    name = location.repo_id.rsplit("/", 1)[-1].lower().removeprefix("stable-audio-3-")
    diffusion = model_config["model"].get("diffusion")
    base = isinstance(diffusion, dict) and diffusion.get("diffusion_objective") == "rectified_flow"
    return f"{name}-base" if base and not name.endswith("-base") else name  # base files carry the other one's repo_id
