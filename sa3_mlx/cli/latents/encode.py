"""Turn audio into latents: ``sa3 encode``."""

from __future__ import annotations

from pathlib import Path

import click

from sa3_mlx.cli import backend
from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.inputs import input_file
from sa3_mlx.cli.models.measure import snr_text
from sa3_mlx.cli.options.model import BackendOptions
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.audio import fit_length, read_audio
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.model.lengths import samples_to_frames
from sa3_mlx.common.terminal import report

from .files import check_latents_file, write_latents


@click.command(cls=TypedCommand)
@click.argument("given", metavar="INPUT", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("output_file", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Decode again and print the signal-to-noise ratio.")
@click.option("--force", is_flag=True, help="Replace existing files.")
def encode(given: Path, output_file: Path, check: bool, force: bool, model: BackendOptions) -> None:
    """Encode the audio file INPUT to latents, OUT.safetensors or OUT.npy.

    Latents are (frames, channels) float32. The model's hash and the length in samples go into the safetensors file, or
    into OUT.npy.json.
    """
    check_latents_file(output_file, force=force)
    found = find_model(model.name, generates=False)
    config = found.config
    with input_file(given) as path:
        audio, digest = read_audio(path, config.sample_rate, config.audio_channels), file_hash(path)
    framework = backend.choose(model.backend, model.device)
    tags = {
        "model": found.tag,
        "model_hash": fingerprint(found.folder, config),
        "samples": str(len(audio)),
        "sample_rate": str(config.sample_rate),
        "input_hash": digest,
    }
    pipeline = backend.load(found.folder, framework, device=model.device)
    with Progress(quiet=False).bar("encode", samples_to_frames(len(audio), config.same), "frames") as bar:
        latents = pipeline.encode(audio, advance=bar.update)
    write_latents(output_file, latents, tags)
    report(f"file   {output_file}  ({latents.shape[0]} frames x {latents.shape[1]} channels, {found.label})")
    if check:
        snr = snr_text(audio, fit_length(pipeline.decode(latents), len(audio)))
        report(f"snr    {snr} after decoding, against the input at {config.sample_rate} Hz")
