"""``python -m benchmarks``: measurements. The last line of a measuring command is one line of JSON."""

from __future__ import annotations

import importlib

import click

# command -> (module, one line of help); a module is imported when its command runs, so that speed needs one twin alone
COMMANDS: dict[str, tuple[str, str]] = {
    "latency": ("latency_command", "How long a generation takes, stage by stage, and what it costs."),
    "memory": ("memory_command", "Peak memory of every phase: predicted and measured."),
    "roofline": ("roofline_command", "Least time that a chip's arithmetic and memory allow."),
    "peer": ("peer_command", "Our speed beside that of the official MLX port, in one process."),
    "report": ("report_command", "Markdown table of what was measured, published and modelled."),
    "adherence": ("quality", "Share of prompts that a judge hears as asked."),
    "reconstruction": ("quality", "How well the autoencoder gives sounds back."),
    "precision": ("precision_command", "What every precision costs in quality and saves in bytes."),
    "variation": ("quality", "Audio-to-audio with both schedules."),
}


class LazyGroup(click.Group):
    """Lists every command from the table above and imports one when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"benchmarks.{COMMANDS[cmd_name][0]}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup)
def main() -> None:
    """Measurements of sa3."""


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
