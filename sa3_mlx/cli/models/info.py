"""Show what is in a model or an audio file: ``sa3 info``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import soundfile

from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options import TypedCommand
from sa3_mlx.cli.output.provenance import Provenance, read_provenance
from sa3_mlx.cli.output.report import share_text
from sa3_mlx.common.files.audio import clipped_share, peak_db, read_audio, read_tags
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.installed import Model
from sa3_mlx.common.model.checkpoint import TOKENIZER_FILE, WEIGHTS_FILE, expected_tensors
from sa3_mlx.common.model.lengths import longest
from sa3_mlx.common.quant.format import Quantization
from sa3_mlx.common.text.tokenizer import Tokenizer


@click.command(cls=TypedCommand)
@click.argument("what", metavar="MODEL|FILE")
def info(what: str) -> None:
    """Show configuration, sizes and hash of a model, or format, level and tags of an audio file."""
    if Path(what).is_file():
        _audio(Path(what))
    else:
        _model(find_model(what, generates=False))


def _model(model: Model) -> None:
    folder, config = model.folder, model.config
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
    _line("model", config.name)
    _line("folder", str(folder))
    _line("hash", digest)
    _line("parameters", f"{sum(counts.values()):,}")
    for part, count in counts.items():
        _line(f"  {part}", f"{count:,}")
    _line("stored as", ", ".join(f"{kind} {count:,}" for kind, count in sorted(stored.items())))
    if quantization is not None:
        _line("quantized", f"recipe {quantization.recipe}, from weights {quantization.source}")
    _line(
        "audio", f"{config.sample_rate} Hz, {config.audio_channels} channels, {config.frames_per_second:.2f} frames/s"
    )
    if config.diffusion is not None:
        _line("longest", longest(config))
        if words := Tokenizer(folder / TOKENIZER_FILE, config.diffusion.text_encoder.max_length).closed_vocabulary():
            _line("knows the words", ", ".join(words))
    click.echo(json.dumps(config.to_dict(), indent=2))


def _audio(path: Path) -> None:
    tags = read_tags(path)
    with soundfile.SoundFile(path) as file:
        rate, channels, subtype = file.samplerate, file.channels, str(file.subtype)
    audio = read_audio(path, rate, channels)
    _line("file", str(path))
    _line("length", f"{len(audio) / rate:.3f} s, {len(audio):,} samples")
    _line("format", f"{rate} Hz, {channels} channels, {subtype}")
    _line("peak", f"{peak_db(audio):+.2f} dB")
    if clipped_share(audio):
        _line("beyond 1", share_text(audio))
    if not tags:
        _line("tags", "none: sa3 did not make this file, or they were removed")
        return
    try:
        made = read_provenance(path)
    except ValueError:
        _line("tags", " ".join(tags.split())[:500])
        return
    for label, value in _described(made).items():
        if value not in (None, []):
            pairs = value.items() if isinstance(value, dict) else ()
            _line(label, ", ".join(f"{key} {entry}" for key, entry in pairs) or str(value))


def _described(made: Provenance) -> dict[str, Any]:
    """Return what is known of a made file, by label."""
    request = made.request.to_dict()
    seeds = [item["seed"] for item in request.pop("items")]
    return {
        "sa3": made.sa3,
        "command": made.command,
        **made.clip.to_dict(),
        "seeds of the batch": seeds if len(seeds) > 1 else None,
        **request.pop("sampling"),
        **request,
        **{f"model {label}".removesuffix(" name"): value for label, value in made.model.to_dict().items()},
        **made.runtime.to_dict(),
        **made.output.to_dict(),
        "input": made.input and made.input.to_dict(),
    }


def _line(label: str, text: str) -> None:
    click.echo(f"{label:<18} {text}")
