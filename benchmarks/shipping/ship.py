"""Put two trained models into the package as ``demo`` and ``demo-base``: ``python -m benchmarks ship``."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import click

from sa3_mlx.assets import DEMO
from sa3_mlx.cli.audio.generate import prompts_in
from sa3_mlx.common.embedded import Shipped, ShippedStage, pack, unpack
from sa3_mlx.common.files.atomic import new_folder, write_text
from sa3_mlx.common.files.safetensors import file_hash
from sa3_mlx.common.installed import open_model
from sa3_mlx.common.model.checkpoint import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import Sampling
from sa3_mlx.common.text.tokenizer import Tokenizer

BYTES_MAX = 24_000_000  # of both, as a wheel compresses them
_FILES = (WEIGHTS_FILE, TOKENIZER_FILE, "parents.json")
_MODEL = click.Path(path_type=Path, file_okay=False, exists=True)


@click.command()
@click.argument("demo", type=_MODEL)
@click.argument("base", type=_MODEL)
@click.option("--ladder", type=_MODEL, required=True, help="Folder of benchmarks/ladder.sh with all runs.")
@click.option("--sampling", required=True, help="Usual sampling of the demo, such as pingpong:2:1.")
@click.option("--base-sampling", required=True, help="Usual sampling of the base, such as euler:16:3.")
@click.option(
    "--examples",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    required=True,
    help="Prompts that the demo does well, one a line.",
)
@click.option("--assets", type=_MODEL, default=DEMO.parent, help="Default: those of this checkout.")
def ship(demo: Path, base: Path, ladder: Path, sampling: str, base_sampling: str, examples: Path, assets: Path) -> None:
    """Put the folders DEMO and BASE into the package as demo and demo-base.

    Both may be quantized. What is alike in both is stored once. Nothing changes where the two are more than 24 MB in a
    wheel, where an example has a word that the demo does not know, or where the models do not belong together.
    """
    stages = made_by(ladder)
    prompts = tuple(prompts_in(examples))
    with tempfile.TemporaryDirectory() as work:
        few = _prepared(demo, Path(work) / "demo", "demo", sampling, prompts)
        whole = _prepared(base, Path(work) / "whole", "demo-base", base_sampling, prompts)
        check_belonging(few, whole)
        packed = Path(work) / "demo-base"
        pack(whole, few, packed)
        unpacked = unpack(packed, few, Path(work) / "unpacked")
        open_model(Path(work) / "unpacked")
        for folder, source, weights in ((few, demo, file_hash(few / WEIGHTS_FILE)), (packed, base, unpacked)):
            Shipped(weights=weights, source=file_hash(source / WEIGHTS_FILE), stages=stages).write(folder)
        sizes = {folder.name: packed_bytes(folder) for folder in (few, packed)}
        text = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in sizes.items())
        if sum(sizes.values()) > BYTES_MAX:
            raise ValueError(f"in a wheel: {text}; allowed are {BYTES_MAX / 1e6:g} MB for both: quantize further")
        for folder in (few, packed):
            with new_folder(assets / folder.name) as new:
                shutil.copytree(folder, new, dirs_exist_ok=True)
    click.echo(f"{assets}: {text}, compressed; {len(stages)} stages recorded")


def made_by(ladder: Path) -> tuple[ShippedStage, ...]:
    """Return the runs in a folder that are done, by name. Raises ValueError where there is none."""
    found = []
    for folder in sorted(path for path in ladder.iterdir() if path.is_dir()):
        files = (folder / "settings.json", folder / "log.jsonl", folder / "model" / WEIGHTS_FILE)
        if all(path.is_file() for path in files):
            settings, log, weights = map(file_hash, files)
            found.append(ShippedStage(name=folder.name, settings=settings, log=log, weights=weights))
    if not found:
        raise ValueError(f"{ladder}: no run that is done; expected folders with settings.json, log.jsonl and model/")
    return tuple(found)


def check_belonging(demo: Path, base: Path) -> None:
    """Raise ValueError unless two models have the same sizes and words."""
    one, other = ModelConfig.load(demo), ModelConfig.load(base)
    sizes = [(config.same, config.require_diffusion().text_encoder) for config in (one, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{one.name} and {other.name} differ in the autoencoder or the text encoder")
    if (demo / TOKENIZER_FILE).read_bytes() != (base / TOKENIZER_FILE).read_bytes():
        raise ValueError(f"{one.name} and {other.name} know other words")


def packed_bytes(folder: Path) -> int:
    """Return the bytes of a folder in a wheel, which deflates every file."""
    with tempfile.TemporaryFile() as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
        for path in folder.iterdir():
            wheel.write(path, path.name)
        return sum(entry.compress_size for entry in wheel.infolist())


def _prepared(source: Path, folder: Path, name: str, sampling: str, examples: tuple[str, ...]) -> Path:
    """Copy a model under its new name. Raises ValueError for an example with a word that it does not know."""
    config = open_model(source)
    tokenizer = Tokenizer(source / TOKENIZER_FILE, config.require_diffusion().text_encoder.max_length)
    for prompt in examples:
        if unknown := tokenizer.unknown(prompt):
            raise ValueError(f"example {prompt!r}: {source} does not know {unknown[0]!r}")
    new = replace(config, name=name, sampling=Sampling.parse(sampling), examples=examples, clap=None)
    folder.mkdir()
    for file in _FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    write_text(folder / CONFIG_FILE, new.to_json())
    return folder
