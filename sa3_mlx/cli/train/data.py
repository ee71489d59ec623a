"""Prepare the sounds to train on: ``sa3 data`` and ``sa3 pre-encode``, listed and mostly run without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import click
from tqdm import tqdm

from sa3_mlx.common.files.atomic import locked
from sa3_mlx.common.installed import name_of
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.terminal import command, report, show
from sa3_torch.train.run.options import FOLDER, MODEL

MEGABYTE = 1 << 20
_Each = TypeVar("_Each")


class _Share(click.ParamType):
    """Read a share of files such as 5% (or 5) as 0.05."""

    name = "percent"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            percent = float(str(value).removesuffix("%"))
        except ValueError:
            percent = -1.0
        if not 0 <= percent <= 100:
            self.fail(f"{value!r} is not a share of the files, such as 5%", param, ctx)
        return percent / 100


_SKIP_UNREADABLE = click.option(
    "--skip-unreadable",
    type=_Share(),
    default="1%",
    show_default=True,
    help="Skip unreadable files, and name them, when no more than this share of all are.",
)
_FORCE = click.option("--force", is_flag=True, help="Replace the cache that is there.")


def _need_torch() -> None:
    """Raise click.ClickException without PyTorch."""
    if find_spec("torch") is None:
        raise click.ClickException("this needs PyTorch: pip install 'sa3[train]'")


def _bar(name: str, unit: str) -> Callable[[Iterable[_Each]], Iterable[_Each]]:
    """Return what goes through a list with a bar, which appears after a second, on a terminal only."""
    return lambda items: tqdm(items, desc=name, unit=unit, disable=None, delay=1)


def _next_autoencoder(folder: Path) -> str:
    return f"next: {command('train', 'autoencoder', '--data', folder, '--out', 'runs/autoencoder')}"


@click.group()
def data() -> None:
    """Make, check and pack the sounds to train on."""


@data.command("render")
@click.argument("out", type=FOLDER)
@click.option(
    "--set",
    "name",
    type=click.Choice(["first", "music"]),
    default="first",
    show_default=True,
    help="first: half an hour of notes, chords, drums, noises, mono. music: hours of lines, loops, bands, stereo.",
)
@click.option("--hours", type=click.FloatRange(0.2, 1000), default=None, help="Of the set music. Default: 12.")
@click.option("--test", is_flag=True, help="The test clips of the set music, which no training or choice may see.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--samples",
    type=FOLDER,
    default=None,
    help="Folder of one-shots. Default: none, or Sonic Pi's for the set music.",
)
@click.option("--processes", type=click.IntRange(1), default=None, help="Of the set music. Default: one a core.")
@_FORCE
def render(
    out: Path,
    name: str,
    hours: float | None,
    test: bool,
    seed: int,
    samples: Path | None,
    processes: int | None,
    force: bool,
) -> None:
    """Render captioned sounds to train on, with fluidsynth and numpy. The set music goes on where it was stopped."""
    from sa3_torch.train.demo_set.sets import render_set

    made = render_set(
        name, out, hours=hours, test=test, seed=seed, samples=samples, processes=processes, overwrite=force
    )
    seconds = sum(clip.seconds for clip in made.clips)
    length = f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.2f} h"
    report(f"{out}: {len(made.clips)} clips, {length}\n{_next_autoencoder(out)}")


@data.command("import")
@click.argument("folder", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option(
    "--captions-required/--captions-optional",
    default=True,
    show_default=True,
    help="Skip recordings without a caption, or import them for the autoencoder alone.",
)
@_SKIP_UNREADABLE
@_FORCE
def import_recordings(folder: Path, out: Path, captions_required: bool, skip_unreadable: float, force: bool) -> None:
    """Import a folder of your own recordings (clip.wav, .flac, .ogg, .mp3 with clip.txt or clip.json)."""
    from sa3_torch.train.data.user_folder import import_folder

    _, found = import_folder(
        folder,
        out,
        captions_required=captions_required,
        tolerated=skip_unreadable,
        progress=_bar("import", "file"),
        overwrite=force,
    )
    report(f"{found}\n{_next_autoencoder(out)}")


@data.command("lint")
@click.argument("folder", type=FOLDER)
@click.option("--picture", type=click.Path(path_type=Path, dir_okay=False), default=None, help="PNG to draw.")
@click.option("--min-seconds", type=click.FloatRange(0), default=0.1, show_default=True)
@click.option("--captions-required/--captions-optional", default=True, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def lint(folder: Path, picture: Path | None, min_seconds: float, captions_required: bool, as_json: bool) -> None:
    """Check a folder of recordings. Exit code 1 when something is wrong."""
    from sa3_torch.train.data.lint import draw_report, lint_folder

    found = lint_folder(
        folder,
        minimum_seconds=min_seconds,
        captions_required=captions_required,
        progress=_bar("lint", "file"),
    )
    if picture is not None:
        draw_report(found, picture)
    show(json.dumps(found.to_json()) if as_json else str(found))
    if not found.good:
        raise click.exceptions.Exit(1)


@data.command("shards")
@click.argument("folder", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--shard-megabytes", type=click.IntRange(1), default=1024, show_default=True)
@click.option(
    "--piece-seconds",
    type=click.FloatRange(1, 3600),
    default=None,
    help="Cut longer recordings into pieces, for an autoencoder: a crop of 4.5 s then reads no whole track.",
)
@click.option(
    "--overlap-seconds",
    type=click.FloatRange(0, 3600),
    default=None,
    help="What a piece shares with the next one, at least a crop. Default: 5.",
)
@click.option("--captions-required/--captions-optional", default=True, show_default=True)
@_SKIP_UNREADABLE
def shards(
    folder: Path,
    out: Path,
    shard_megabytes: int,
    piece_seconds: float | None,
    overlap_seconds: float | None,
    captions_required: bool,
    skip_unreadable: float,
) -> None:
    """Pack a folder of recordings into WebDataset shards with an index."""
    from sa3_torch.train.data.packing import OVERLAP_SECONDS, Cut, write_shards

    cut = None
    if piece_seconds is not None:
        cut = Cut(seconds=piece_seconds, overlap=OVERLAP_SECONDS if overlap_seconds is None else overlap_seconds)
    elif overlap_seconds is not None:
        raise click.UsageError("--overlap-seconds is of pieces: give --piece-seconds, too")

    index = write_shards(
        folder,
        out,
        shard_bytes=shard_megabytes * MEGABYTE,
        captions_required=captions_required,
        tolerated=skip_unreadable,
        cut=cut,
        progress=_bar("shards", "file"),
    )
    report(f"{out}: {index.samples} {'recordings' if cut is None else 'pieces'} in {len(index.shards)} shards")


@data.command("index")
@click.argument("pattern")
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def index(pattern: str, out: Path) -> None:
    """Index shards that others made: a path or URL such as "s3://bucket/name-{000000..000009}.tar"."""
    from sa3_torch.train.data.shards import index_shards

    found = index_shards(pattern, out, progress=_bar("index", "shard"))
    report(f"{out}: {found.samples} recordings in {len(found.shards)} shards")


@data.command("verify")
@click.argument("place")
def verify(place: str) -> None:
    """Compare latents, or shards, with the hashes of their index, byte by byte: after a copy, or in doubt.

    PLACE is a folder of latents or shards, or the index of shards, or a URL of it. `sa3 data gate` does it, too.
    """
    _need_torch()
    from sa3_torch.train.data.clip_cache import read_index
    from sa3_torch.train.data.latents import LATENT_FORMAT, verify_latents
    from sa3_torch.train.data.shards import SHARD_FORMAT, verify_shards

    local = "://" not in place and not place.endswith(".json")
    if local and read_index(Path(place), LATENT_FORMAT, SHARD_FORMAT)["format"] == LATENT_FORMAT:
        count = verify_latents(Path(place), _bar("verify", "file"))
    else:
        count = verify_shards(place, progress=_bar("verify", "shard"))
    report(f"{place}: {count} shards as they were written")


@data.command("gate")
@click.argument("latents", type=FOLDER)
@click.option("--data", type=FOLDER, required=True, help="What was encoded: clip cache, folder or shards.")
@click.option("--autoencoder", type=MODEL, required=True, help="The autoencoder, or a model with it.")
@click.option("--items", type=click.IntRange(1), default=16, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def gate(latents: Path, data: Path, autoencoder: Path, items: int, as_json: bool) -> None:
    """Check that pre-encoded latents are undamaged and decode as well as fresh ones. Exit code 1 when they do not.

    What was found is noted in the folder of the latents; training reads it.
    """
    _need_torch()
    from sa3_torch.train.autoencoder.gate import check_latents
    from sa3_torch.train.data.encode.sources import open_source
    from sa3_torch.train.data.latents import verify_latents

    config = ModelConfig.load(autoencoder)
    source = open_source(data, config.sample_rate, config.audio_channels)
    verify_latents(latents, _bar("verify", "file"))
    found = check_latents(latents, source, autoencoder, items=items, progress=_bar("gate", "item"))
    show(json.dumps(found.to_json()) if as_json else str(found))
    if not found.good:
        raise click.exceptions.Exit(1)
    if not as_json:
        models = ("--autoencoder", name_of(autoencoder), "--out", "runs/pretrain")
        report(f"next: {command('train', 'pretrain', '--latents', latents, *models)}")


@data.command("export-latents")
@click.argument("latents", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--autoencoder", type=MODEL, required=True, help="The autoencoder that made the latents.")
def export_latents(latents: Path, out: Path, autoencoder: Path) -> None:
    """Write latents in the public layout: NNN.npy with NNN.json, and silence.npy."""
    _need_torch()
    from sa3_torch.train.data.encode.pre_encode import load_autoencoder
    from sa3_torch.train.data.encode.public_latents import export_public
    from sa3_torch.train.data.latents import LatentSet

    opened = LatentSet(latents, autoencoder=load_autoencoder(autoencoder)[1])
    rate = ModelConfig.load(autoencoder).sample_rate
    count = export_public(opened, out, rate, progress=_bar("export", "item"))
    report(f"{out}: {count} items")


@data.command("import-latents")
@click.argument("folder", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option("--autoencoder", type=MODEL, required=True, help="The autoencoder that made the latents.")
def import_latents(folder: Path, out: Path, autoencoder: Path) -> None:
    """Read latents in the public layout; whether they are this autoencoder's, `sa3 data gate` finds out."""
    _need_torch()
    from sa3_torch.train.data.encode.pre_encode import load_autoencoder
    from sa3_torch.train.data.encode.public_latents import import_public

    digest = load_autoencoder(autoencoder)[1]
    latents = import_public(folder, out, autoencoder=digest, progress=_bar("import", "item"))
    report(f"{out}: {len(latents.items)} items")


