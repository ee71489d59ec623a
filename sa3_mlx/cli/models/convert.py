"""Convert checkpoints of other layouts to ours, and back: ``sa3 convert``."""

from __future__ import annotations

from pathlib import Path

import click

from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.output import CommonOptions
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.output.report import first_command
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common import terminal
from sa3_mlx.common.installed import installed, known_name, models_folder
from sa3_mlx.common.model.presets import REPOSITORIES


@click.command(cls=TypedCommand)
@click.argument("source", metavar="SOURCE")
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--name", help="Name of the model. Default: taken from SOURCE.")
@click.option("--to-official", is_flag=True, help="Write the official layout from a converted model.")
@click.option("--to-mlx-npz", is_flag=True, help="Write the files of the official MLX port from a converted model.")
def convert(
    source: str, out: Path | None, name: str | None, to_official: bool, to_mlx_npz: bool, common: CommonOptions
) -> None:
    """Convert SOURCE, a checkpoint on this disk, to the folder OUT. Released models are had with 'sa3 get'.

    A checkpoint is an official folder, or .npz files of the official MLX port: their folder, or the file of the DiT.
    With --name instead of OUT it is installed in $SA3_HOME/models (default ~/.cache/sa3/models) under that name.

    \b
    sa3 convert ~/checkpoints/my-model my-model
    sa3 convert ~/mlx/dit_medium_f16.npz --name medium
    sa3 convert small-music ~/official --to-official
    """
    import sa3_convert as converter

    progress = Progress(quiet=common.quiet)
    if to_official or to_mlx_npz:
        if out is None or name is not None or (to_official and to_mlx_npz):
            raise click.UsageError("--to-official or --to-mlx-npz needs OUT, and takes no --name")
        folder = find_model(source, generates=False).folder
        export = converter.export_official if to_official else converter.export_port
        with progress.tensors("export") as show:
            report = export(folder, out, force=common.force, progress=show)
        terminal.report(str(report))
        return
    _refuse_ours(source)
    target = _target(source, out, name)
    if target.exists() and not common.force:
        raise ValueError(f"{target}: exists already; give another folder, or --force to replace it")
    with progress.tensors("convert") as show:
        report = converter.convert(source, target, name=name, force=common.force, progress=show)
    terminal.report(f"{report}\n  next        {first_command(target)}")


def _refuse_ours(source: str) -> None:
    """Raise ValueError for a model that is converted already, given by its name or its path."""
    from sa3_convert.source import is_ours

    folder = Path(source)
    if is_ours(folder if folder.exists() else installed().get(source, folder)):
        raise ValueError(f"{source}: already in the sa3 format; use it as it is, or export it with --to-official")


def _target(source: str, out: Path | None, name: str | None) -> Path:
    """Return the folder to write. Raises click.UsageError, ValueError, or FileNotFoundError without a source."""
    if not Path(source).exists():
        known = known_name(source)
        hint = (
            f"'sa3 get {known}'" if known in REPOSITORIES else f"released models: {', '.join(REPOSITORIES)} (sa3 get)"
        )
        raise FileNotFoundError(f"{source}: no such folder or file; {hint}")
    if out is not None:
        return out
    if name is None:
        raise click.UsageError("give OUT, or --name to install it under that name")
    if Path(name).name != name or name.startswith("."):
        raise ValueError(f"name {name!r} is not the name of a folder")
    return models_folder() / name
