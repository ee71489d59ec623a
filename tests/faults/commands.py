"""Every command that writes, in a form that takes about a second: its words, what it makes, whether that is whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click

from sa3_mlx.cli.app import cli

from .world import PRESET

IN = "../inputs"
TRAINING = f"{IN}/training"
SHORT = ("train.precision='fp32'", "train.steps=3", "train.save_every=1", "train.batch=4", "train.compile=false")


@dataclass(frozen=True, kw_only=True)
class Command:
    """Describe a command line that writes.

    A unit is a file or folder that is whole or as it was. ``finished`` says of a folder whether its readers take it for
    whole; a file always is.
    """

    name: str
    words: tuple[str, ...]
    units: tuple[str, ...]
    before: tuple[tuple[str, ...], ...] = ()  # commands that make what stands there already
    finished: Callable[[Path], bool] | None = None
    resumes: bool = False  # an unfinished unit is what the same command goes on with
    repeats: bool = True  # the command may run where it has run already
    timed: tuple[str, ...] = ()  # files that say how long something took
    needs_torch: bool = False

    @property
    def forced(self) -> tuple[str, ...]:
        """Return the words, with --force where the command has it."""
        command: click.Command | None = cli
        ctx, rest = click.Context(cli, info_name="sa3"), list(self.words)
        while isinstance(command, click.Group):
            command = command.get_command(ctx, rest.pop(0))
        assert command is not None
        has = any("--force" in parameter.opts for parameter in command.get_params(ctx))
        return (*self.words, "--force") if has else self.words


def _opens_model(folder: Path) -> bool:
    from sa3_mlx.common.installed import open_model

    return _opens(lambda: open_model(folder))


def _opens_official(folder: Path) -> bool:
    return (folder / "model_config.json").is_file() and (folder / "model.safetensors").is_file()


def _opens_cache(folder: Path) -> bool:
    from sa3_torch.train.data.clip_cache import ClipSet

    return _opens(lambda: ClipSet(folder))


def _opens_latents(folder: Path) -> bool:
    from sa3_torch.evaluate.stored import open_latents

    return _opens(lambda: open_latents(folder))


def _opens_shards(folder: Path) -> bool:
    from sa3_torch.train.data.shards import open_index

    return _opens(lambda: open_index(str(folder)))


def _opens_public(folder: Path) -> bool:
    """An import takes what is there, if it can."""
    return (folder / "silence.npy").is_file() and bool(list(folder.glob("0*.npy")))


def _opens_report(folder: Path) -> bool:
    return (folder / "report.json").is_file()


def _opens_adapter(folder: Path) -> bool:
    return (folder / "adapter.safetensors").is_file()


def _opens(open_it: Callable[[], object]) -> bool:
    try:
        open_it()
    except Exception:
        return False
    return True


def _sound(name: str, out: str, *words: str, seeds: bool = True, more: tuple[str, ...] = ()) -> Command:
    def line(seed: str) -> tuple[str, ...]:
        return (*words, "--model", "little", *(("--seed", seed) if seeds else ()), "--out", out, *more)

    return Command(name=name, words=line("2"), units=(out,), before=(line("1"),))


GENERATE = ("generate", "low kick", "--seconds", "0.5", "--steps", "4")
BATCH = (*GENERATE, "--model", "little", "--batch", "2", "--out", "x.wav", "--spectrogram", "x.png")
INFERENCE = (
    _sound("generate wav", "x.wav", *GENERATE),
    _sound("generate flac", "x.flac", *GENERATE),
    _sound("generate mp3", "x.mp3", *GENERATE),
    _sound("generate ogg", "x.ogg", *GENERATE),
    Command(name="generate to a pipe", words=(*GENERATE, "--model", "little", "--seed", "2", "--out", "-"), units=()),
    Command(
        name="generate batch",
        words=(*BATCH, "--seed", "3"),
        units=("x-1.wav", "x-2.wav", "x-1.png", "x-2.png"),
        before=((*BATCH, "--seed", "1"),),
    ),
    _sound("vary", "x.wav", "vary", f"{IN}/take-0.wav", "low bell", "--steps", "4"),
    _sound("inpaint", "x.wav", "inpaint", f"{IN}/take-0.wav", "low bell", "--region", "0.1:0.3", "--steps", "4"),
    _sound("extend", "x.wav", "extend", f"{IN}/take-0.wav", "low bell", "--seconds", "0.9", "--steps", "4"),
    Command(
        name="rerun",
        words=("rerun", "y.wav", "--out", "x.wav"),
        units=("x.wav", "y.wav"),
        before=((*GENERATE, "--model", "little", "--seed", "1", "--out", "y.wav"),),
    ),
    Command(
        name="encode safetensors",
        words=("encode", f"{IN}/take-0.wav", "x.safetensors", "--model", "little"),
        units=("x.safetensors",),
        before=(("encode", f"{IN}/take-1.wav", "x.safetensors", "--model", "little"),),
    ),
    Command(
        name="encode npy",
        words=("encode", f"{IN}/take-0.wav", "x.npy", "--model", "little"),
        units=("x.npy", "x.npy.json"),
        before=(("encode", f"{IN}/take-1.wav", "x.npy", "--model", "little"),),
    ),
    Command(
        name="decode",
        words=("decode", "z.safetensors", "x.flac", "--model", "little"),
        units=("x.flac",),
        before=(
            ("encode", f"{IN}/take-1.wav", "y.safetensors", "--model", "little"),
            ("encode", f"{IN}/take-0.wav", "z.safetensors", "--model", "little"),
            ("decode", "y.safetensors", "x.flac", "--model", "little"),
        ),
    ),
    Command(
        name="convert",
        words=("convert", f"{IN}/official", "made", "--name", "b"),
        units=("made",),
        before=(("convert", f"{IN}/official", "made", "--name", "a"),),
        finished=_opens_model,
    ),
    Command(
        name="convert --to-official",
        words=("convert", f"{IN}/little", "made", "--to-official"),
        units=("made",),
        before=(("convert", f"{IN}/spare", "made", "--to-official"),),
        finished=_opens_official,
    ),
    Command(
        name="quantize",
        words=("quantize", f"{IN}/little", "made", "--recipe", "4bit", "--codec", "keep"),
        units=("made",),
        before=(("quantize", f"{IN}/little", "made", "--recipe", "8bit", "--codec", "keep"),),
        finished=_opens_model,
    ),
    Command(
        name="lora merge",
        words=("lora", "merge", f"{IN}/little", f"{IN}/bell-0.safetensors", "made"),
        units=("made",),
        before=(("lora", "merge", f"{IN}/little", f"{IN}/bell-1.safetensors", "made"),),
        finished=_opens_model,
    ),
    Command(
        name="lora convert",
        words=("lora", "convert", f"{IN}/bell-0.safetensors", "x.safetensors", "--model", f"{IN}/little"),
        units=("x.safetensors",),
        before=(("lora", "convert", f"{IN}/bell-1.safetensors", "x.safetensors", "--model", f"{IN}/little"),),
    ),
    Command(
        name="data import",
        words=("data", "import", f"{IN}/sounds-0", "made"),
        units=("made",),
        before=(("data", "import", f"{IN}/sounds-1", "made"),),
        finished=_opens_cache,
    ),
    Command(
        name="data shards",
        words=("data", "shards", f"{IN}/sounds-0", "made"),
        units=("made",),
        finished=_opens_shards,
        repeats=False,
    ),
    Command(
        name="data lint",
        words=("data", "lint", f"{IN}/sounds-0", "--picture", "x.png"),
        units=("x.png",),
        before=(("data", "lint", f"{IN}/sounds-1", "--picture", "x.png"),),
    ),
)
LATENTS = ("--latents", f"{TRAINING}/latents")
AUTOENCODER = ("--autoencoder", f"{TRAINING}/run/model")


def _training(name: str, *words: str, settings: tuple[str, ...] = (), finished: Callable[[Path], bool]) -> Command:
    changes = [word for setting in (*SHORT, *settings) for word in ("--set", setting)]
    return Command(
        name=f"train {name}",
        words=("train", name, *words, "--out", "made", *changes),
        units=("made/model",),
        finished=finished,
        resumes=True,
        needs_torch=True,
    )


TRAINING_COMMANDS = (
    Command(
        name="data index",
        words=("data", "index", f"{IN}/shards-0/audio-000000.tar", "x.json"),
        units=("x.json",),
        before=(("data", "index", f"{IN}/shards-1/audio-000000.tar", "x.json"),),
        needs_torch=True,
    ),
    Command(
        name="pre-encode",
        words=("pre-encode", "--data", f"{IN}/sounds-0", *AUTOENCODER, "--out", "made", "--shard-frames", "8"),
        units=("made",),
        finished=_opens_latents,
        resumes=True,
        needs_torch=True,
    ),
    Command(
        name="pre-encode batched",
        words=(
            *("pre-encode", "--data", f"{IN}/sounds-0", *AUTOENCODER, "--out", "made", "--shard-frames", "8"),
            *("--batch", "4"),
        ),
        units=("made",),
        finished=_opens_latents,
        resumes=True,
        needs_torch=True,
    ),
    Command(
        name="data export-latents",
        words=("data", "export-latents", f"{TRAINING}/latents", "made", *AUTOENCODER),
        units=("made",),
        finished=_opens_public,
        repeats=False,
        needs_torch=True,
    ),
    Command(
        name="data import-latents",
        words=("data", "import-latents", f"{IN}/public", "made", *AUTOENCODER),
        units=("made",),
        finished=_opens_latents,
        repeats=False,
        needs_torch=True,
    ),
    _training(
        "autoencoder",
        *("--data", f"{TRAINING}/clips", "--model", PRESET),
        settings=("crop_samples=8192", "spectral.sizes=[128]"),
        finished=_opens_model,
    ),
    _training(
        "pretrain", *LATENTS, *AUTOENCODER, "--model", PRESET, settings=("clips.buckets=1",), finished=_opens_model
    ),
    _training(
        "lora",
        *LATENTS,
        *("--model", f"{TRAINING}/base"),
        settings=("clips.buckets=1", "adapter.exclude=[]", "adapter.rank=2"),
        finished=_opens_adapter,
    ),
    Command(
        name="evaluate",
        words=(
            *("evaluate", f"{TRAINING}/base", "--data", f"{TRAINING}/clips", "--seeds", "1", "--clips", "2"),
            *("--inpaint", "0", "--setting", "euler:1:1", "--backend", "torch", "--out", "made"),
        ),
        units=("made/report.json", "made/report.txt", "made/report.png"),
        timed=("made/report.json", "made/report.txt", "made/report.png"),
        needs_torch=True,
    ),
)
COMMANDS = {command.name: command for command in (*INFERENCE, *TRAINING_COMMANDS)}
