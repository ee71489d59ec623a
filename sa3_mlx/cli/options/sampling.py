"""Say what clips are sampled, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, get_args

import click

from sa3_mlx.common.generation.noise import SEED_MAX, check_seed, random_seed
from sa3_mlx.common.generation.request import DEFAULT_PROMPT_FADE, Blend, Item, Request, TimedPrompt
from sa3_mlx.common.model.config import ModelConfig
from sa3_mlx.common.model.sampling import SAMPLER_NAMES, Guidance, Sampling


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
    at: Annotated[
        tuple[tuple[float, str], ...],
        click.Option(
            ["--at"],
            type=(float, str),
            multiple=True,
            metavar="SECONDS PROMPT",
            help='Go over to another prompt there: --at 20 "strings"; can be repeated. --at 0 stands for PROMPT.',
        ),
    ]
    prompt_fade: Annotated[
        float,
        click.Option(
            ["--prompt-fade"],
            type=float,
            default=DEFAULT_PROMPT_FADE,
            show_default=True,
            metavar="SECONDS",
            help="How long one prompt takes to go over into the next, such as 2.",
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

    def opening(self, prompt: str | None) -> str | None:
        """Return the prompt at 0: ``prompt``, or the one of --at 0. Raises click.UsageError for both."""
        first = [text for start, text in self.at if start == 0]
        if len(first) + (prompt is not None) > 1:
            raise click.UsageError("several prompts begin at 0: give either PROMPT or one --at 0")
        return first[0] if first else prompt

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
        later = tuple(TimedPrompt(start=start, prompt=text) for start, text in sorted(self.at) if start != 0)
        return tuple(
            Request(
                items=tuple(
                    Item(
                        prompt=prompt,
                        negative_prompt=self.negative,
                        seconds=seconds,
                        seed=seed,
                        prompts_over_time=later,
                    )
                    for seed in seeds
                ),
                sampling=self.resolved(config.usual_sampling),
                blend=self.blend,
                prompt_fade_seconds=self.prompt_fade,
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
