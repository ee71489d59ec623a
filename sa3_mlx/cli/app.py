"""List the ``sa3`` commands. ``verify``, ``doctor`` and ``rerun`` exit with 1 when they found something wanting."""

from __future__ import annotations

from collections.abc import Sequence

import click

from sa3_mlx.common.version import version

from .group import LazyGroup, Sections, run_group

# section -> command -> (module, attribute, one line of help); modules are imported when their command runs
SECTIONS: Sections = {
    "Make audio": {
        "generate": ("audio.generate", "generate", "Make audio from a prompt."),
        "loop": ("audio.loop", "loop", "Make a loop of so many bars that joins itself."),
        "vary": ("audio.vary", "vary", "Make a variation of an audio file."),
        "inpaint": ("audio.inpaint", "inpaint", "Make regions of an audio file again and keep the rest."),
        "extend": ("audio.extend", "extend", "Continue an audio file, or lead up to it."),
        "bridge": ("audio.bridge", "bridge", "Lead from one audio file to another."),
        "rerun": ("audio.rerun", "rerun", "Make a file again from its own tags."),
    },
    "Serve": {
        "serve": ("serve", "serve", "Keep a model loaded; a page and interfaces for programs."),
        "mcp": ("mcp", "mcp", "Let assistants make sounds (MCP)."),
    },
    "Latents": {
        "encode": ("latents.encode", "encode", "Audio to latents."),
        "decode": ("latents.decode", "decode", "Latents to audio."),
    },
    "Models": {
        "models": ("models.listing", "models", "List installed and known models."),
        "get": ("models.get", "get", "Download and install a model."),
        "convert": ("models.convert", "convert", "Convert a checkpoint of another layout, or export one."),
        "export": ("models.export", "export", "Write a model as MLX functions that need no sa3."),
        "push": ("models.push", "push", "Upload a model to the hub with its card."),
        "quantize": ("models.quantize", "quantize", "Make a smaller model of a model."),
        "calibrate": ("models.calibrate", "calibrate", "Find the strengths of a model's variations."),
        "lora": ("models.lora", "lora", "Show, merge and convert adapters."),
        "add-clap": ("models.clap", "add_clap", "Put a latent CLAP into a model, to rank what it makes."),
        "info": ("models.info", "info", "Show what is in a model or an audio file."),
        "verify": (
            "models.verify.command",
            "verify",
            "Check a model against references, or backends against each other.",
        ),
        "tune": ("models.tune.command", "tune", "Find what is fastest on this machine, and keep it."),
        "doctor": ("models.doctor", "doctor", "Check this machine: what is installed, how fast it is."),
    },
    "Train": {
        "data": ("train.data", "data", "Make, check and pack the sounds to train on."),
        "pre-encode": ("train.data", "pre_encode", "Encode sounds to latents, once (needs PyTorch)."),
        "train": ("train.stages", "train", "Train a model (needs PyTorch)."),
        "evaluate": ("train.evaluate", "evaluate", "Measure how good a model is (needs PyTorch)."),
    },
}


class _Sa3(LazyGroup):
    package = "sa3_mlx.cli"
    sections = SECTIONS


COMMANDS = _Sa3.table()


@click.group(
    cls=_Sa3,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog='Start with: sa3 generate "piano note A4" --out piano.wav',
)
@click.version_option(version(), prog_name="sa3")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def cli() -> None:
    """Text to audio, variations, inpainting and continuation with Stable Audio 3, on MLX or PyTorch."""


def run(args: Sequence[str]) -> int:
    """Run one command line; return its exit code."""
    return run_group(cli, args, "sa3")
