"""Keep in a file beside an official layout what it has no place for: usual sampling, dial, head-room, examples."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sa3_mlx.common.files.atomic import write_json
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.dial import Dial
from sa3_mlx.common.model.sampling import Sampling

from .fields import Fields
from .model_config import HEAD_ROOM_SECONDS

BESIDE_FILE = "sa3.json"
_FORMAT = "sa3-beside/1"


def write_beside(folder: Path, config: ModelConfig) -> None:
    """Write the file where the model has anything to say there. Raises OSError where the disk refuses."""
    values: dict[str, Any] = {}
    if config.sampling is not None:
        values["sampling"] = config.sampling.to_dict()
    if config.dial is not None:
        values["dial"] = config.dial.to_dict()
    if config.diffusion is not None and config.diffusion.head_room_seconds != HEAD_ROOM_SECONDS:
        values["head_room_seconds"] = config.diffusion.head_room_seconds
    if config.examples:
        values["examples"] = list(config.examples)
    if values:
        write_json(folder / BESIDE_FILE, {"format": _FORMAT, **values})


def read_beside(folder: Path, config: ModelConfig) -> ModelConfig:
    """Return the configuration with what the file says, if there is one. Raises ConfigError for a damaged one."""
    path = folder / BESIDE_FILE
    if not path.is_file():
        return config
    fields = Fields(read_object(path), str(path))
    fields.constant("format", _FORMAT)
    sampling, dial = fields.optional("sampling", dict), fields.optional("dial", dict)
    head_room, examples = fields.optional("head_room_seconds", float), fields.optional("examples", list)
    fields.done()
    if sampling is not None:
        config = replace(config, sampling=Sampling.from_dict(sampling, where=f"{path}: sampling"))
    if dial is not None:
        config = replace(config, dial=Dial.from_dict(dial, where=f"{path}: dial"))
    if head_room is not None:
        config = replace(config, diffusion=replace(config.require_diffusion(), head_room_seconds=head_room))
    if examples is not None:
        config = ModelConfig.from_dict({**config.to_dict(), "examples": examples}, where=str(path))
    return config
