"""Say how many sounds are made of one prompt, and which of them stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import click

from sa3_mlx.common.generation.request import Item, Request

TRIES_MAX = 256
USUAL_SPREAD = 0.2
BEST_OF = click.IntRange(1, TRIES_MAX)


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """Say which seeds are tried, and how far variations go."""

    best_of: Annotated[
        int | None,
        click.Option(
            ["--best-of"],
            type=BEST_OF,
            help="Make so many with seeds SEED, SEED+1, ... and keep the best, by the model's latent CLAP or checks.",
        ),
    ]
    variations: Annotated[
        int | None,
        click.Option(
            ["--variations"],
            type=click.IntRange(1, 64),
            help="Make so many sounds near that of the seed, see --spread.",
        ),
    ]
    spread: Annotated[
        float | None,
        click.Option(
            ["--spread"],
            type=float,
            help=f"Of variations: 0 is the sound of the seed, 1 that of another one. Default: {USUAL_SPREAD:g}.",
        ),
    ]

    @property
    def is_plain(self) -> bool:
        """Tell whether nothing was asked for."""
        return self.best_of is None and self.variations is None and self.spread is None

    def copies(self, batch: int) -> int:
        """Return how many clips to ask for where the user asked for ``batch`` files of a prompt.

        Raises click.UsageError for options that do not go together.
        """
        if self.spread is not None and self.variations is None:
            raise click.UsageError("--spread is for --variations: say how many")
        if self.variations is not None and (self.best_of is not None or batch > 1):
            raise click.UsageError("--variations makes files near one seed: leave out --best-of and --batch")
        return batch * (self.best_of or 1)

    def spread_out(self, requests: Sequence[Request]) -> tuple[Request, ...]:
        """Return the requests as they are, with variations, or, to choose from, clip by clip."""
        if self.best_of is not None:
            return single(requests)
        if self.variations is None:
            return tuple(requests)
        spread = USUAL_SPREAD if self.spread is None else self.spread
        return tuple(
            replace(
                request,
                items=nearby(request.items[0], self.variations, spread),
            )
            for request in requests
        )


def nearby(item: Item, count: int, spread: float) -> tuple[Item, ...]:
    """Return clips near one, whose noise is turned from that of its seed to those of the seeds after it."""
    return tuple(replace(item, toward=item.seed + number, spread=spread) for number in range(1, count + 1))


def single(requests: Sequence[Request]) -> tuple[Request, ...]:
    """Return one request for every clip, so that memory does not grow with their number."""
    return tuple(replace(request, items=(item,)) for request in requests for item in request.items)
