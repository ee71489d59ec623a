"""Declare the options that several commands share, as dataclasses whose fields carry them.

A command of class ``TypedCommand`` (typed.py) takes a group of options as one parameter: ``output: OutputOptions`` in
the signature of its function adds ``--out``, ``--format``, ... and hands them over together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import click
from click.core import ParameterSource

from sa3_mlx.common.files.wav import Subtype
from sa3_mlx.common.generation.memory import parse_size
from sa3_mlx.common.generation.noise import SEED_MAX, check_seed, random_seed
from sa3_mlx.common.generation.request import DEFAULT_CROSSFADE_MS, Blend, Item, Request
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.precision import DTYPES, TEXT_DTYPES
from sa3_mlx.common.model.sampling import SAMPLER_NAMES, Guidance, Sampling
from sa3_mlx.common.schema import quoted

from .adapters import LoraFile, parse_lora
from .backend import DEVICES
from .typed import Parsed

FORMATS: tuple[Subtype, ...] = get_args(Subtype)


def parse_region(text: str) -> tuple[float, float | None]:
    """Read "START:END" in seconds; an empty START is 0, an empty END None, the end of the clip. Raises ValueError."""
    start, colon, end = text.partition(":")
    try:
        region = float(start or "0"), float(end) if end.strip() else None
    except ValueError:
        colon = ""
    if not colon:
        raise ValueError(f"{quoted(text)}: expected START:END in seconds, such as 1.5:3 or 2:")
    return region


Force = Annotated[bool, click.Option(["--force"], is_flag=True, help="Replace existing files.")]
Quiet = Annotated[bool, click.Option(["--quiet", "-q"], is_flag=True, help="No progress; print files and seeds alone.")]


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Hold what most commands that write something take."""

    force: Force
    quiet: Quiet


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


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Say how clips are sampled; None stands for the model's own way."""

    seed: Annotated[int | None, click.Option(["--seed"], type=int, help="Random if not given; always printed.")]
    batch: Annotated[
        int,
        click.Option(
            ["--batch"],
            type=click.IntRange(1, 64),
            default=1,
            show_default=True,
            help="Files to make, with seeds SEED, SEED+1, ...",
        ),
    ]
    steps: Annotated[
        int | None,
        click.Option(["--steps"], type=int, help="Sampling steps. Default: the model's; mostly 8, for base models 50."),
    ]
    sampler: Annotated[
        str | None,
        click.Option(
            ["--sampler"],
            type=click.Choice(SAMPLER_NAMES),
            help="Default: the model's; mostly pingpong, for base models euler.",
        ),
    ]
    guidance: Annotated[
        float | None,
        click.Option(
            ["--guidance"],
            type=float,
            help="Guidance scale. Default: the model's; mostly 1 (off), for base models 7.",
        ),
    ]
    apg: Annotated[
        float | None,
        click.Option(
            ["--apg"], type=float, help="0 plain guidance, 1 orthogonal part alone. Default: the model's; mostly 1."
        ),
    ]
    rescale: Annotated[
        float | None,
        click.Option(["--rescale"], type=float, help="0..1, guards guided levels. Default: the model's; mostly 0."),
    ]
    interval: Annotated[
        tuple[float, float] | None,
        click.Option(
            ["--interval"],
            type=(float, float),
            metavar="LOW HIGH",
            help="Times (1 noise, 0 data) in which guidance is on. Default: the model's; mostly 0 1.",
        ),
    ]
    norm_threshold: Annotated[
        float | None,
        click.Option(
            ["--norm-threshold"], type=float, help="Limits guidance; 0 is off. Default: the model's; mostly 0."
        ),
    ]
    negative: Annotated[
        str | None,
        click.Option(["--negative"], metavar="PROMPT", help="What to steer away from; needs guidance."),
    ]
    blend: Annotated[
        Blend,
        click.Option(
            ["--blend"],
            type=click.Choice(get_args(Blend)),
            default="spherical",
            show_default=True,
            help="How a prompt 'piano | violin : 0.3' goes from one text to the other.",
        ),
    ]
    head_room: Annotated[
        float | None,
        click.Option(
            ["--head-room"], type=float, metavar="SECONDS", help="Made beyond the end, then cut. Default: model's."
        ),
    ]
    decode_noise: Annotated[
        bool,
        click.Option(["--decode-noise"], is_flag=True, help="Decode with the noise of the official decoder."),
    ]

    def requests(self, prompts: Sequence[str], seconds: float, config: ModelConfig) -> tuple[Request, ...]:
        """Return a batch of clips of ``seconds`` for every prompt; the seeds go on from one batch to the next.

        The first seed is a random one when none was given. Raises ValueError for one that is out of range.
        """
        first = random_seed() if self.seed is None else self.seed
        check_seed(first)
        last = first + self.batch * len(prompts) - 1
        if last > SEED_MAX:
            raise ValueError(f"seed is {first}: the last file would need seed {last}, allowed is up to {SEED_MAX}")
        batches = [range(start, start + self.batch) for start in range(first, last + 1, self.batch)]
        return tuple(
            Request(
                items=tuple(
                    Item(prompt=prompt, negative_prompt=self.negative, seconds=seconds, seed=seed) for seed in seeds
                ),
                sampling=self.resolved(config.usual_sampling),
                blend=self.blend,
                head_room_seconds=self.head_room,
                decode_noise=self.decode_noise,
            )
            for prompt, seeds in zip(prompts, batches, strict=True)
        )

    def request(self, prompt: str, seconds: float, config: ModelConfig) -> Request:
        """Return the batch of one prompt. Raises ValueError for a seed that is out of range."""
        return self.requests([prompt], seconds, config)[0]

    def resolved(self, usual: Sampling) -> Sampling:
        """Return the sampling that was asked for, with the usual one where nothing was; scale 1 takes nothing of it."""
        scale = usual.guidance.scale if self.guidance is None else self.guidance
        own = Guidance() if scale == 1 else usual.guidance
        return Sampling(
            sampler=self.sampler or usual.sampler,
            steps=usual.steps if self.steps is None else self.steps,
            guidance=Guidance(
                scale=scale,
                apg=own.apg if self.apg is None else self.apg,
                rescale=own.rescale if self.rescale is None else self.rescale,
                interval=own.interval if self.interval is None else self.interval,
                norm_threshold=own.norm_threshold if self.norm_threshold is None else self.norm_threshold,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class PasteOptions:
    """Say how kept samples and made ones meet."""

    crossfade_ms: Annotated[
        float | None,
        click.Option(
            ["--crossfade-ms"], type=float, help=f"Inside the made region. Default: {DEFAULT_CROSSFADE_MS:g}."
        ),
    ]
    no_paste: Annotated[
        bool,
        click.Option(["--no-paste"], is_flag=True, help="The model's audio as it is; kept parts are then not exact."),
    ]

    def crossfade(self) -> float | None:
        """Return milliseconds, None without paste-back. Raises click.UsageError where both options are given."""
        if not self.no_paste:
            return DEFAULT_CROSSFADE_MS if self.crossfade_ms is None else self.crossfade_ms
        if self.crossfade_ms is not None:
            raise click.UsageError("--no-paste leaves no seam: --crossfade-ms has no effect beside it")
        return None


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Say where a sound goes, and in which form."""

    out: Annotated[
        Path | None,
        click.Option(
            ["--out", "-o"],
            type=click.Path(path_type=Path, allow_dash=True),
            help=".wav, .flac, .mp3, .ogg, or - for WAV on a pipe. Default: from prompt and seed.",
        ),
    ]
    format: Annotated[
        Subtype | None,
        click.Option(
            ["--format"],
            type=click.Choice(FORMATS),
            help="Sample format. Default: that of the extension, or what keeps the input.",
        ),
    ]
    peak: Annotated[
        float | None,
        click.Option(["--peak"], type=float, metavar="DB", help="Scale louder audio down to this peak, such as -1."),
    ]
    spectrogram: Annotated[
        Path | None,
        click.Option(["--spectrogram"], type=click.Path(path_type=Path), metavar="PNG", help="Draw one too."),
    ]
    play: Annotated[
        bool, click.Option(["--play"], is_flag=True, help="Play the result, from its first decoded part on.")
    ]
    force: Force
    quiet: Quiet


def given(ctx: click.Context, name: str) -> bool:
    """Return whether the user gave this option, whatever its value."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE
