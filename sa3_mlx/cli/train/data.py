"""``sa3 data`` and ``sa3 pre-encode``: the sounds to train on. Listed and mostly run without PyTorch."""

from __future__ import annotations

import click

from sa3_torch.train.data_cli import commands, pre_encode

__all__ = ["data", "pre_encode"]


@click.group(commands=commands())
def data() -> None:
    """Make, check and pack the sounds to train on."""
