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
from sa3_mlx.cli.options.output import FORMATS, CommonOptions
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.output.sink import STDOUT, check_pipe, open_sink
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.audio import check_output, fit_length, read_audio, usual_subtype
from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.model.chunks import stream_chunk_frames
from sa3_mlx.common.terminal import report, say

from .files import output_samples, read_latents


@click.command(cls=TypedCommand)
@click.argument("given", metavar="LATENTS", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("output_file", metavar="OUT", type=click.Path(path_type=Path, allow_dash=True))
@click.option("--format", "subtype", type=click.Choice(FORMATS), help="Default: the usual one of OUT, pcm16.")
@click.option("--reference", type=click.Path(path_type=Path), help="Print the signal-to-noise ratio against this file.")
def decode(
    given: Path,
    output_file: Path,
    subtype: Subtype | None,
    reference: Path | None,
    model: BackendOptions,
    common: CommonOptions,
) -> None:
    """Decode LATENTS, made by encode, to the audio file OUT, or with - to a pipe."""
    found = find_model(model.name, generates=False)
    config, piped = found.config, output_file == STDOUT
    subtype = subtype or ("pcm16" if piped else usual_subtype(output_file))
    with input_file(given) as path:
        latents, tags = read_latents(path)
        samples = output_samples(path, latents, tags, config)
    if piped:
        check_pipe(subtype)
    else:
        size = len(latents) * config.same.samples_per_latent * config.audio_channels * 4
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
    comment = json.dumps(made)
    pieces, missing = [], samples
    bar = Progress(quiet=common.quiet).bar("decode", samples / config.sample_rate, "s")
    chunk_frames = stream_chunk_frames(config.same) if piped else None
    with open_sink(output_file, samples, config.audio_channels, config.sample_rate, subtype, comment=comment) as sink:
        for piece in pipeline.decode_stream(latents, chunk_frames=chunk_frames):
            pieces.append(piece[:missing])
            missing -= len(pieces[-1])
            sink.write(pieces[-1])
            bar.update(len(piece) / config.sample_rate)
    bar.close()
    audio = np.concatenate(pieces)
    length = f"{len(audio) / config.sample_rate:.2f} s, {config.sample_rate} Hz, {subtype}"
    write = say if piped else report
    write(f"file   {output_file}  ({length})")
    if wanted is not None:
        write(f"snr    {snr_text(wanted, fit_length(audio, len(wanted)))} against {reference}")
