"""Show adapters, merge them into a model, convert them between layouts: ``sa3 lora``."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

import click
import numpy as np

from sa3_mlx.cli.adapters import describe, open_adapters, parse_lora
from sa3_mlx.cli.backend import choose
from sa3_mlx.cli.home import find_model
from sa3_mlx.cli.options.output import CommonOptions
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.cli.output.report import first_command
from sa3_mlx.cli.typed import TypedCommand
from sa3_mlx.common.adapters.applied import Applied, prepare_adapters, with_bases
from sa3_mlx.common.adapters.config import adaptable_layers
from sa3_mlx.common.adapters.format import PEFT_FILE, write_adapter
from sa3_mlx.common.files.atomic import new_folder
from sa3_mlx.common.files.audio import check_target
from sa3_mlx.common.files.safetensors import (
    OnTensor,
    TensorEntry,
    TensorFile,
    array_entry,
    file_hash,
    watched,
    write_tensors,
)
from sa3_mlx.common.model.checkpoint import CLAP_FILE, CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE
from sa3_mlx.common.model.config import FORMAT, ModelConfig
from sa3_mlx.common.origin import ORIGIN_FILE
from sa3_mlx.common.quant.format import check_file
from sa3_mlx.common.terminal import labelled, report, show

_MODEL = click.option("--model", metavar="NAME|PATH", help="A model that it fits. Default: see 'sa3 models'.")


@click.group()
def lora() -> None:
    """Show, merge and convert adapters: LoRA, DoRA, BoRA and their -xs forms.

    'sa3 train lora' makes one; --lora of 'sa3 generate' uses it.
    """


@lora.command(cls=TypedCommand)
@click.argument("file", type=click.Path(path_type=Path))
@_MODEL
def info(file: Path, model: str | None) -> None:
    """Show what is in an adapter FILE of either layout."""
    from sa3_convert import open_adapter

    found = find_model(model, generates=True)
    adapter = open_adapter(file, found.config)
    own, entry = adapter.config, adapter.info
    values = {
        "type": own.type,
        "rank": own.rank,
        "alpha": f"{own.alpha:g}",
        "hash": file_hash(file),
        "trained on": entry.base,
        "hash of its base": entry.base_hash,
        "steps": entry.step,
        "licence": entry.licence,
        "layers": f"{len(adapter.layers)} of {len(adaptable_layers(found.config))} of {found.label}",
        "parameters": f"{adapter.bytes // 4:,}",
        "include": ", ".join(own.include),
        "exclude": ", ".join(own.exclude),
    }
    for name, value in values.items():
        if value not in (None, ""):
            show(labelled(name, str(value), 18))


@lora.command(cls=TypedCommand)
@click.argument("model", metavar="MODEL")
@click.argument("adapters", metavar="ADAPTER[:STRENGTH]...", nargs=-1, required=True)
@click.argument("out", type=click.Path(path_type=Path))
def merge(model: str, adapters: tuple[str, ...], out: Path, common: CommonOptions) -> None:
    """Write MODEL with adapters in its weights to the folder OUT, each on top of those before it.

    \b
    sa3 lora merge medium bell.safetensors warm.safetensors:0.5 medium-bell
    """
    found = find_model(model, generates=True)
    applied = open_adapters([parse_lora(text) for text in adapters], found.config)
    if out.exists() and not (common.force and (out / CONFIG_FILE).is_file()):
        raise ValueError(f"{out}: exists already; give another folder, or --force to replace a model")
    prepared = prepare_adapters(applied, found.folder, found.config, merged=True)
    twin = importlib.import_module(f"sa3_{choose('auto')}.lora")
    with Progress(quiet=common.quiet).tensors("merge") as show_progress:
        changed = write_merged(found.folder, found.config, prepared, out, twin, show_progress)
    for text, one in zip(adapters, applied, strict=True):
        report(f"{text}: {describe(one)}")
    report(f"{out}: {changed} layers of {found.label} changed")
    report(f"  next        {first_command(out)}")


@lora.command(cls=TypedCommand)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@_MODEL
@click.option("--to-official", is_flag=True, help="Write the layout of the official tools.")
@click.option("--to-peft", is_flag=True, help="Write a folder of the PEFT library, for the transformer of diffusers.")
def convert(
    source: Path, out: Path, model: str | None, to_official: bool, to_peft: bool, common: CommonOptions
) -> None:
    """Convert an adapter from the layout of the official tools, or a folder of PEFT, to that of sa3, or back.

    The model says what the layers are called. --lora takes every layout.

    \b
    sa3 lora convert official.safetensors bell.safetensors --model medium
    sa3 lora convert bell.safetensors official.safetensors --model medium --to-official
    """
    import sa3_convert as converter

    if to_official and to_peft:
        raise click.UsageError("--to-official and --to-peft exclude each other")
    found = find_model(model, generates=True)
    if not to_peft:
        check_target(out, overwrite=common.force)
    elif out.exists() and not (common.force and (out / PEFT_FILE).is_file()):
        raise ValueError(f"{out}: exists already; give another folder, or --force to replace an adapter of PEFT")
    adapter = converter.open_adapter(source, found.config)
    if to_official:
        digest = converter.write_official_adapter(out, adapter, found.config)
    elif to_peft:
        digest = converter.write_peft(out, adapter, found.config)
    else:
        digest = write_adapter(out, with_bases(adapter, found.folder))
    report(f"{out}: {describe(Applied(adapter=adapter))}, {digest}")


def write_merged(
    folder: Path,
    config: ModelConfig,
    adapters: Sequence[Applied],
    out: Path,
    twin: ModuleType,
    progress: OnTensor | None = None,
) -> int:
    """Write the checkpoint ``folder`` with adapters in it to ``out``, which appears when it is complete.

    ``twin`` is the ``lora`` module that computes -> layers changed. Raises ValueError for a quantized model.
    """
    changed = {layer for applied in adapters for layer in applied.adapter.layers}
    with TensorFile.open(folder / WEIGHTS_FILE) as file:
        if check_file(file, config):
            raise ValueError(f"{folder}: is quantized; merge into the model that it was made from, then quantize that")
        entries = [_entry(file, name, changed, adapters, twin) for name in file.names()]
        with new_folder(out) as made:
            write_tensors(made / WEIGHTS_FILE, watched(entries, progress), {"format": FORMAT})
            for name in (CONFIG_FILE, TOKENIZER_FILE, CLAP_FILE, ORIGIN_FILE):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, made / name)
    return len(changed)


def _entry(
    file: TensorFile, name: str, changed: set[str], adapters: Sequence[Applied], twin: ModuleType
) -> TensorEntry:
    dtype, shape = file.info(name)
    layer = name.removesuffix(".weight")
    if layer not in changed or layer == name:
        return TensorEntry(name, dtype, shape, partial(file.raw, name))

    def load() -> np.ndarray:
        return array_entry(name, twin.merged_weight(layer, file.read(name), adapters), dtype).load()

    return TensorEntry(name, dtype, shape, load)
