"""``sa3 train``: the training commands of ``sa3_torch``, imported when they are asked for."""

from __future__ import annotations

from importlib.util import find_spec

import click


class TrainGroup(click.Group):
    """Its commands come from ``sa3_torch.train.cli.commands()``."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return sorted(_commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        return _commands().get(cmd_name)


def _commands() -> dict[str, click.Command]:
    if find_spec("torch") is None:
        raise click.ClickException("training needs PyTorch: pip install 'sa3[train]'")
    from sa3_torch.train.cli import commands

    return commands()


@click.group(cls=TrainGroup)
def train() -> None:
    """Train an autoencoder or a diffusion model."""
