"""The ladder of the model "music": every command can be typed as it stands, and a second run does nothing twice."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="training commands need torch")

from sa3_mlx.cli.app import cli
from sa3_torch.train.run.settings import preset_names
from tests.project.test_commands_in_docs import resolve

LADDER = Path(__file__).resolve().parents[2] / "benchmarks" / "ladder.sh"
# Notes its words, and makes what `have` looks for.
FAKE = """#!/usr/bin/env bash
echo "$@" >> "$LOG"
while [ $# -gt 0 ]; do
  if [ "$1" = --out ]; then mkdir -p "$2/model"; touch "$2/model/config.json"; fi
  if [ "$1" = render ]; then mkdir -p "$2"; touch "$2/index.json"; fi
  shift
done
"""


@pytest.fixture
def climb(tmp_path: Path):
    """Return a function that runs the ladder with a program that only notes what it is asked, and what it was asked."""
    fake, log = tmp_path / "sa3", tmp_path / "log"
    fake.write_text(FAKE)
    fake.chmod(0o755)

    def run() -> list[list[str]]:
        log.write_text("")
        environment = {**os.environ, "SA3": str(fake), "LOG": str(log)}
        subprocess.run([LADDER, tmp_path / "place", "3"], env=environment, check=True)
        return [shlex.split(line) for line in log.read_text().splitlines()]

    return run


def test_every_command_can_be_typed_and_names_settings_that_there_are(climb) -> None:
    asked = climb()
    assert [words[:2] for words in asked if words[0] == "train"] == [
        ["train", stage] for stage in (*("autoencoder",) * 2, *("pretrain",) * 3, "clap", "ode-warmup", "posttrain")
    ]
    for words in asked:
        command, ctx, rest = resolve(cli, words, "sa3")
        given, leftover, _ = command.make_parser(ctx).parse_args(list(rest))
        assert not leftover, words
        assert all(given.get(parameter.name) for parameter in command.params if parameter.required), words
        if words[0] == "train":
            assert words[words.index("--settings") + 1] in preset_names(words[1])
    assert asked[0][-2:] == ["--hours", "3"]


def test_a_second_run_does_only_what_goes_on_by_itself(climb) -> None:
    climb()
    assert [words[0] for words in climb()] == ["pre-encode", "data"]
