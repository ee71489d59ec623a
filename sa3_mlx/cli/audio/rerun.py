"""Make a file again from its own tags: ``sa3 rerun``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from sa3_mlx.cli.adapters import LoraFile
from sa3_mlx.cli.backend import DEVICES, Backend, choices, choose
from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.model import MemoryOptions, ModelOptions
from sa3_mlx.cli.options.output import CommonOptions, OutputOptions
from sa3_mlx.cli.output.provenance import InputRecord, ModelRecord, Provenance, find_input, read_provenance
from sa3_mlx.cli.run import Task
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.files.audio_file import Audio, open_audio_file
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.generation.checks import validate
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.installed import DAMAGE, Model, installed, may_hold
from sa3_mlx.common.model.lengths import seconds_to_samples
from sa3_mlx.common.schema import listed
from sa3_mlx.common.terminal import report, say
from sa3_mlx.common.version import version

from .long import ending, run_any
from .source import SourceFile


@click.command(cls=TypedCommand)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", "-o", type=click.Path(path_type=Path), help="Default: FILE-rerun beside FILE.")
@click.option("--model", metavar="NAME|PATH", help="Where the model is, if it is not installed.")
@click.option("--backend", type=click.Choice(["mlx", "torch"]), help="Default: the one FILE was made with.")
@click.option("--device", type=click.Choice(DEVICES), help="Of PyTorch. Default: the one FILE was made with.")
@click.option("--input", "input_file", type=click.Path(path_type=Path), help="Where the input of an edited FILE is.")
@click.option("--second", "second_file", type=click.Path(path_type=Path), help="Where a bridge of FILE leads.")
@click.option("--lora", multiple=True, type=click.Path(path_type=Path), help="Where its adapters are, in their order.")
def rerun(
    file: Path,
    out: Path | None,
    model: str | None,
    backend: str | None,
    device: str | None,
    input_file: Path | None,
    second_file: Path | None,
    lora: tuple[Path, ...],
    common: CommonOptions,
) -> int:
    """Make FILE again from its tags: with the same model, backend and machine, bit for bit.

    The model is found by the hash of its weights among the installed ones. Another model, backend, device or input is
    refused unless --force is given. Exit code 1 when the new audio is not equal to that of FILE.
    """
    made, first = read_provenance(file), _Sound.read(file)
    chosen = find_model(model, generates=True) if model else _recorded_model(made.model)
    digest = fingerprint(chosen.folder, chosen.config, quiet=common.quiet)
    _same(f"model {chosen.label}", digest, made.model.hash, "name the right one with --model", force=common.force)
    options = _options(made, chosen, choose(backend or made.runtime.backend), device, force=common.force)
    source = None if made.input is None else _source(made, made.input, input_file, file, chosen, force=common.force)
    if source is not None:
        source = _placed(source, made, second_file, file, chosen, force=common.force)
    options = replace(options, lora=_adapters(made.model, lora, file, force=common.force))
    if made.sa3 != version() and not common.quiet:
        say(f"made with sa3 {made.sa3}, this is {version()}: the result may differ")
    try:
        whole = Request.from_dict(made.request.to_dict(), audio=None if source is None else source.audio)
        request = ending(whole, source, chosen.config)
        validate(request, chosen.config)
    except ValueError as error:
        raise ValueError(f"{file}: its tags ask for what {chosen.label} cannot make: {error}") from error
    ways = _ways(made, choose(options.backend), file, force=common.force)
    output = OutputOptions(
        out=out or file.with_name(f"{file.stem}-rerun{file.suffix}"),
        format=made.output.format,
        rate=made.output.rate,
        trim_silence=made.output.trim_silence,
        fade_in=made.output.fade_in,
        fade_out=made.output.fade_out,
        loudness=made.output.loudness_lufs,
        true_peak=made.output.true_peak_db,
        peak=made.output.peak_db,
        limit=made.output.limit,
        safe=made.output.safe,
        force=common.force,
        quiet=common.quiet,
    )
    (again,) = run_any(
        Task(
            made.command,
            (request,),
            chosen,
            options,
            MemoryOptions(max_memory=None),
            output,
            source,
            only=made.item,
            ways=ways,
            graded=made.grade,
            whole=None if request is whole else whole,
        )
    )
    equal, text = first.compare(_Sound.read(again), file, again)
    if not common.quiet:
        report(f"same   {text}")
    return 0 if equal else 1


def _options(made: Provenance, model: Model, backend: Backend, device: str | None, *, force: bool) -> ModelOptions:
    """Return the recorded options, without adapters. Raises ValueError where backend or device are others."""
    runtime, same = made.runtime, backend == made.runtime.backend
    _same("backend", backend, runtime.backend, "leave --backend out", force=force)
    place = device or (runtime.device if same else "auto")
    _same("device", place, runtime.device, "leave --device out", force=force)
    return ModelOptions(
        name=model.name,
        backend=backend,
        device=place,
        dtype=runtime.dtype,
        text_dtype=runtime.text_dtype,
        compiled=runtime.compiled and same,
        lora=(),
        lora_merged=made.model.adapters_merged,
    )


def _ways(made: Provenance, backend: Backend, file: Path, *, force: bool) -> dict[str, str]:
    """Return the recorded ways, whatever is tuned here. Raises ValueError where another process would go them."""
    recorded, ways = made.runtime.ways, dict[str, str]()
    if backend != made.runtime.backend:
        return ways
    table = choices(backend)
    places, here = table.places, table.differing({})
    known = {name: way for name, way in recorded.items() if name in places and way in places[name].ways}
    for name, place in places.items():
        if not place.environment:
            ways |= {name: known[name]} if name in known else {}
        elif known.get(name) != here.get(name):
            wanted = known.get(name, place.usual[table.kind])
            variables = " ".join(f"{key}={value}" for key, value in place.environment.get(wanted, {}).items())
            _same(name, table.usual[name], wanted, f"begin with {variables or 'no settings of it'}", force=force)
    if unknown := listed(name for name in recorded if name not in known):
        say(f"note: {file} was made in ways that this sa3 does not have ({unknown}): the result may differ")
    return ways


def _recorded_model(made: ModelRecord) -> Model:
    """Find the model with the recorded weights: the one of the recorded name or path, else any installed one.

    Where none has them, the one of the recorded name. Raises FileNotFoundError without one.
    """
    named: Model | None = None
    others = (name for name, folder in installed().items() if may_hold(name, folder, made.hash))
    for name in dict.fromkeys((made.name, *others)):
        try:
            model = find_model(name, generates=True)
            if fingerprint(model.folder, model.config) == made.hash:
                return model
        except DAMAGE:
            continue
        named = named or (model if name == made.name else None)
    if named is None:
        raise FileNotFoundError(
            f"model {made.name} ({made.hash[:19]}...) is not installed; say where it is with --model"
        )
    return named


def _source(
    made: Provenance,
    record: InputRecord,
    given: Path | None,
    file: Path,
    model: Model,
    *,
    force: bool,
    option: str = "--input",
) -> SourceFile:
    """Read the recorded input. Raises FileNotFoundError without it, and ValueError for another one."""
    path = given or find_input(record.name, file)
    if path is None:
        raise FileNotFoundError(f"{record.name}: the input of {file} is not here; say where it is with {option}")
    whole = made.request.inpaint is not None and (made.second_input is not None or _begins_before(made))
    end, room = made.request.long is not None and not whole, made.request.head_room_seconds
    found = SourceFile.read(path, model.config, made.clip.seconds, room, whole=whole, end=end)
    _same("input", found.hash, record.hash, f"name the right one with {option}", force=force)
    return replace(found, name=record.name)


def _begins_before(made: Provenance) -> bool:
    """Tell whether a file leads up to its input."""
    return made.command == "extend" and made.request.made(0)[0][0] == 0


def _placed(
    found: SourceFile, made: Provenance, second: Path | None, file: Path, model: Model, *, force: bool
) -> SourceFile:
    """Return the input where it lies in the file: after what leads up to it, or joined to the second one."""
    if made.request.inpaint is None:
        return found
    try:
        spans = made.request.made(0)
    except ValueError as error:
        raise ValueError(f"{file}: its tags ask for what {model.label} cannot make: {error}") from error
    if not spans:
        return found
    start, stop = (seconds_to_samples(time, model.config.sample_rate) for time in spans[0])
    if made.second_input is not None:
        other = _source(made, made.second_input, second, file, model, force=force, option="--second")
        return found.joined(other, stop - start, model.config)
    return found.after(stop, model.config) if _begins_before(made) else found


def _adapters(made: ModelRecord, given: tuple[Path, ...], file: Path, *, force: bool) -> tuple[LoraFile, ...]:
    """Find the recorded adapters.

    Raises FileNotFoundError, and ValueError for another number of files and for other files.
    """
    if given and len(given) != len(made.adapters):
        raise ValueError(f"{len(given)} --lora given, {file} was made with {len(made.adapters)} adapters")
    found = []
    for number, entry in enumerate(made.adapters):
        path = given[number] if given else find_input(entry.file, file)
        if path is None:
            raise FileNotFoundError(f"{entry.file}: this adapter of {file} is not here; say where with --lora")
        found.append(LoraFile(path=path, name=entry.file, strength=entry.strength, interval=entry.interval))
        _same(f"adapter {path}", file_hash(path), entry.hash, "name the right one with --lora", force=force)
    return tuple(found)


def _same(what: str, found: str, recorded: str, advice: str, *, force: bool) -> None:
    if found != recorded and not force:
        raise ValueError(
            f"{what} is {found}, the file was made with {recorded}: the result would differ; {advice}, "
            "or --force makes it all the same"
        )


@dataclass(frozen=True)
class _Sound:
    """Hold a file as it was when it was read: it may be replaced."""

    data: bytes
    audio: Audio

    @classmethod
    def read(cls, path: Path) -> _Sound:
        with open_audio_file(path) as file:
            return cls(path.read_bytes(), np.concatenate(list(file.blocks())))

    def compare(self, other: _Sound, path: Path, other_path: Path) -> tuple[bool, str]:
        """Return whether the audio is equal, and the words for it."""
        if self.data == other.data:
            return True, f"{other_path} equals {path} byte for byte"
        if self.audio.shape != other.audio.shape:
            return False, f"no: {len(other.audio)} samples, {path} has {len(self.audio)}"
        if np.array_equal(self.audio, other.audio):
            return True, "audio equal, tags differ"
        return False, f"no: samples differ by up to {float(np.abs(other.audio - self.audio).max()):.2e}"
