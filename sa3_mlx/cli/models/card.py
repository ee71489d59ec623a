"""Write the model card of a model: what it is, whose licences it is under, what it was made from, how it is used."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa3_mlx.cli.fingerprint import clap_fingerprint
from sa3_mlx.common.files.objects import read_object
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.installed import HUB, Model
from sa3_mlx.common.licences import RELEASED, Licence, known, named
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.model.lengths import longest
from sa3_mlx.common.model.presets import REPOSITORIES
from sa3_mlx.common.origin import Origin, read_origin
from sa3_mlx.common.version import version

from .listing import parameters

QUANTIZATION_FILE, PARENTS_FILE = "quantization.json", "parents.json"


@dataclass(frozen=True, kw_only=True)
class Described:
    """Hold what a card says about a model beyond its configuration."""

    model: Model
    hash: str  # of its weights
    origin: Origin | None
    own: str | None  # licence that the user gives it
    parents: tuple[Licence, ...]  # licences of what it was made from


def describe_for_card(model: Model, digest: str, own: str | None) -> Described:
    """Find the licences of what a model was made from. Raises ValueError where nothing says any."""
    origin = read_origin(model.folder)
    parents: tuple[Licence, ...] = ()
    if origin is not None:
        parents = tuple(known(entry.id) or named(entry.name, entry.page) for entry in origin.licences)
    elif model.config.name in REPOSITORIES:
        parents = RELEASED
    if not parents and own is None:
        raise ValueError(
            f"{model.name}: nothing says under which licence it may be passed on; give --licence NAME, such as mit"
        )
    return Described(model=model, hash=digest, origin=origin, own=own, parents=parents)


def card(described: Described, repository: str) -> str:
    """Return the text of README.md: front matter of the hub, then what people read."""
    model, config = described.model, described.model.config
    licence = described.own or described.parents[0].id
    head: dict[str, Any] = {
        "library_name": "sa3",
        "pipeline_tag": "text-to-audio",
        "license": "other",
        "license_name": licence,
        "tags": ["sa3", "mlx", "stable-audio-3"],
    }
    if described.origin is not None:
        head["base_model"] = described.origin.repository
    name = repository.split("/")[1]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", "", f"# {name}", ""]
    makes = "An autoencoder" if config.diffusion is None else "A model that makes sounds from text"
    lines += [f"{makes} of the architecture of Stable Audio 3, in the format of sa3 ({version()}).", ""]
    lines += ["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in _facts(described)), ""]
    lines += ["## Use", "", f"    sa3 get {repository}"]
    if config.diffusion is not None:
        lines += [f'    sa3 generate "PROMPT" --model {name.lower()}']
    lines += ["", "## Licence", "", *_licences(described), ""]
    lines += ["## Made from", "", *_made_from(described, model.folder), ""]
    if (table := _precision(model.folder)) is not None:
        lines += ["## Precision", "", *table, ""]
    return "\n".join(lines)


def _facts(described: Described) -> Sequence[tuple[str, str]]:
    config = described.model.config
    with TensorFile.open(described.model.folder / WEIGHTS_FILE) as file:
        types = sorted({file.info(name)[0] for name in file.names()})
    facts = [
        ("architecture", config.name),
        ("parameters", f"{parameters(config):,}"),
        ("stored as", ", ".join(types)),
        ("sound", f"{config.sample_rate} Hz, {config.audio_channels} channels"),
        ("weights", described.hash),
    ]
    if config.clap is not None:
        facts.append(("latent CLAP", clap_fingerprint(described.model.folder)))
    if config.diffusion is not None:
        facts[2:2] = [("objective", config.diffusion.objective), ("usual sampling", str(config.usual_sampling))]
        facts.insert(5, ("longest", longest(config)))
    return facts


def _licences(described: Described) -> list[str]:
    lines = [] if described.own is None else [f"This model: {described.own}.", ""]
    for licence in described.parents:
        conditions = licence.conditions or "see there"
        lines.append(
            f"- Made from what is under the {licence.name}, {licence.page}. Conditions as we read it: {conditions}."
        )
    if any(licence.id == RELEASED[0].id for licence in described.parents):
        lines += ["", "Powered by Stability AI"]
    return lines


def _made_from(described: Described, folder: Path) -> list[str]:
    lines = []
    if (origin := described.origin) is not None:
        lines.append(f"- {HUB}{origin.repository} at revision {origin.revision}")
        lines += [f"  - {file.name}: {file.hash}" for file in origin.files]
    if (folder / PARENTS_FILE).is_file():
        parents = read_object(folder / PARENTS_FILE)
        lines += [f"- {role}: {digest}" for role, digest in parents.items() if isinstance(digest, str)]
    if (folder / QUANTIZATION_FILE).is_file():
        report = read_object(folder / QUANTIZATION_FILE)
        lines.append(f"- quantized by the recipe {report.get('recipe')} from weights {report.get('source')}")
    return lines or ["- nothing else: trained from random weights, or its source was not recorded"]


def _precision(folder: Path) -> list[str] | None:
    """Return the measured table of a quantized model, None where nothing was measured."""
    if not (folder / QUANTIZATION_FILE).is_file():
        return None
    report = read_object(folder / QUANTIZATION_FILE)
    classes, velocity = report.get("classes"), report.get("velocity")
    if not isinstance(classes, dict):
        return None
    lines = ["| layers | bits per weight | weight error |", "|---|---|---|"]
    for name, row in classes.items():
        lines.append(f"| {name} | {row['bits_per_weight']:.2f} | {row['weight_error']:.4f} |")
    if isinstance(velocity, dict):
        lines += [
            "",
            f"Error of the velocity on {velocity['prompts']} prompts that it was not calibrated on: "
            f"{velocity['error']:.4f} (relative L2).",
        ]
    return lines
