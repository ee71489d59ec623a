"""Training settings: a TOML preset or file, changed by ``--set key=value``, checked strictly."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import TypeVar

from sa3_mlx.common.schema import Config, ConfigError

PRESETS = Path(__file__).parents[1] / "presets"
Settings = TypeVar("Settings", bound=Config)


def check(config: Config, low: float, high: float, *names: str) -> None:
    """Raises ConfigError for a field of a settings table outside low..high."""
    for name in names:
        value = getattr(config, name)
        if not low <= value <= high:
            allowed = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise ConfigError(f"{name} is {value!r}: allowed is {allowed}")


def preset_names(stage: str) -> list[str]:
    return sorted(path.stem.removeprefix(f"{stage}-") for path in PRESETS.glob(f"{stage}-*.toml"))


def load_settings(kind: type[Settings], stage: str, source: str, changes: tuple[str, ...]) -> Settings:
    """``source`` is a preset name or a TOML file; ``changes`` are "key=value" or "table.key=value", values in TOML.

    Raises ConfigError for an unknown preset, key or value, naming it.
    """
    path = Path(source) if source.endswith(".toml") else PRESETS / f"{stage}-{source}.toml"
    if not path.is_file():
        raise ConfigError(
            f"no settings {source!r} for {stage}; presets: {', '.join(preset_names(stage))}, or a .toml file"
        )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from error
    for change in changes:
        _apply(data, change)
    return kind.from_dict(data, where=stage)


def _apply(data: dict[str, object], change: str) -> None:
    key, separator, text = change.partition("=")
    if not separator:
        raise ConfigError(f"--set {change!r}: expected key=value, for example train.steps=100")
    *tables, name = key.strip().split(".")
    table = data
    for part in tables:
        inner = table.get(part)
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {change!r}: there is no table {part!r}")
        table = inner
    value: object
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    if name not in table and not isinstance(value, dict):  # a table may switch on what the preset leaves out
        raise ConfigError(f"--set {change!r}: unknown key {name!r}; allowed: {', '.join(table)}")
    table[name] = value


def to_json(config: Config) -> str:
    """Settings as they are stored beside a run and compared on resume."""
    return json.dumps(config.to_dict(), sort_keys=True)
