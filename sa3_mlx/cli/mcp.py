"""Let assistants make sounds over the Model Context Protocol: ``sa3 mcp``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from sa3_mlx.cli.options.model import MemoryOptions, PrecisionOptions
from sa3_mlx.common.installed import home

from .typed import TypedCommand

_USUAL = "http://127.0.0.1:7860"


@click.command(cls=TypedCommand)
@click.option("--server", help=f"Address of a running server. Default: {_USUAL} where one answers, else an own one.")
@click.option("--token", help="Of that server.")
@click.option(
    "--folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=".",
    show_default=True,
    help="Where sounds are read and written.",
)
def mcp(server: str | None, token: str | None, folder: Path, model: PrecisionOptions, memory: MemoryOptions) -> None:
    """Serve tools to an assistant on standard input and output.

    \b
    sa3 mcp --folder sounds
    """
    from sa3_mlx.server.open.client import Client
    from sa3_mlx.server.open.mcp import make_mcp
    from sa3_mlx.server.running import running
    from sa3_mlx.server.settings import Settings

    address = server or _USUAL
    with ExitStack() as stack:
        if server is None and not Client(address, token).is_there():
            own = Settings(
                folder=home() / "studio",
                adapters=home() / "adapters",
                model=model,
                max_memory=memory.max_memory,
                port=0,
            )
            studio = stack.enter_context(running(own))
            address = f"http://127.0.0.1:{studio.settings.port}"
        make_mcp(address, token, folder).run("stdio")
