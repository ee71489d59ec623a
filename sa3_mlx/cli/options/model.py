"""Choose a model, what computes it, in which types and with how much memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import click

from sa3_mlx.cli.adapters import LoraFile, parse_lora
from sa3_mlx.cli.backend import DEVICES
from sa3_mlx.cli.typed import Parsed
from sa3_mlx.common.memory.prediction import parse_size
from sa3_mlx.common.model.precision import DTYPES, TEXT_DTYPES


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Choose a model and what computes it."""

    name: Annotated[
        str | None,
        click.Option(
            ["--model", "name"], metavar="NAME|PATH", help="Installed model or folder. Default: see 'sa3 models'."
        ),
    ]
    backend: Annotated[
        str, click.Option(["--backend"], type=click.Choice(["auto", "mlx", "torch"]), default="auto", show_default=True)
    ]
    device: Annotated[
        str,
        click.Option(
            ["--device"],
            type=click.Choice(DEVICES),
            default="auto",
            show_default=True,
            help="Of PyTorch; auto is cuda where there is one, else cpu. MLX chooses its own.",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(BackendOptions):
    """Choose a model, what computes it, and in which types."""

    dtype: Annotated[
        str,
        click.Option(
            ["--dtype"],
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            help="Of the diffusion transformer; auto is float32 on a CPU, float16 on a GPU.",
        ),
    ]
    text_dtype: Annotated[
        str,
        click.Option(
            ["--text-dtype"],
            type=click.Choice(TEXT_DTYPES),
            default="auto",
            show_default=True,
            help="Of the text encoder; auto is float32 on a CPU, the file's own on a GPU.",
        ),
    ]
    compiled: Annotated[
        bool,
        click.Option(
            ["--compile", "compiled"],
            is_flag=True,
            help="PyTorch: compile the sampling step and the decoder; pays from the second sound on.",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(PrecisionOptions):
    """Choose a model, what computes it, in which types, and adapters for it."""

    lora: Annotated[
        tuple[LoraFile, ...],
        click.Option(
            ["--lora"],
            multiple=True,
            metavar="FILE[:STRENGTH[:FROM-TO]]",
            type=Parsed(parse_lora),
            help="Adapter; can be repeated. FROM-TO are the times in which it is on, 1 is noise, 0 the end: 0.5-1 is "
            "the first half.",
        ),
    ]
    lora_merged: Annotated[
        bool,
        click.Option(
            ["--lora-merged"],
            is_flag=True,
            help="Put adapters into the weights: a little faster; layers of a quantized model take full size.",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Limit the memory of a run."""

    max_memory: Annotated[  # bytes
        int | None,
        click.Option(
            ["--max-memory"],
            metavar="SIZE",
            type=Parsed(parse_size),
            help="Such as 6GB, for the model's arrays: predict their peak; free parts, choose chunks and, where a type "
            "is auto, 16 bits to stay below, or refuse. An estimate with PyTorch, enforced on CUDA alone.",
        ),
    ]
