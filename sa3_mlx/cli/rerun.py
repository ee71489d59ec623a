"""``sa3 rerun``: a file again, from its own tags."""

from __future__ import annotations

from pathlib import Path

import click
import soundfile

from sa3_mlx.spec.version import version

from . import fingerprint
from .backend import choose
from .edit import read_source
from .home import find_model, installed
from .job import Job, Source, run
from .options import DEVICES, CommonOptions, ModelOptions, OutputOptions, SamplingOptions, common_options, gather
from .provenance import Provenance, read_provenance


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Default: FILE-rerun beside FILE.")
@click.option("--model", metavar="NAME|PATH", help="Where the model is, if it is not installed under its name.")
@click.option("--backend", type=click.Choice(["mlx", "torch"]), help="Default: the one FILE was made with.")
@click.option("--device", type=click.Choice(DEVICES), help="Of PyTorch. Default: the one FILE was made with.")
@click.option("--input", "input_file", type=click.Path(path_type=Path), help="Where the input of an edited FILE is.")
@common_options
@click.pass_context
def rerun(
    ctx: click.Context, file: Path, out: Path | None, model: str | None, backend: str | None, device: str | None,
    input_file: Path | None,
) -> None:  # fmt: skip
    """Make FILE again from its tags: with the same model, backend and machine, bit for bit.

    Another model, backend, device or input is refused unless --force is given.
    """
    common = gather(ctx, CommonOptions)
    made = read_provenance(file)
    name = model or _installed_name(made)
    folder, config = find_model(name, generates=True)
    _same("model", fingerprint.fingerprint(folder, config), made.model_hash, force=common.force)
    framework = choose(backend or made.backend)
    _same("backend", framework, made.backend, force=common.force)
    place = device or (made.device if framework == made.backend else "auto")
    _same("device", place, made.device, force=common.force)
    source = None
    if made.input is not None:
        found = read_source(input_file or _find_input(made.input, file), config)
        _same("input", found.hash, made.input_hash or "unknown", force=common.force)
        source = Source(name=made.input, hash=found.hash, audio=found.audio)
    if made.sa3 != version() and not common.quiet:
        click.echo(f"made with sa3 {made.sa3}, this is {version()}: the result may differ", err=True)
    target = out or file.with_name(f"{file.stem}-rerun{file.suffix}")
    guidance = made.guidance
    run(Job(
        command=made.command, folder=folder, config=config, prompts=(made.prompt,), seconds=made.seconds,
        model=ModelOptions(
            model=name, backend=framework, device=place, dtype=made.dtype, text_dtype=made.text_dtype
        ),
        sampling=SamplingOptions(
            steps=made.steps, sampler=made.sampler, guidance=guidance.scale, apg=guidance.apg,
            rescale=guidance.rescale, interval=guidance.interval, norm_threshold=guidance.norm_threshold,
            negative=made.negative_prompt, seed=made.batch_seeds[0], batch=len(made.batch_seeds),
            head_room=made.head_room_seconds, decode_noise=made.decode_noise,
        ),
        output=OutputOptions(
            out=target, format=made.format, peak=made.peak_db, spectrogram=None, play=False, force=common.force,
            quiet=common.quiet,
        ),
        seeds=made.batch_seeds, format=made.format, source=source, noise_level=made.noise_level,
        monotone=made.monotone, regions=made.regions, crossfade_ms=made.crossfade_ms, only=made.batch_index,
        chunk_frames=made.chunk_frames, encode_chunk_frames=made.encode_chunk_frames,
    ))  # fmt: skip
    if not common.quiet:
        click.echo(f"same   {_comparison(file, target)}")


def _installed_name(made: Provenance) -> str:
    if made.model in installed():
        return made.model
    raise FileNotFoundError(
        f"model {made.model!r} ({made.model_hash[:19]}...) is not installed; say where it is with --model"
    )


def _same(what: str, found: str, recorded: str, *, force: bool) -> None:
    if found != recorded and not force:
        raise ValueError(f"{what} is {found}, the file was made with {recorded}: the result would differ; "
                         "--force makes it all the same")  # fmt: skip


def _find_input(name: str, file: Path) -> Path:
    for path in (Path(name), file.parent / name, file.parent / Path(name).name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{name}: the input of {file} is not here; say where it is with --input")


def _comparison(first: Path, second: Path) -> str:
    if first.resolve() == second.resolve():
        return f"{first} was replaced"
    if first.read_bytes() == second.read_bytes():
        return f"{second} equals {first} byte for byte"
    before, after = (soundfile.read(path, dtype="float64", always_2d=True)[0] for path in (first, second))
    if before.shape != after.shape:
        return f"no: {len(after)} samples, {first} has {len(before)}"
    difference = float(abs(after - before).max())
    return "audio equal, tags differ" if difference == 0 else f"no: samples differ by up to {difference:.2e}"
