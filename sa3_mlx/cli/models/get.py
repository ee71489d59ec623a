"""Download a model, verify it and convert it, in one command: ``sa3 get``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from sa3_mlx.cli.options.output import CommonOptions
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.output.report import first_command
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common import terminal
from sa3_mlx.common.files.atomic import new_folder, write_json
from sa3_mlx.common.installed import home, known_name, models_folder, open_model
from sa3_mlx.common.licences import accept, accepted
from sa3_mlx.common.model.presets import PRESETS, REPOSITORIES
from sa3_mlx.common.origin import ORIGIN_FILE

from .wanted import Source, Wanted, find_wanted, is_installed, record_revision


@click.command(cls=TypedCommand)
@click.argument("model", metavar="MODEL")
@click.option(
    "--source",
    type=click.Choice(["auto", "optimized", "original"]),
    default="auto",
    show_default=True,
    help="Repository of a released model: optimized needs no account, original has single precision and needs one; "
    "auto is original where an access token is.",
)
@click.option("--revision", metavar="REV", help="Commit or branch. Default: the one taken before, else the newest.")
@click.option("--name", help="Name to install it under. Default: the model's.")
@click.option("--accept-licence", is_flag=True, help="Accept the licences that are shown, for scripts.")
@click.option("--keep-download", is_flag=True, help="Keep the downloaded files, for the next model that shares some.")
def get(
    model: str,
    source: Source,
    revision: str | None,
    name: str | None,
    accept_licence: bool,
    keep_download: bool,
    common: CommonOptions,
) -> None:
    """Download, verify and install MODEL: a released model, or USER/REPO of the hub that 'sa3 push' wrote.

    Size, licences and source are shown first; a download that broke off goes on where it was.

    \b
    sa3 get small-music
    sa3 get medium --source original
    """
    from sa3_convert.hub import AccessRefused

    try:
        install(
            model,
            Progress(quiet=common.quiet),
            source=source,
            revision=revision,
            name=name,
            accepts=accept_licence,
            keep=keep_download,
            force=common.force,
        )
    except AccessRefused as error:
        known = known_name(model)
        if source == "optimized" or known not in REPOSITORIES or PRESETS[known].diffusion is None:
            raise
        raise AccessRefused(f"{error}; without an account: sa3 get {known} --source optimized") from error


def install(
    model: str,
    progress: Progress,
    *,
    source: Source = "auto",
    revision: str | None = None,
    name: str | None = None,
    accepts: bool = False,
    keep: bool = False,
    force: bool = False,
) -> None:
    """Do so, with these options. Raises click.Abort where the user declines, and what the parts raise."""
    from sa3_convert.hub import check_room, fetch, missing_bytes

    wanted = find_wanted(model, source, revision, name)
    target, downloads = models_folder() / wanted.name, home() / "downloads"
    if is_installed(wanted.name) and not force:
        raise ValueError(f"{wanted.name}: is installed already; give --force to replace it, or --name for another one")
    to_load = missing_bytes(downloads, wanted.remote, wanted.files)
    _show(wanted, to_load, progress)
    _ask(wanted, accepts=accepts)
    check_room({downloads: to_load, target: wanted.size})
    with _bars(progress) as show:
        folder = fetch(wanted.remote, wanted.files, downloads, show)
    _place(wanted, folder, target, progress, force=force)
    record_revision(wanted.remote)
    if not keep:
        _remove(wanted, folder)
    terminal.report(f"next: {first_command(target)}")


def _show(wanted: Wanted, to_load: int, progress: Progress) -> None:
    remote = wanted.remote
    there = "" if to_load == wanted.size else f" ({(wanted.size - to_load) / 1e9:.2f} GB are here already)"
    progress.line(f"{wanted.name} from {remote.page} at revision {remote.revision}")
    progress.line(f"  size     {wanted.size / 1e9:.2f} GB to download{there}, as much again once installed")
    for licence in wanted.licences:
        progress.line(f"  licence  {licence.name}: {licence.page}")


def _ask(wanted: Wanted, *, accepts: bool) -> None:
    """Ask once for licences that were not accepted on this machine. Raises ValueError where nobody can answer."""
    known = accepted()
    new = [licence for licence in wanted.licences if licence.id not in known]
    if not new:
        return
    if not accepts:
        names = " and ".join(f"{licence.name}, {licence.page}" for licence in new)
        if not (sys.stdin and sys.stdin.isatty()):
            raise ValueError(f"{wanted.name}: give --accept-licence, if you accept: {names}")
        click.confirm("Accept and download?", abort=True, err=True)
    accept(new)


def _place(wanted: Wanted, folder: Path, target: Path, progress: Progress, *, force: bool) -> None:
    """Convert what was downloaded, or check and copy what is in our format."""
    import sa3_convert as converter

    if wanted.layout == "ours":
        with new_folder(target.absolute()) as new:
            for file in wanted.files:
                shutil.copyfile(folder / file, new / file)
            if not (new / ORIGIN_FILE).is_file():
                write_json(new / ORIGIN_FILE, wanted.origin().stored())
            open_model(new)
        return
    with progress.tensors("convert") as show:
        report = converter.convert(
            wanted.place(folder), target, name=wanted.name, force=force, progress=show, origin=wanted.origin()
        )
    progress.line(str(report))


def _remove(wanted: Wanted, folder: Path) -> None:
    """Remove the files of this model from the downloads, and folders that are empty then."""
    for file in wanted.files:
        (folder / file).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for path in (folder, folder.parent, folder.parent.parent):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


@contextmanager
def _bars(progress: Progress) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that moves a bar for each thing that is done to so many of so many bytes."""
    bars = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in bars:
            bars[what] = progress.bar(what, total / 1e6, "MB")
        bars[what].update(done / 1e6 - bars[what].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()
