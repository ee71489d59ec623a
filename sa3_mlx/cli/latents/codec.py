"""``sa3 encode`` and ``sa3 decode``: the autoencoder alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from sa3_mlx.cli import backend, fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.models.measure import snr_text
from sa3_mlx.cli.options import (
    FORMATS,
    BackendOptions,
    CommonOptions,
    backend_options,
    common_options,
    debug_option,
    gather,
)
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.output.sink import STDOUT, check_pipe, open_sink
from sa3_mlx.common.files.audio import check_output, check_target, fit_length, read_audio
from sa3_mlx.common.files.safetensors import TensorFile, array_entry, file_hash, write_tensors
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.model.chunks import stream_chunk_frames
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.lengths import samples_to_frames

Latents = NDArray[np.float32]
_FORMAT = "sa3-encoded/1"
_SUFFIXES = (".safetensors", ".npy")


@click.command()
@click.argument("input_file", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("output_file", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Decode again and print the signal-to-noise ratio.")
@backend_options
@click.option("--force", is_flag=True, help="Replace existing files.")
@debug_option
@click.pass_context
def encode(ctx: click.Context, input_file: Path, output_file: Path, check: bool, force: bool) -> None:
    """Encode the audio file INPUT to latents, OUT.safetensors or OUT.npy.

    Latents are (frames, channels) float32. The model's hash and the length in samples go into the safetensors file, or
    into OUT.npy.json.
    """
    options = gather(ctx, BackendOptions)
    _check_latents_file(output_file, force=force)
    model = find_model(options.model, generates=False)
    config = model.config
    audio = read_audio(input_file, config.sample_rate, config.audio_channels)
    framework = backend.choose(options.backend, options.device)
    digest = fingerprint.fingerprint(model.folder, config)
    pipeline = backend.load(model.folder, framework, device=options.device)
    latents = pipeline.encode(audio)
    _write_latents(
        output_file,
        latents,
        {
            "format": _FORMAT,
            "model": model.tag,
            "model_hash": digest,
            "samples": str(len(audio)),
            "sample_rate": str(config.sample_rate),
            "input_hash": file_hash(input_file),
        },
    )
    click.echo(f"file   {output_file}  ({latents.shape[0]} frames x {latents.shape[1]} channels, {model.label})")
    if check:
        decoded = fit_length(pipeline.decode(latents), len(audio))
        snr = snr_text(audio, decoded)
        click.echo(f"snr    {snr} after decoding, against the input at {config.sample_rate} Hz")


@click.command()
@click.argument("input_file", metavar="LATENTS", type=click.Path(path_type=Path))
@click.argument("output_file", metavar="OUT", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--format", "subtype", type=click.Choice(FORMATS), default="pcm16", show_default=True)
@click.option("--reference", type=click.Path(path_type=Path), help="Print the signal-to-noise ratio against this file.")
@backend_options
@common_options
@click.pass_context
def decode(ctx: click.Context, input_file: Path, output_file: Path, subtype: Subtype, reference: Path | None) -> None:
    """Decode LATENTS, made by encode, to the audio file OUT, or with - to a pipe."""
    common, options = gather(ctx, CommonOptions), gather(ctx, BackendOptions)
    model = find_model(options.model, generates=False)
    config = model.config
    latents, tags = _read_latents(input_file)
    samples = _output_samples(input_file, latents, tags, config)
    size = len(latents) * config.same.samples_per_latent * config.audio_channels * 4
    if output_file == STDOUT:
        check_pipe(subtype)
    else:
        check_output(output_file, subtype, overwrite=common.force, size_bytes=size)
    wanted = None if reference is None else read_audio(reference, config.sample_rate, config.audio_channels)
    framework = backend.choose(options.backend, options.device)
    digest = fingerprint.fingerprint(model.folder, config)
    if tags.get("model_hash", digest) != digest and not common.force:
        raise ValueError(
            f"{input_file}: encoded by {tags.get('model')} ({tags['model_hash'][:19]}...), not by "
            f"{model.name} ({digest[:19]}...); give that --model, or --force"
        )
    pipeline = backend.load(model.folder, framework, device=options.device)
    comment = json.dumps({"command": "decode", "model": model.tag, "model_hash": digest})
    progress, pieces, missing = Progress(quiet=common.quiet), [], samples
    bar = progress.bar("decode", samples / config.sample_rate, "s")
    chunk_frames = stream_chunk_frames(config.same) if output_file == STDOUT else None
    with open_sink(output_file, samples, config.audio_channels, config.sample_rate, subtype, comment=comment) as sink:
        for piece in pipeline.decode_stream(latents, chunk_frames=chunk_frames):
            pieces.append(piece[:missing])
            missing -= len(pieces[-1])
            sink.write(pieces[-1])
            bar.update(len(piece) / config.sample_rate)
    bar.close()
    audio, err = np.concatenate(pieces), output_file == STDOUT
    length = f"{len(audio) / config.sample_rate:.2f} s, {config.sample_rate} Hz, {subtype}"
    click.echo(f"file   {output_file}  ({length})", err=err)
    if wanted is not None:
        click.echo(f"snr    {snr_text(wanted, fit_length(audio, len(wanted)))} against {reference}", err=err)


def _check_latents_file(path: Path, *, force: bool) -> None:
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: unknown extension {path.suffix!r} for latents; allowed: {', '.join(_SUFFIXES)}")
    check_target(path, overwrite=force)
    if path.suffix == ".npy":
        check_target(_sidecar(path), overwrite=force)


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _write_latents(path: Path, latents: Latents, tags: dict[str, str]) -> None:
    if path.suffix == ".safetensors":
        write_tensors(path, [array_entry("latents", latents)], tags)
        return
    partials = {target: target.with_name(f".{target.name}.{os.getpid()}.partial") for target in (_sidecar(path), path)}
    try:
        partials[_sidecar(path)].write_text(json.dumps(tags, indent=1), encoding="utf-8")
        with partials[path].open("wb") as file:
            np.save(file, latents)
        for target, partial in partials.items():
            partial.replace(target)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def _read_latents(path: Path) -> tuple[Latents, dict[str, str]]:
    """Latents (T, C) and the tags that came with them."""
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"{path}: unknown extension {path.suffix!r} for latents; allowed: {', '.join(_SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of latents")
    if path.suffix == ".safetensors":
        with TensorFile.open(path) as file:
            if file.names() != ["latents"]:
                raise ValueError(f"{path}: expected one tensor 'latents', found {', '.join(file.names()) or 'none'}")
            _check_format(path, file.metadata)
            return _checked(path, file.read("latents")), file.metadata
    tags = _read_sidecar(_sidecar(path))
    try:
        with path.open("rb") as file:
            latents = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise ValueError(f"{path}: not a file of latents ({error})") from error
    return _checked(path, latents), tags


def _read_sidecar(path: Path) -> dict[str, str]:
    """Tags beside a .npy file; none without the file."""
    if not path.is_file():
        return {}
    try:
        data = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: not the tags of latents ({error})") from error
    tags = {str(key): str(value) for key, value in data.items()}
    _check_format(path, tags)
    return tags


def _check_format(path: Path, tags: dict[str, str]) -> None:
    """Latents without any tags are welcome: they come from elsewhere."""
    if tags and tags.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: its format is {tags.get('format')!r}, expected {_FORMAT!r} as 'sa3 encode' writes it"
        )


def _checked(path: Path, latents: NDArray[np.generic]) -> Latents:
    if latents.ndim != 2 or not latents.shape[0] or latents.dtype.kind != "f":
        raise ValueError(f"{path}: latents are (frames, channels) numbers, found {latents.dtype} {latents.shape}")
    with np.errstate(over="ignore"):
        result = latents.astype(np.float32)
    if not np.isfinite(result).all():
        raise ValueError(f"{path}: the latents have NaN or infinite values, or values beyond float32")
    return result


def _output_samples(path: Path, latents: Latents, tags: dict[str, str], config: ModelConfig) -> int:
    if latents.shape[1] != config.same.latent_channels:
        raise ValueError(f"{path}: {latents.shape[1]} channels, {config.name} has {config.same.latent_channels}")
    text = tags.get("samples")
    if text is None:
        return len(latents) * config.same.samples_per_latent
    if not text.isdigit() or samples_to_frames(int(text), config.same) != len(latents):
        raise ValueError(f"{path}: its tags say {text} samples, which does not fit {len(latents)} frames")
    return int(text)
