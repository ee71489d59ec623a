"""Training settings: a TOML preset or file, changed by ``--set key=value``, checked strictly.

A file may begin with ``base = "NAME"``, a preset of the same stage, and say what differs: its tables are laid over
those of the base, key by key.
"""

from __future__ import annotations

import functools
import json
import math
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from sa3_mlx.common.files.atomic import write_text
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.schema import Config, ConfigError, is_finite, listed, quoted, reason

from . import parallel

# These change where and how fast a run computes, not what; a run may go on with others.
FREE = (
    *("train.parallel", "train.accumulate", "train.checkpoint_blocks", "train.compile"),
    *("machine", "machine.device", "machine.processes"),
)
LENGTH = "train.steps"  # a run may be lengthened
RUN_FORMAT = "sa3-run/2"  # from it on, the belongings of a run are complete
_LARGEST = 2**62  # of any number
PRESETS = Path(__file__).parents[1] / "presets"
# Settings that earlier versions had, with the only value that is left.
ANY = object()  # of a number that only mattered with another one
GONE: dict[str, object] = {
    "variants.train_encoder": 1.0,
    "variants.latent_mask": 0.0,
    "variants.other_stride": 0,
    "variants.other_every": ANY,
    "variants": {},
    "adversarial.mode": "full",
    "adversarial.noise.masked": False,
    "adversarial.noise.masked_db": ANY,
    "adversarial.noise.instance": False,
    "adversarial.noise": {},
    "adversarial.discriminators.convolutional.pqmf_bands": [],
    "adversarial.discriminators.convolutional.chroma_bins": 0,
    "adversarial.discriminators.convolutional.chroma_size": ANY,
    "adversarial.discriminators.transformer.chroma_views": [],
    "adversarial.discriminators.transformer.chroma_bins": ANY,
    "adversarial.discriminators.transformer.chroma_size": ANY,
    "adversarial.discriminators.transformer.chroma_hop": ANY,
    "coupling": "off",
    "normalize": "none",
    "times.sampler": "truncated_logit_normal",
    "times.one_shot": 0.0,
    "times.shift": {"type": "full", "start": 0.5, "end": 1.15, "rate": 0.0},
    "optimizer.muon": None,
    "generator.muon": None,
    "discriminator.muon": None,
    "weight_power": 0.0,
    "head.kind": "conv",
    "weights.feature_matching": 0.0,
    "contrastive_scale": 1.0,
    "own_sample_steps": 1,
    "discriminator_steps": 1,
}
TEACHER = ("steps", "guidance", "apg")  # of the teacher's table, before it had one for its sampling
Settings = TypeVar("Settings", bound=Config)
Table = dict[str, Any]
Belongings = Mapping[str, str | int | None]  # what a run must go on with beside its settings, hashes mostly


def check(config: Config, low: float, high: float, *names: str) -> None:
    """Raises ConfigError for a field of a settings table outside low..high."""
    for name in names:
        value, most = getattr(config, name), min(high, _LARGEST)
        if not low <= value <= most:
            allowed = (
                f"at least {_short(low)}" if high == math.inf and value < low else f"{_short(low)} to {_short(most)}"
            )
            raise ConfigError(f"{name} is {quoted(value)}: allowed is {allowed}")


def _short(bound: float) -> str:
    return f"{bound:g}" if is_finite(bound) else quoted(bound)


def preset_names(stage: str) -> list[str]:
    """List the presets of a stage."""
    return sorted(path.stem for path in (PRESETS / stage).glob("*.toml"))


def load_settings(kind: type[Settings], stage: str, source: str, changes: tuple[str, ...]) -> Settings:
    """Read a preset by its name, or a TOML file; ``changes`` are "key=value" or "table.key=value", values in TOML.

    Raises ConfigError for an unknown preset, key or value, naming it.
    """
    data = _read(stage, source, seen=())
    for change in changes:
        _apply(data, change, kind)
    try:
        upgrade(data)
    except ConfigError as error:
        raise ConfigError(f"{stage}: {error}") from error
    return kind.from_dict(data, where=stage)


def _read(stage: str, source: str, seen: tuple[str, ...]) -> Table:
    path = Path(source) if source.endswith(".toml") else PRESETS / stage / f"{source}.toml"
    if not path.is_file():
        raise ConfigError(
            f"no settings {quoted(source)} for {stage}; presets: {', '.join(preset_names(stage))}, or a .toml file"
        )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of the text, its encoding, or a number of thousands of digits
        raise ConfigError(f"{path}: not valid TOML ({reason(error)})") from error
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str) or base in seen:
        raise ConfigError(f"{path}: base is {quoted(base)}: expected a preset of {stage} that does not lead back here")
    return _overlaid(_read(stage, base, (*seen, source, base)), data)


def _overlaid(base: Table, over: Table) -> Table:
    both = {k: _overlaid(base[k], v) for k, v in over.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **over, **both}


def _apply(data: Table, change: str, kind: type[Config]) -> None:
    key, separator, text = change.partition("=")
    if not separator:
        raise ConfigError(f"--set {quoted(change)}: expected key=value, for example train.steps=100")
    key = key.strip()
    *tables, name = key.split(".")
    table, shape = data, _fields(kind)
    for part in tables:
        inner, shape = table.get(part), _fields(shape.get(part))
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {quoted(change)}: there is no table {quoted(part)}")
        table = inner
    value: object
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    allowed = dict.fromkeys([*table, *shape])  # a field that has a default need not be in the preset
    known = name in allowed or key in GONE or key in (f"teacher.{former}" for former in TEACHER)
    if not known and not isinstance(value, dict):  # a table may switch on what the preset leaves out
        raise ConfigError(f"--set {quoted(change)}: unknown key {quoted(name)}; allowed: {', '.join(allowed)}")
    table[name] = value


