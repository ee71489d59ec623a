"""Commands in README, CONTRIBUTING and docs: each can be typed as it stands, and those of the README's walk run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from benchmarks.__main__ import main as benchmarks
from sa3_mlx.cli.app import cli
from tests.support.command import Run, ok

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAM = re.compile(r"(?:sudo -v && )?(?:\.venv/bin/)?(sa3|python -m benchmarks|torchrun\b.*? -m sa3_mlx)\s+(.*)")
SKIPPED = ("...",)  # lines that stand for several commands


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the program and the words of every command in an indented block."""
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    for line in lines:
        if not line.startswith("    ") or any(mark in line for mark in SKIPPED):
            continue
        for part in line.strip().split(" && "):
            if found := PROGRAM.match(part):
                yield found[1].split()[0], shlex.split(found[2], comments=True)


def resolve(group: click.Command, words: list[str], name: str) -> tuple[click.Command, click.Context, list[str]]:
    """Go down to the command that the words name. Raises click.UsageError where there is none."""
    ctx = click.Context(group, info_name=name)
    while isinstance(ctx.command, click.Group):
        ahead = next((i for i, word in enumerate(words) if not word.startswith("-")), None)
        if ahead is None:
            break
        command = ctx.command.get_command(ctx, words[ahead])
        if command is None:
            raise click.UsageError(f"no command {words[ahead]!r} in {name}")
        words = words[:ahead] + words[ahead + 1 :]
        ctx = click.Context(command, info_name=command.name, parent=ctx)
    return ctx.command, ctx, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_the_options_that_they_are_given(page: Path) -> None:
    pytest.importorskip("torch", reason="training commands need torch")
    for program, words in commands(page):
        group = benchmarks if program == "python" else cli
        command, ctx, rest = resolve(group, words, program)
        given, leftover, _ = command.make_parser(ctx).parse_args(list(rest))
        assert not leftover, f"{page.name}: {program} {shlex.join(words)}: unexpected {leftover}"
        needed = [parameter.name for parameter in command.params if parameter.required]
        missing = [name for name in needed if not given.get(name or "")]
        assert not missing, f"{page.name}: {program} {shlex.join(words)}: without {missing}"


def test_pages_have_commands() -> None:
    assert len(list(commands(ROOT / "README.md"))) >= 10
    assert len(list(commands(ROOT / "docs" / "training.md"))) >= 12


def walk() -> list[list[str]]:
    """Commands of the README that make sounds with the demo, in their order."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sections = [part for part in text.split("\n## ") if part.startswith(("Start", "Edit"))]
    found = [line.strip() for part in sections for line in part.splitlines() if line.startswith("    ")]
    return [shlex.split(part)[1:] for line in found for part in line.split(" && ") if "sa3 " in part[:16]]


def test_the_readme_runs_in_its_order_in_an_empty_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first command on, with the demo model and nothing else; every prompt is of words that it knows."""
    monkeypatch.setenv("SA3_HOME", str(tmp_path / "home"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    lines = walk()
    assert len(lines) >= 5
    for words in lines:
        assert "does not know" not in ok(run(*words)).err, words
    assert len(list(Path().iterdir())) == len(lines)


def test_the_readme_s_python_runs(tmp_path: Path) -> None:
    pytest.importorskip("mlx.core")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SA3_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.endswith("Finished\n"), done.stderr
    assert (tmp_path / "piano.flac").is_file()


def test_readme_is_short_and_has_exactly_two_set_up_commands() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 130
    assert sum(line.strip().startswith("python3 -m venv") for line in lines) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
