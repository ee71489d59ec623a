"""The command group and what happens to its errors: one line on stderr and an exit code, never a traceback.

Exit codes: 0 done, 1 checked and found wanting (``verify``, ``doctor``, ``rerun``), 2 refused or failed, 130
interrupted.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Sequence

import click

from sa3_mlx.spec.version import version

# section -> command -> (module, attribute, one line of help); modules are imported when their command runs
SECTIONS: dict[str, dict[str, tuple[str, str, str]]] = {
    "Make audio": {
        "generate": ("generate", "generate", "Make audio from a prompt."),
        "vary": ("edit", "vary", "Make a variation of an audio file."),
        "inpaint": ("edit", "inpaint", "Make regions of an audio file anew and keep the rest."),
        "extend": ("edit", "extend", "Continue an audio file."),
        "rerun": ("rerun", "rerun", "Make a file again from its own tags."),
    },
    "Latents": {
        "encode": ("codec", "encode", "Audio to latents."),
        "decode": ("codec", "decode", "Latents to audio."),
    },
    "Models": {
        "models": ("models", "models", "List installed and known models."),
        "convert": ("convert", "convert", "Download or convert a checkpoint, or export one."),
        "quantize": ("quantize", "quantize", "Make a smaller model of a model."),
        "info": ("info", "info", "Show what is in a model or an audio file."),
        "verify": ("verify", "verify", "Check a model against reference outputs, or one backend against the other."),
        "train": ("train", "train", "Train a model (needs PyTorch)."),
        "doctor": ("doctor", "doctor", "Check this machine: what is installed, how fast it is."),
    },
}
_OUT_OF_MEMORY = re.compile(r"alloc|out of memory", re.IGNORECASE)  # in the words of mlx and torch
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class LazyGroup(click.Group):
    """Lists every command from the table above and imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f".{module}", __package__), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise click.UsageError(f"no command {args[0]!r}; commands: {', '.join(COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, _, text) in commands.items()])


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: sa3 generate \"piano note A4\" --out piano.wav",
)  # fmt: skip
@click.version_option(version(), prog_name="sa3")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
def cli() -> None:
    """Text to audio, variations, inpainting and continuation with Stable Audio 3, on MLX or PyTorch."""


def run(args: Sequence[str]) -> int:
    """Run one command line -> exit code. With ``--debug`` anywhere in it, errors keep their traceback."""
    try:
        code = cli.main(list(args), prog_name="sa3", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except (click.Abort, KeyboardInterrupt):
        _complain("interrupted; nothing half-written was left")
        return 130
    except BrokenPipeError:  # `sa3 models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except (click.ClickException, ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if "--debug" in args:
            raise
        _complain(_message(error))
        return 2


def _message(error: Exception) -> str:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{error.format_message()} (see '{error.ctx.command_path} --help')"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        return f"out of memory ({_first_line(error)}); ask for fewer seconds or a smaller batch"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read; --debug shows which"
    if isinstance(error, RuntimeError):  # mlx and torch raise little else
        return _first_line(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _complain(message: str) -> None:
    click.echo(f"sa3: {' '.join(message.split())}", err=True)