def _fields(hint: Any) -> dict[str, Any]:
    """Return the types of the fields of a configuration, or of one that may be None; of anything else none."""
    options = typing.get_args(hint) or (hint,)
    kind = next((option for option in options if isinstance(option, type) and issubclass(option, Config)), None)
    return {} if kind is None else typing.get_type_hints(kind)


def upgrade(data: Table) -> None:
    """Bring settings as earlier versions wrote them up to date, in place.

    Raises ConfigError for a setting that went with another value than the one that is left.
    """
    teacher = data.get("teacher")
    if isinstance(teacher, dict) and not {*TEACHER}.isdisjoint(teacher):
        sampling = teacher.setdefault("sampling", {"sampler": "dpmpp", "guidance": {}})
        if not isinstance(sampling, dict):
            raise ConfigError(f"teacher.sampling is {quoted(sampling)}: expected a table")
        if not isinstance(sampling.setdefault("guidance", {}), dict):
            sampling["guidance"] = {"scale": sampling["guidance"]}
        for name in (name for name in TEACHER if name in teacher):
            table = sampling if name == "steps" else sampling["guidance"]
            table["scale" if name == "guidance" else name] = teacher.pop(name)
        if sampling["guidance"].get("scale") == 1:
            sampling["guidance"] = {}
    shares = _table(data, "clips").get("mask_shares", [])
    if isinstance(shares, list) and len(shares) == 4 and not shares[3]:  # the fourth kind of masks went
        data["clips"]["mask_shares"] = shares[:3]
    for key, left in GONE.items():
        *tables, name = key.split(".")
        table = functools.reduce(_table, tables, data)
        if name in table and (value := table.pop(name)) not in (left, None) and left is not ANY:
            raise ConfigError(f"{key} is {quoted(value)}: this setting went, only {left!r} is left; leave it out")


def _table(data: Table, name: str) -> Table:
    """Return a table of a table, an empty one in place of anything else."""
    found = data.get(name)
    return found if isinstance(found, dict) else {}


def read_settings(folder: Path) -> Table:
    """Read ``settings.json`` of a run folder, nothing where there is none. Raises ConfigError for that of something
    else."""
    path = folder / "settings.json"
    if not path.is_file():
        return {}
    stored = read_object(path)
    if not isinstance(stored.get("train"), dict):
        raise ConfigError(f"{path}: these are not the settings of a run; choose another folder")
    return stored


def keep_settings(folder: Path, config: Config, belongings: Belongings, *, resumed: bool) -> None:
    """Write the settings and belongings of a run to ``settings.json``; None and "" among the latter do not count.

    Raises ConfigError when a run goes on with others, as ``check_settings``, and for a file that is not of a run;
    ValueError for belongings that are called as a setting is.
    """
    path = folder / "settings.json"
    if alike := belongings.keys() & config.to_dict().keys():
        raise ValueError(f"belongings with the names of settings: {listed(alike)}")
    if not parallel.is_first():
        return
    read_settings(folder)
    if resumed and path.is_file() and not check_settings(folder, config, belongings):
        return
    ours = {name: value for name, value in belongings.items() if value}
    write_text(path, json.dumps({"format": RUN_FORMAT, **config.to_dict(), **ours}, sort_keys=True) + "\n")


def check_settings(folder: Path, config: Config, belongings: Belongings) -> bool:
    """Compare settings and belongings with those of the run in a folder; tell whether the file says something else.

    Raises ConfigError for others, but for more steps and what ``FREE`` lists, and for a file that is not of a run. They
    are compared as configurations, so a file that an earlier version wrote serves, too; belongings that it did not know
    yet are taken as they are.
    """
    path = folder / "settings.json"
    ours = {name: value for name, value in belongings.items() if value}
    stored = read_settings(folder)
    complete = stored.pop("format", None) == RUN_FORMAT
    try:
        upgrade(stored)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if "start" in config.to_dict() and str(stored.get("start")).startswith("sha256:"):  # it overwrote the setting
        stored |= {"start_weights": stored["start"], "start": config.to_dict()["start"]}
    settings = {field.name: stored.pop(field.name) for field in fields(config) if field.name in stored}
    old = _flat({**type(config).from_dict(settings, where=str(path)).to_dict(), **stored})
    new = _flat({**config.to_dict(), **ours})
    allowed = {*FREE, *(() if complete else ours.keys() - stored.keys())}
    if new[LENGTH] > old[LENGTH]:
        allowed.add(LENGTH)
    other = [key for key in sorted(old | new) if key not in allowed and old.get(key) != new.get(key)]
    if other:
        key, more = other[0], f" (and {len(other) - 1} more)" if len(other) > 1 else ""
        was, now = quoted(old.get(key)), quoted(new.get(key))
        raise ConfigError(
            f"{folder} holds a run with {listed([key])} = {was}, now it is {now}{more}; choose another folder or give "
            "the same settings"
        )
    return old != new or not complete


def _flat(tree: Table, prefix: str = "") -> dict[str, Any]:
    """Join the names of tables: {"train": {"seed": 0}} -> {"train.seed": 0}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat
