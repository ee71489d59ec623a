"""Turn latents into audio: ``sa3 decode``."""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from sa3_mlx.cli import backend
from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.inputs import input_file
from sa3_mlx.cli.models.measure import snr_text
from sa3_mlx.cli.options.model import BackendOptions
from sa3_mlx.cli.options.output import CommonOptions, DeliveryOptions
from sa3_mlx.cli.output.outlet import Outlet, check_delivery
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.output.provenance import OutputRecord
from sa3_mlx.cli.output.sink import STDOUT
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.audio import check_output, fit_length, read_audio, resampled_length, usual_subtype
from sa3_mlx.common.files.audio_file import Audio
from sa3_mlx.common.model.chunks import stream_chunk_frames
from sa3_mlx.common.terminal import report, say

from .files import output_samples, read_latents


@click.command(cls=TypedCommand)
@click.argument("given", metavar="LATENTS", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("output_file", metavar="OUT", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--reference", type=click.Path(path_type=Path), help="Print the signal-to-noise ratio against this file.")
def decode(
    given: Path,
    output_file: Path,
    reference: Path | None,
    model: BackendOptions,
    delivery: DeliveryOptions,
    common: CommonOptions,
) -> None:
    """Decode LATENTS, made by encode, to the audio file OUT, or with - to a pipe.

    \b
    sa3 decode take.safetensors take.m4a --loudness -16 --true-peak -1
    """
    found = find_model(model.name, generates=False)
    config, piped = found.config, output_file == STDOUT
    subtype = delivery.format or ("pcm16" if piped else usual_subtype(output_file))
    output = OutputRecord(format=subtype, **delivery.delivery(config.sample_rate, subtype).to_dict())
    with input_file(given) as path:
        latents, tags = read_latents(path)
        samples = output_samples(path, latents, tags, config)
    check_delivery(output, output_file, samples / config.sample_rate, config.sample_rate, kept=False)
    rate = output.rate or config.sample_rate
    if not piped:
        size = resampled_length(samples, config.sample_rate, rate) * config.audio_channels * 4
        check_output(output_file, subtype, overwrite=common.force, size_bytes=size)
    wanted = None if reference is None else read_audio(reference, config.sample_rate, config.audio_channels)
    framework = backend.choose(model.backend, model.device)
    digest = fingerprint(found.folder, config, quiet=common.quiet)
    if tags.get("model_hash", digest) != digest and not common.force:
        raise ValueError(
            f"{given}: encoded by {tags.get('model')} ({tags['model_hash'][:19]}...), not by "
            f"{found.name} ({digest[:19]}...); give that --model, or --force"
        )
    pipeline = backend.load(found.folder, framework, device=model.device)
    made: dict[str, object] = {"command": "decode", "model": found.tag, "model_hash": digest}
    if ways := pipeline.choices.differing(pipeline.ways):
        made["ways"] = ways
    if output != OutputRecord(format=subtype):
        made["output"] = output.to_dict()
    pieces, missing = list[Audio](), samples
    bar = Progress(quiet=common.quiet).bar("decode", samples / config.sample_rate, "s")
    chunk_frames = stream_chunk_frames(config.same) if piped else None
    channels, comment = config.audio_channels, json.dumps(made)
    with Outlet(output_file, output, samples, channels, config.sample_rate, comment=comment) as outlet:
        for piece in pipeline.decode_stream(latents, chunk_frames=chunk_frames):
            pieces.append(piece[:missing])
            missing -= len(pieces[-1])
            outlet.take(pieces[-1])
            bar.update(len(piece) / config.sample_rate)
        audio = np.concatenate(pieces)
        sound = outlet.finish(audio)
    bar.close()
    write = say if piped else report
    write(f"file   {output_file}  ({len(sound.audio) / rate:.2f} s, {rate} Hz, {subtype})")
    for note in sound.notes:
        write(f"level  {note}")
    if wanted is not None:
        write(f"snr    {snr_text(wanted, fit_length(audio, len(wanted)))} against {reference}")
