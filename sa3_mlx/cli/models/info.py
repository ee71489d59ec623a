"""Show what is in anything that sa3 writes: ``sa3 info``."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import click
import numpy as np

from sa3_mlx.cli.fingerprint import clap_fingerprint, fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.inputs import STDIN, input_file, is_stream
from sa3_mlx.cli.latents.files import read_latents
from sa3_mlx.cli.output.provenance import Provenance, read_provenance, read_tags_object
from sa3_mlx.cli.output.report import share_text
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.audio import read_blocks, read_tags
from sa3_mlx.common.files.audio_file import open_audio_file
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.installed import Model, installed, open_model
from sa3_mlx.common.model.checkpoint import CLAP_FILE, CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, expected_tensors
from sa3_mlx.common.model.lengths import longest
from sa3_mlx.common.quant.format import Quantization
from sa3_mlx.common.terminal import labelled, show
from sa3_mlx.common.text.tokenizer import Tokenizer

from .card import PARENTS_FILE, QUANTIZATION_FILE
from .stored import INDEX_FILE, SETTINGS_FILE, Facts, describe_folder, describe_index, describe_tar, describe_tensors

_OF_A_MODEL = (WEIGHTS_FILE, TOKENIZER_FILE, QUANTIZATION_FILE, PARENTS_FILE)
_LONG_SECONDS = 600.0  # from here on a sound is not read to find its peak
_BLOCKS = ("config", "settings")  # shown as JSON, after everything else
_PNG = b"\x89PNG\r\n\x1a\n"
_COUNTS = ("parameters", "parts", "stored as", "samples", "frames", "items", "clips", "recordings", "bytes")


@click.command(cls=TypedCommand)
@click.argument("what", metavar="MODEL|FILE|FOLDER")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(what: str, as_json: bool) -> None:
    """Show what is in a model, a sound, latents, an adapter, a clip cache, shards or the folder of a run.

    \b
    sa3 info demo
    sa3 info piano.wav --json
    """
    facts = describe(what)
    if as_json:
        show(json.dumps(_finite(facts), indent=1))
        return
    for label, value in facts.items():
        if label not in _BLOCKS and value not in (None, "", [], {}):
            show(labelled(label, _text(value, counted=label in _COUNTS), 18))
    for label in _BLOCKS:
        if label in facts:
            show(json.dumps(facts[label], indent=2))


def describe(what: str) -> Facts:
    """Return what is in an installed model, a file, a folder or, for "-", standard input, by label.

    Raises FileNotFoundError and ValueError, one line.
    """
    path = Path(what)
    if what in installed() and not path.is_file():
        return _model(find_model(what, generates=False))
    if path == STDIN or path.is_file() or is_stream(path):
        with input_file(path) as file:
            found = _file(file)
            return {**found, "file": what} if "file" in found else found
    if path.exists() and not path.is_dir():
        raise ValueError(f"{what}: neither a file nor a folder")
    if path.is_dir() and (facts := describe_folder(path)) is not None:
        return facts
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        raise ValueError(f"{what}: nothing that sa3 wrote; for a folder of recordings there is 'sa3 data lint'")
    return _model(find_model(what, generates=False))


def _file(path: Path) -> Facts:
    with path.open("rb") as file:
        head = file.read(512)
    if path.name in (CONFIG_FILE, SETTINGS_FILE):
        return describe_folder(path.parent) or _model(find_model(str(path.parent), generates=False))
    if path.suffixes[-2:] == [".npy", ".json"] and path.with_suffix("").is_file():  # tags beside latents
        return _file(path.with_suffix(""))
    if path.name in _OF_A_MODEL and (path.parent / CONFIG_FILE).is_file():
        return _model(find_model(str(path.parent), generates=False))
    if path.name == INDEX_FILE or head.lstrip()[:1] == b"{":
        return describe_index(path)
    if head.startswith(_PNG):
        width, height = struct.unpack(">II", head[16:24].ljust(8, b"\0"))
        return {"kind": "picture", "file": "", "width": width, "height": height}
    if path.suffix == ".npy" or head.startswith(b"\x93NUMPY"):
        latents, tags = read_latents(path)
        return {"kind": "encoded sound", "file": "", "frames": latents.shape[0], "channels": latents.shape[1], **tags}
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return describe_tensors(path)
    if head[257:262] == b"ustar":
        return describe_tar(path)
    return _sound(path)


def _model(model: Model) -> Facts:
    folder, config = model.folder, open_model(model.folder)
    counts: dict[str, int] = {}
    stored: dict[str, int] = {}
    digest = fingerprint(folder, config)
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        quantization = Quantization.read(file)
        grids = {} if quantization is None else quantization.grids()
        for name, shape in expected_tensors(config).items():
            part, size, grid = name.split(".", 1)[0], math.prod(shape), grids.get(name.removesuffix(".weight"))
            kind = file.info(name)[0] if grid is None else f"{grid.bits} bits"
            counts[part] = counts.get(part, 0) + size
            stored[kind] = stored.get(kind, 0) + size
    if config.clap is not None:
        with TensorFile.open(folder / CLAP_FILE) as file:
            sizes = [(file.info(name)[0], math.prod(file.info(name)[1])) for name in file.names()]
        counts["clap"] = sum(size for _, size in sizes)
        for kind, size in sizes:
            stored[kind] = stored.get(kind, 0) + size
    facts: Facts = {
        "kind": "model" if config.diffusion is not None else "autoencoder",
        "model": config.name,
        "folder": str(folder),
        "hash": digest,
        "latent CLAP": config.clap and clap_fingerprint(folder),
        "parameters": sum(counts.values()),
        "parts": counts,
        "stored as": dict(sorted(stored.items())),
        "quantized": quantization and {"recipe": quantization.recipe, "source": quantization.source},
        "sample rate": config.sample_rate,
        "channels": config.audio_channels,
        "frames a second": round(config.frames_per_second, 2),
    }
    if config.diffusion is not None:
        tokenizer = Tokenizer(folder / TOKENIZER_FILE, config.diffusion.text_encoder.max_length)
        facts["longest"] = longest(config)
        facts["usual sampling"] = str(config.usual_sampling)
        facts["does well"] = list(config.examples)
        facts["knows the words"] = list(tokenizer.closed_vocabulary())
    return {**facts, "config": config.to_dict()}


def _sound(path: Path) -> Facts:
    tags = read_tags(path)
    with open_audio_file(path) as file:
        rate, channels, samples, subtype = file.samplerate, file.channels, file.samples, str(file.subtype)
    facts: Facts = {"kind": "sound", "file": ""}
    if samples is None or samples <= _LONG_SECONDS * rate:
        samples, levels = _levels(path, rate, channels)
    else:
        levels = {"level": f"peak not measured: longer than {_LONG_SECONDS:g} s"}
    facts |= {
        "length": round(samples / rate, 3),
        "samples": samples,
        "sample rate": rate,
        "channels": channels,
        "format": subtype,
        **levels,
    }
    if not tags:
        return {**facts, "tags": "none: sa3 did not make this file, or they were removed"}
    try:
        return {**facts, **_described(read_provenance(path))}
    except ValueError:
        return {**facts, "tags": read_tags_object(path) or " ".join(tags.split())[:500]}


def _levels(path: Path, rate: int, channels: int) -> tuple[int, Facts]:
    """Read a sound block by block; return its samples, its peak in dB and how many are beyond full scale."""
    samples, peak, beyond = 0, 0.0, 0
    for block in read_blocks(path, rate, channels):
        size = np.abs(block).max(axis=1)
        samples, peak, beyond = samples + len(block), max(peak, float(size.max())), beyond + int((size > 1).sum())
    levels: Facts = {"peak dB": round(20 * math.log10(peak), 2)} if peak else {"level": "silent"}
    return samples, levels | ({"beyond full scale": share_text(beyond / samples, samples)} if beyond else {})


def _described(made: Provenance) -> Facts:
    """Return what is known of a made file, by label."""
    request = made.request.to_dict()
    seeds = [item["seed"] for item in request.pop("items")]
    output = {"sample format" if label == "format" else label: value for label, value in made.output.to_dict().items()}
    return {
        "sa3": made.sa3,
        "command": made.command,
        **made.clip.to_dict(),
        "seeds of the batch": seeds if len(seeds) > 1 else None,
        **request.pop("sampling"),
        **request,
        **{f"model {label}".removesuffix(" name"): value for label, value in made.model.to_dict().items()},
        **made.runtime.to_dict(),
        **output,
        "input": made.input and made.input.to_dict(),
        "second input": made.second_input and made.second_input.to_dict(),
        "score": made.grade and made.grade.to_dict(),
    }


def _text(value: Any, *, counted: bool) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(entry, counted=counted)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(_text(entry, counted=counted) for entry in value)
    return f"{value:,}" if counted and isinstance(value, int) else str(value)


def _finite(value: Any) -> Any:
    """Return a value as JSON can hold it: numbers that are not finite as None."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