def _read_part(_ctx: click.Context, _param: click.Parameter, value: str) -> tuple[int, int]:
    """Read "3/8". Raises click.BadParameter."""
    number, slash, parts = value.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise click.BadParameter(f"{value!r}: expected such as 3/8, the third of eight parts")
    return int(number), int(parts)


@click.command("pre-encode")
@click.option(
    "--data",
    type=FOLDER,
    required=True,
    help="Clip cache, folder of recordings with captions, or shards with an index.",
)
@click.option("--autoencoder", "folder", type=MODEL, required=True, help="The autoencoder, or a model with it.")
@click.option("--out", type=FOLDER, required=True, help="Folder for the latents; unfinished work in it goes on.")
@click.option(
    "--copies",
    type=click.IntRange(1),
    default=4,
    show_default=True,
    help="Versions of a training clip, shifted by less than a frame.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--shard-frames",
    type=click.IntRange(1),
    default=1 << 16,
    show_default=True,
    help="Frames of a shard; what an interrupted run has to do again is at most that.",
)
@click.option("--chunk-frames", type=click.IntRange(1), default=None, help="Frames encoded at once. Default: 30 s.")
@click.option("--device", default="cpu", show_default=True, help="Such as cuda.")
@click.option(
    "--batch",
    type=click.IntRange(1, 4096),
    default=1,
    show_default=True,
    help="Chunks of 30 s encoded together, or as much of shorter sounds of like length; rounding differs.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "tf32", "float16", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of the encoder's products; docs/training.md 3 says what the others cost.",
)
@click.option(
    "--part",
    metavar="K/N",
    callback=_read_part,
    default="1/1",
    show_default=True,
    help="Encode the K-th of N equal parts, as one of N jobs; training reads the folders of all.",
)
@_SKIP_UNREADABLE
def pre_encode(
    data: Path,
    folder: Path,
    out: Path,
    copies: int,
    seed: int,
    shard_frames: int,
    chunk_frames: int | None,
    device: str,
    batch: int,
    precision: str,
    part: tuple[int, int],
    skip_unreadable: float,
) -> None:
    """Encode all captioned sounds to latents, once; the same command goes on where it was stopped."""
    _need_torch()
    from sa3_torch.pipeline import choose_device
    from sa3_torch.train.data.encode.pre_encode import EncodeConfig, PreEncoder
    from sa3_torch.train.data.encode.sources import PartSource, open_source

    choose_device(device)  # which refuses one that is not there

    config = EncodeConfig(
        copies=copies,
        seed=seed,
        shard_frames=shard_frames,
        chunk_frames=chunk_frames,
        batch=batch,
        precision=precision,
    )
    model = ModelConfig.load(folder)
    whole, (number, parts) = open_source(data, model.sample_rate, model.audio_channels), part
    source = whole if parts == 1 else PartSource(whole, number - 1, parts)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        encoder = PreEncoder(source, folder, out, config, device, skip_unreadable)
        latents = encoder.run()
    then = command("data", "gate", out, "--data", data, "--autoencoder", name_of(folder))
    lists = ", ".join(f"{len(names)} {name}" for name, names in encoder.progress.lists().items() if names)
    report(f"{out}: {len(latents.items)} items of latents{f'; left out: {lists}' if lists else ''}\nnext: {then}")
