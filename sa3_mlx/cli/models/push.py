"""Upload a model to the hub with its card: ``sa3 push``."""

from __future__ import annotations

import re

import click

from sa3_mlx.cli.fingerprint import fingerprint
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.installed import HUB
from sa3_mlx.common.model.checkpoint import CLAP_FILE, CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.origin import ORIGIN_FILE
from sa3_mlx.common.terminal import report, show

from .card import PARENTS_FILE, QUANTIZATION_FILE, Described, card, describe_for_card

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, CLAP_FILE, ORIGIN_FILE, PARENTS_FILE, QUANTIZATION_FILE)
_CARD_FILE = "README.md"


@click.command(cls=TypedCommand)
@click.argument("model", metavar="MODEL")
@click.argument("repository", metavar="USER/REPO")
@click.option("--licence", metavar="NAME", help="Licence of your own model, such as mit. Default: that of its parents.")
@click.option(
    "--licence-allows-it", is_flag=True, help="Go on where it is not known that a parent's licence allows it."
)
@click.option("--private", is_flag=True, help="Make a repository that only you see, where there is none.")
@click.option("--card", "card_only", is_flag=True, help="Print the model card and upload nothing.")
@click.option("--quiet", "-q", is_flag=True, help="Print the result only.")
def push(
    model: str,
    repository: str,
    licence: str | None,
    licence_allows_it: bool,
    private: bool,
    card_only: bool,
    quiet: bool,
) -> None:
    """Upload MODEL, an installed model or a folder, to USER/REPO of the hub, with a model card.

    The card says what it is, what it was made from with all hashes, under which licences, and how it is used.
    'sa3 get USER/REPO' installs it. It needs an access token: 'hf auth login'.

    \b
    sa3 push my-model me/my-model --licence mit --card
    sa3 push my-model me/my-model --licence mit
    """
    from sa3_convert.hub import upload

    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository}: expected USER/REPO, such as me/my-model")
    found = find_model(model, generates=False)
    described = describe_for_card(found, fingerprint(found.folder, found.config, quiet=quiet), licence)
    _check_licences(described, told=licence_allows_it)
    text = card(described, repository)
    if card_only:
        show(text)
        return
    files = [found.folder / name for name in _FILES if (found.folder / name).is_file()]
    Progress(quiet=quiet).line(f"{found.label} to {HUB}{repository}: {', '.join(file.name for file in files)}")
    revision = upload(repository, files, {_CARD_FILE: text.encode()}, private=private)
    report(f"{HUB}{repository} at revision {revision}\n  next        sa3 get {repository}")


def _check_licences(described: Described, *, told: bool) -> None:
    """Raise ValueError where a parent's licence is not known to allow this."""
    unknown = [licence for licence in described.parents if licence.conditions is None]
    if unknown and not told:
        names = ", ".join(f"{licence.name} ({licence.page})" for licence in unknown)
        raise ValueError(
            f"{described.model.name}: made from what is under {names}, which is not known to allow passing it on; read "
            "it, and give --licence-allows-it if it does"
        )
