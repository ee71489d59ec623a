"""Tell before a run what is about to be made, and what may not be expected of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from sa3_mlx.cli.output.files import SAMPLE_BYTES
from sa3_mlx.cli.output.progress import Progress
from sa3_mlx.common.files.encoders import SUBTYPES
from sa3_mlx.common.files.safetensors import TensorFile
from sa3_mlx.common.generation.clips import Texts
from sa3_mlx.common.generation.request import Request
from sa3_mlx.common.model.checkpoint import WEIGHTS_FILE
from sa3_mlx.common.quant.format import Quantization
from sa3_mlx.common.terminal import excerpt
from sa3_mlx.common.text.tokenizer import Tokenizer, first_words

from .adapters import describe
from .estimate import slow_note

if TYPE_CHECKING:
    from .run import Setup, Task

_SUGGESTED = 4


def announce(task: Task, setup: Setup, tokenizer: Tokenizer, progress: Progress) -> None:
    """Say what is about to be made, and what may not be expected of it."""
    seeds = [item.seed for request in setup.requests for item in request.items]
    if task.only is not None:
        seeds = [seeds[task.only]]
    seed = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    progress.line(f"{task.model.label} on {setup.backend}, {task.seconds:g} s, seed {seed}")
    for file, applied in zip(task.options.lora, setup.adapters, strict=True):
        progress.line(f"adapter {file.name}: {describe(applied)}")
    if _merging_pays(task, setup):
        progress.line(
            "note: --lora-merged puts the adapters into the weights, and steps cost what they cost without them"
        )
    if setup.backend == "mlx" and (note := slow_note(setup.requests, task.model.config)):
        progress.line(note)
    _warn_of_rounding(task, progress)
    for line in unheard(tokenizer, task.model.name, setup.requests, task.model.config.examples):
        progress.line(f"note: {line}")


def _merging_pays(task: Task, setup: Setup) -> bool:
    """Tell whether adapters beside the weights only cost time: they are on at all times, and the weights 16-bit."""
    beside = setup.backend == "mlx" and bool(setup.adapters) and not task.options.lora_merged
    if not beside or setup.memory.precision.bytes > 2 or not all(applied.always for applied in setup.adapters):
        return False
    with TensorFile.open(task.model.folder / WEIGHTS_FILE) as file:
        return Quantization.read(file) is None  # packed layers take full size where they are merged


def _warn_of_rounding(task: Task, progress: Progress) -> None:
    """Say when the file cannot hold the kept samples as they are, and which can."""
    first = task.requests[0]
    if task.source is None or first.inpaint is None or first.crossfade_ms is None:
        return
    changing = [option for option in task.delivery.changing if option != "--peak"]  # it says itself what it changed
    if changing:
        progress.line(f"note: {', '.join(changing)} may change kept samples too; without, they stay as they are")
    if SAMPLE_BYTES[task.source.exact] > SAMPLE_BYTES[task.format]:
        lossless, better = task.format in SUBTYPES[".wav"], "--out with .wav"
        if lossless:
            better = "--format pcm24" if task.source.exact == "pcm24" else "--out with .wav and --format float"
        loss = f"are rounded to {task.format}" if lossless else f"change in {task.format}"
        progress.line(f"note: kept samples {loss}; {better} keeps them exactly")


def unheard(tokenizer: Tokenizer, name: str, requests: Iterable[Request], examples: Sequence[str]) -> list[str]:
    """Say which parts of the texts of requests the model ``name`` does not know or read, a line for each.

    Where there is a word that it does not know, the last line has some of its ``examples``.
    """
    lines, foreign = [], False
    for text in dict.fromkeys(part.text for request in requests for part in Texts.of(request).texts):
        if unknown := tokenizer.unknown(text):
            lines.append(f"{name} does not know {first_words(unknown)}; see 'sa3 info {shlex.quote(name)}'")
            foreign = True
        count = tokenizer.count(text)
        if text.strip() and not count:
            lines.append(f"{name} hears nothing of the prompt {excerpt(text)!r}")
        if count > tokenizer.max_length:
            lines.append(f"the prompt has {count} tokens, {name} hears the first {tokenizer.max_length}")
    if foreign and examples:
        lines.append(f"{name} does well: {suggestions(examples)}")
    return lines


def suggestions(examples: Sequence[str]) -> str:
    """Return the first examples of a model for a line, as they are typed."""
    return ", ".join(f'"{text}"' for text in examples[:_SUGGESTED])
