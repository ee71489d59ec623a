"""Keep a model loaded and make sounds for pages and programs: ``sa3 serve``."""

from __future__ import annotations

import secrets
import webbrowser
from pathlib import Path

import click

from sa3_mlx.cli.options.model import MemoryOptions, PrecisionOptions
from sa3_mlx.common.installed import home
from sa3_mlx.common.memory.prediction import parse_size
from sa3_mlx.common.terminal import labelled, report

from .typed import Parsed, TypedCommand

_TOKEN_LETTERS = 16  # at least


@click.command(cls=TypedCommand)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; another needs a token.")
@click.option("--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="0 takes a free one.")
@click.option("--open", "opened", is_flag=True, help="Open the page in a browser.")
@click.option("--token", help="What clients must show. Made and printed where the host is not this machine alone.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="A page elsewhere that may use the server; repeatable.")
@click.option("--name", "names", multiple=True, metavar="HOST", help="A further name of this machine; repeatable.")
@click.option("--folder", type=click.Path(path_type=Path), help="Of history and files. Default: studio in SA3_HOME.")
@click.option("--adapters", type=click.Path(path_type=Path), help="Folder of adapters. Default: adapters in SA3_HOME.")
@click.option(
    "--keep-alive",
    type=float,
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="Until an idle model is freed; below 0 never.",
)
@click.option(
    "--batch-max",
    type=click.IntRange(1, 64),
    default=8,
    show_default=True,
    help="Clips of waiting jobs that run together; 1 runs each by itself.",
)
@click.option("--queue-max", type=click.IntRange(1, 100_000), default=2000, show_default=True, help="Waiting jobs.")
@click.option("--upload-max", type=Parsed(parse_size), default="512MiB", show_default=True, help="Of one file.")
@click.option("--disk-free", type=Parsed(parse_size), default="1GB", show_default=True, help="Left free on the disk.")
def serve(
    host: str,
    port: int,
    opened: bool,
    token: str | None,
    cors: tuple[str, ...],
    names: tuple[str, ...],
    folder: Path | None,
    adapters: Path | None,
    keep_alive: float,
    batch_max: int,
    queue_max: int,
    upload_max: int,
    disk_free: int,
    model: PrecisionOptions,
    memory: MemoryOptions,
) -> None:
    """Serve a page to make and edit sounds with, and the interfaces behind it.

    \b
    sa3 serve --open
    sa3 serve --model demo --port 8000
    """
    from sa3_mlx.server.app import make_server
    from sa3_mlx.server.listening import listen
    from sa3_mlx.server.security import is_loopback
    from sa3_mlx.server.settings import Settings
    from sa3_mlx.server.studio import Studio

    if token is None and not is_loopback(host):
        token = secrets.token_urlsafe(32)
    if token is not None and len(token) < _TOKEN_LETTERS:
        raise click.UsageError(f"--token has {len(token)} letters: use at least {_TOKEN_LETTERS}, or leave it out")
    listening = listen(host, port)
    settings = Settings(
        folder=folder or home() / "studio",
        adapters=adapters or home() / "adapters",
        model=model,
        max_memory=memory.max_memory,
        keep_alive=keep_alive,
        batch_max=batch_max,
        queue_max=queue_max,
        upload_max=upload_max,
        disk_free=disk_free,
        host=host,
        port=listening.getsockname()[1],
        token=token,
        origins=cors,
        names=names,
    )
    studio = Studio(settings)
    address = f"http://{f'[{host}]' if ':' in host else host}:{settings.port}/"
    address += "" if token is None else f"#token={token}"
    report(labelled("page", address, 8))
    report(labelled("model", studio.default.label, 8))
    report(labelled("folder", str(settings.folder), 8))
    if studio.store.interrupted:
        report(labelled("history", f"{studio.store.interrupted} job(s) were interrupted; the page can queue them", 8))
    if opened:
        webbrowser.open(address)
    make_server(studio).run(sockets=[listening])
