"""Make the sounds and pictures that README and docs show: ``python -m benchmarks gallery``."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import click
from PIL import Image

from sa3_mlx.cli.app import run
from sa3_mlx.cli.home import find_model
from sa3_mlx.common.files.atomic import new_file
from sa3_mlx.common.installed import DEMO

SHOWN = 6
_DOCS = Path(__file__).parents[2] / "docs"
_COLUMNS = 3
_WIDTH = 960  # pixels


@click.command()
@click.option("--model", default=DEMO, show_default=True, help="Installed model or folder.")
@click.option("--backend", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True)
@click.option("--seconds", type=click.FloatRange(0.1, 30), default=4.0, show_default=True, help="At most the model's.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=_DOCS, help="Default: docs.")
def gallery(model: str, backend: str, seconds: float, seed: int, out: Path) -> None:
    """Write the first six examples of a model to pictures/ and sounds/ of a folder, and the table that shows them.

    A sound is OGG of some tens of kB, made with the model's usual sampling and one seed: the same on the same machine.
    """
    found = find_model(model, generates=True)
    examples = found.config.examples[:SHOWN]
    if not examples:
        raise ValueError(f"{found.name} names no examples: 'python -m benchmarks ship' puts them into config.json")
    length = min(seconds, found.config.max_seconds)
    for folder in ("pictures", "sounds"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for prompt in examples:
        picture, sound = (out / path for path in places(prompt))
        words = ["--model", model, "--backend", backend, "--seconds", f"{length:g}", "--seed", str(seed)]
        if run(["generate", prompt, *words, "--out", str(sound), "--spectrogram", str(picture), "--force", "--quiet"]):
            raise ValueError(f"{prompt!r} was not made")
        shrink(picture)
    click.echo(table(examples))


def shrink(picture: Path) -> None:
    """Make a picture as wide as a page shows it, in 128 colours: a fifth of its bytes."""
    with Image.open(picture) as full, new_file(picture) as partial:
        small = full.convert("RGB").resize((_WIDTH, round(_WIDTH * full.height / full.width)), Image.Resampling.LANCZOS)
        small.quantize(128).save(partial, format="PNG", optimize=True)


def places(prompt: str) -> tuple[str, str]:
    """Return where picture and sound of a prompt lie."""
    name = "-".join(re.findall(r"[a-z0-9#]+", prompt.lower())).replace("#", "-sharp")
    return f"pictures/{name}.png", f"sounds/{name}.ogg"


def table(prompts: tuple[str, ...]) -> str:
    """Return the Markdown that shows prompts, three side by side, for a page beside docs/."""
    lines = []
    for start in range(0, len(prompts), _COLUMNS):
        row = prompts[start : start + _COLUMNS]
        shown = [places(prompt) for prompt in row]
        lines += [
            _row(f'"{prompt}"' for prompt in row),
            _row("---" for _ in row),
            _row(f"![spectrogram](docs/{picture})" for picture, _ in shown),
            _row(f"[listen](docs/{sound})" for _, sound in shown),
            "",
        ]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
