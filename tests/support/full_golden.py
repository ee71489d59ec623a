"""Checkpoints in the released sizes with the reproducible weights of the full goldens, made through our converter.

The recipe of the weights stays in the golden folder (``full/weights.py``) and is imported from there at run time.
Nothing is cached: the caller gives a folder, a temporary one, with room for twice the model.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

from sa3_convert import convert
from sa3_convert.text_config import official_text_config

from sa3_mlx.common.model.presets import PRESETS, T5GEMMA

# preset -> (key table, configuration) of the golden folder
CASES = {
    "small-music": ("small", "small"),
    "medium": ("medium", "medium"),
    "same-s": ("same-s", "same-s"),
    "same-l": ("same-l", "same-l"),
}
TEXT = "t5gemma-b-b-ul2"


def recipe(golden: Path) -> ModuleType:
    """``weights.py`` of the full goldens: ``tensor(name, shape)``, ``data(name, shape, scale)``."""
    spec = importlib.util.spec_from_file_location("full_golden_weights", golden / "full" / "weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_full_official(golden: Path, preset: str, folder: Path, *, dtype: str = "f32") -> Path:
    """The official checkpoint: 2.8 GB for small-music, 9.8 GB for medium, 0.4 GB for same-s, 3.4 GB for same-l.

    ``dtype`` f32, f16 or bf16 is that of model.safetensors; the text encoder is bfloat16. The tokenizer is the one of
    the tiny goldens, a stand-in.
    """
    weights = recipe(golden)
    table, configuration = CASES[preset]
    keys = golden / "full" / "keys"
    folder.mkdir(parents=True)
    rows = [(name, name, shape) for name, shape in weights.read_table(keys / f"{table}.txt")]
    weights.write_safetensors(folder / "model.safetensors", rows, dtype)
    shutil.copyfile(golden.parent / "spec" / "model_configs" / f"{configuration}.json", folder / "model_config.json")
    if PRESETS[preset].diffusion is not None:
        text = folder / TEXT
        text.mkdir()
        table_rows = weights.read_table(keys / f"{TEXT}.txt")
        rows = [(name, name, shape) for name, shape in table_rows if name.startswith("model.encoder.")]
        weights.write_safetensors(text / "model.safetensors", rows, "bf16")
        (text / "config.json").write_text(json.dumps(official_text_config(T5GEMMA)), encoding="utf-8")
        shutil.copyfile(golden / "tiny_t5gemma" / "tokenizer.json", text / "tokenizer.json")
    return folder


def full_checkpoint(golden: Path, preset: str, folder: Path, *, dtype: str = "f32") -> Path:
    """``folder/<preset>``: our checkpoint of the full goldens; the official one it came from is removed."""
    official = write_full_official(golden, preset, folder / f"{preset}-official", dtype=dtype)
    convert(official, folder / preset, name=preset, force=False, progress=None)
    shutil.rmtree(official)
    return folder / preset
