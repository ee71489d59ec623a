"""``sa3 rerun``: a file again, from its own tags."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import soundfile

from sa3_mlx.cli import fingerprint
from sa3_mlx.cli.adapters import LoraFile
from sa3_mlx.cli.backend import choose
from sa3_mlx.cli.home import DAMAGE, Model, find_model, installed
from sa3_mlx.cli.options import (
    DEVICES,
    CommonOptions,
    ModelOptions,
    OutputOptions,
    SamplingOptions,
    common_options,
    gather,
)
from sa3_mlx.cli.output.provenance import Provenance, find_input, read_provenance
from sa3_mlx.cli.run import Job, run
from sa3_mlx.common.files.audio import Audio
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.version import version

from .edit import read_source


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Default: FILE-rerun beside FILE.")
@click.option("--model", metavar="NAME|PATH", help="Where the model is, if it is not installed.")
@click.option("--backend", type=click.Choice(["mlx", "torch"]), help="Default: the one FILE was made with.")
@click.option("--device", type=click.Choice(DEVICES), help="Of PyTorch. Default: the one FILE was made with.")
@click.option("--input", "input_file", type=click.Path(path_type=Path), help="Where the input of an edited FILE is.")
@click.option("--lora", multiple=True, type=click.Path(path_type=Path), help="Where its adapters are, in their order.")
@common_options
@click.pass_context
def rerun(
    ctx: click.Context,
    file: Path,
    out: Path | None,
    model: str | None,
    backend: str | None,
    device: str | None,
    input_file: Path | None,
    lora: tuple[Path, ...],
) -> int:
    """Make FILE again from its tags: with the same model, backend and machine, bit for bit.

    The model is found by the hash of its weights among the installed ones. Another model, backend, device or input is
    refused unless --force is given. Exit code 1 when the new audio is not equal to that of FILE.
    """
    common = gather(ctx, CommonOptions)
    made = read_provenance(file)
    chosen = find_model(model, generates=True) if model else _recorded_model(made)
    digest = fingerprint.fingerprint(chosen.folder, chosen.config)
    _same(f"model {chosen.label}", digest, made.model_hash, "name the right one with --model", force=common.force)
    framework = choose(backend or made.backend)
    _same("backend", framework, made.backend, "leave --backend out", force=common.force)
    place = device or (made.device if framework == made.backend else "auto")
    _same("device", place, made.device, "leave --device out", force=common.force)
    source = None
    if made.input is not None:
        found = read_source(input_file or _recorded_input(made.input, file), chosen.config)
        _same("input", found.hash, made.input_hash or "unknown", "name the right one with --input", force=common.force)
        source = replace(found, name=made.input)
    adapters = _adapters(made, lora, file, force=common.force)
    if made.sa3 != version() and not common.quiet:
        click.echo(f"made with sa3 {made.sa3}, this is {version()}: the result may differ", err=True)
    target = out or file.with_name(f"{file.stem}-rerun{file.suffix}")
    guidance, first = made.guidance, _Sound.read(file)
    run(
        Job(
            command=made.command,
            model=chosen,
            prompts=(made.prompt,),
            seconds=made.seconds,
            options=ModelOptions(
                model=chosen.name,
                backend=framework,
                device=place,
                dtype=made.dtype,
                text_dtype=made.text_dtype,
                compiled=made.compiled and framework == made.backend,
                lora=adapters,
                lora_merged=made.adapters_merged,
            ),
            sampling=SamplingOptions(
                steps=made.steps,
                sampler=made.sampler,
                guidance=guidance.scale,
                apg=guidance.apg,
                rescale=guidance.rescale,
                interval=guidance.interval,
                norm_threshold=guidance.norm_threshold,
                negative=made.negative_prompt,
                seed=made.batch_seeds[0],
                batch=len(made.batch_seeds),
                head_room=made.head_room_seconds,
                decode_noise=made.decode_noise,
            ),
            output=OutputOptions(
                out=target,
                format=made.format,
                peak=made.peak_db,
                spectrogram=None,
                play=False,
                force=common.force,
                quiet=common.quiet,
            ),
            seeds=made.batch_seeds,
            format=made.format,
            source=source,
            noise_level=made.noise_level,
            monotone=made.monotone,
            regions=made.regions,
            crossfade_ms=made.crossfade_ms,
            only=made.batch_index,
            chunk_frames=made.chunk_frames,
            encode_chunk_frames=made.encode_chunk_frames,
        )
    )
    equal, text = first.compare(_Sound.read(target), file, target)
    if not common.quiet:
        click.echo(f"same   {text}")
    return 0 if equal else 1


def _recorded_model(made: Provenance) -> Model:
    """The model with the recorded weights: the one of the recorded name or path, else any installed one.

    Where none has them, the one of the recorded name. Raises FileNotFoundError without one.
    """
    named: Model | None = None
    for name in dict.fromkeys((made.model, *installed())):
        try:
            model = find_model(name, generates=True)
            if fingerprint.fingerprint(model.folder, model.config) == made.model_hash:
                return model
        except DAMAGE:
            continue
        named = named or (model if name == made.model else None)
    if named is None:
        raise FileNotFoundError(
            f"model {made.model} ({made.model_hash[:19]}...) is not installed; say where it is with --model"
        )
    return named


def _adapters(made: Provenance, given: tuple[Path, ...], file: Path, *, force: bool) -> tuple[LoraFile, ...]:
    """The recorded ones. Raises FileNotFoundError, and ValueError for another number of files and for other files."""
    if given and len(given) != len(made.adapters):
        raise ValueError(f"{len(given)} --lora given, {file} was made with {len(made.adapters)} adapters")
    found = []
    for number, entry in enumerate(made.adapters):
        path = given[number] if given else find_input(entry.file, file)
        if path is None:
            raise FileNotFoundError(f"{entry.file}: this adapter of {file} is not here; say where with --lora")
        low, high = entry.interval
        found.append(LoraFile(path=path, name=entry.file, strength=entry.strength, interval=(low, high)))
        _same(f"adapter {path}", file_hash(path), entry.hash, "name the right one with --lora", force=force)
    return tuple(found)


def _same(what: str, found: str, recorded: str, advice: str, *, force: bool) -> None:
    if found != recorded and not force:
        raise ValueError(
            f"{what} is {found}, the file was made with {recorded}: the result would differ; {advice}, "
            "or --force makes it all the same"
        )


def _recorded_input(name: str, file: Path) -> Path:
    found = find_input(name, file)
    if found is None:
        raise FileNotFoundError(f"{name}: the input of {file} is not here; say where it is with --input")
    return found


@dataclass(frozen=True)
class _Sound:
    """A file as it was when it was read: it may be replaced."""

    data: bytes
    audio: Audio

    @classmethod
    def read(cls, path: Path) -> _Sound:
        data = path.read_bytes()
        return cls(data, soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0])

    def compare(self, other: _Sound, path: Path, other_path: Path) -> tuple[bool, str]:
        """Whether the audio is equal, and the words for it."""
        if self.data == other.data:
            return True, f"{other_path} equals {path} byte for byte"
        if self.audio.shape != other.audio.shape:
            return False, f"no: {len(other.audio)} samples, {path} has {len(self.audio)}"
        if np.array_equal(self.audio, other.audio):
            return True, "audio equal, tags differ"
        return False, f"no: samples differ by up to {float(np.abs(other.audio - self.audio).max()):.2e}"
