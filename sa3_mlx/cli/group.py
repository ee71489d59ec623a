"""Import commands when they run, and turn their errors into one line on stderr and an exit code, never a traceback.

Exit codes: 0 done, 1 checked and found wanting, 2 refused or failed, 75 a training that was asked to stop and goes on
with the same command, 130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from typing import ClassVar, NoReturn

import click

from sa3_mlx.common.terminal import ReaderGone, flush_streams, mend_streams, one_line, say

# section -> command -> (module, attribute, one line of help)
Sections = dict[str, dict[str, tuple[str, str, str]]]
# package -> extra of ours that brings it
_EXTRAS = {
    "torch": "torch",
    "sounddevice": "play",
    **dict.fromkeys(("scipy", "mido", "tensorboard", "webdataset"), "train"),
    "transformers": "clap",
    **dict.fromkeys(("fastapi", "starlette", "uvicorn", "pydantic"), "server"),
    "mcp": "mcp",
}
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "look at the permissions of the file and its folder",
    errno.EPERM: "look at the permissions of the file and its folder",
    errno.EROFS: "choose a place on another disk",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "give the name of a file",
    errno.ENOTDIR: "a part of this path is a file",
    errno.ELOOP: "links lead in a circle",
    errno.EMFILE: "too many files are open; raise the limit with ulimit -n",
}
_OUT_OF_MEMORY = re.compile(r"alloc|out of memory", re.IGNORECASE)  # in the words of mlx and torch


class LazyGroup(click.Group):
    """List every command of ``sections`` and import one, from ``package``, when it is used."""

    package: ClassVar[str]
    sections: ClassVar[Sections]

    @classmethod
    def table(cls) -> dict[str, tuple[str, str, str]]:
        """Return all commands, whatever their section."""
        return {name: entry for section in cls.sections.values() for name, entry in section.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return list(self.table())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in self.table():
            return None
        module, attribute, _ = self.table()[cmd_name]
        command = getattr(importlib.import_module(f"{self.package}.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in self.table():
            near = difflib.get_close_matches(args[0], self.table(), n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(self.table())}"
            raise click.UsageError(f"no command {args[0]!r}; {meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        for title, commands in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([(name, text) for name, (_, _, text) in commands.items()])


def run_group(group: click.Group, args: Sequence[str], name: str) -> int:
    """Run one command line of the program ``name``; return its exit code.

    With ``--debug`` anywhere in it, errors keep their traceback.
    """
    try:
        code = group.main(list(args), prog_name=name, standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        say(error.format_message())
        return 2
    except (click.Abort, KeyboardInterrupt):
        _complain(name, "interrupted; nothing half-written was left")
        return 130
    except ReaderGone:
        return 2
    except Exception as error:
        if "--debug" in args:
            raise
        _complain(name, message(error))
        return 2


def run_process(group: click.Group, name: str) -> NoReturn:
    """Run the command line of this process and exit with its code, whatever is closed or full around it."""
    mend_streams()
    sys.unraisablehook = _not_raised
    code = run_group(group, sys.argv[1:], name)
    flush_streams()
    sys.exit(code)


def _not_raised(unraisable: sys.UnraisableHookArgs) -> None:
    """Interrupt again, in a moment, where Python was about to forget an object, which takes no exception."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))  # at once it would end here too
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(unraisable)


def message(error: Exception) -> str:
    """Return what an error says, in one line, with what helps."""
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
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRAS.get((error.name or "").split(".")[0])):
        return f"this needs {error.name}: pip install 'sa3[{extra}]'"
    if isinstance(error, OSError) and error.strerror:
        return _system_message(error)
    if isinstance(error, ValueError | OSError | ImportError):
        return str(error) or type(error).__name__
    return f"unexpected {type(error).__name__} ({_first_line(error)}): a defect of sa3; --debug shows where"


def _system_message(error: OSError) -> str:
    """Return what the system refused, of which file, and what helps."""
    name = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{name}{error.strerror}" + ("" if remedy is None else f"; {remedy}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _complain(name: str, message: str) -> None:
    say(f"{name}: {one_line(message)}")
